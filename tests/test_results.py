"""results.json: its schema, and that no failure leaves half of it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from experiments import results
from experiments.estimates import Estimate
from experiments.results import Row, RunFolder, load_results, plain, results_schema


def row(**changes: Any) -> Row:
    given: dict[str, Any] = {
        "solver": "ancestral",
        "settings": {"eta": 1.0, "variance": "small"},
        "sde": "vp",
        "target": "ring",
        "steps": 20,
        "nfe": 20,
        "network_passes": 20,
        "seconds": 0.25,
        "metrics": {"energy": Estimate(0.01, 0.002)},
    }
    return Row(**{**given, **changes})


def valid(document: dict[str, Any]) -> dict[str, Any]:
    schema = results_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(document, schema, cls=jsonschema.Draft202012Validator)
    return document


def test_a_run_is_valid_at_every_moment(tmp_path: Path) -> None:
    config = {"samples": 2000, "out": tmp_path, "device": torch.device("cpu"), "nfe": (10, 20)}
    with RunFolder(tmp_path / "a" / "run", "compare", config) as run:
        run.floor["ring"] = {"energy": Estimate(0.001, None)}
        run.write()
        assert valid(load_results(run.path))["rows"] == []
        run.add(row())
        run.add(row(guidance="cfg", scale=2.0, extra={"seed": 3, "label": 1, "samples": 2000}))
        now = valid(load_results(run.path))
        assert now["status"] == "running"
        assert len(now["rows"]) == 2
    final = valid(load_results(run.path / "results.json"))
    assert final["status"] == "finished"
    assert final["floor"] == {"ring": {"energy": {"value": 0.001, "stderr": None}}}
    assert final["config"] == {
        "samples": 2000,
        "out": str(tmp_path),
        "device": "cpu",
        "nfe": [10, 20],
    }
    assert final["rows"][0]["metrics"] == {"energy": {"value": 0.01, "stderr": 0.002}}
    assert final["rows"][1]["seed"] == 3
    assert final["environment"]["versions"]["torch"] == torch.__version__
    assert [p.name for p in run.path.iterdir()] == ["results.json"]


def test_the_rows_keys_are_the_promised_ones() -> None:
    promised = "solver settings sde target guidance scale steps nfe network_passes seconds metrics"
    assert list(row().as_dict()) == promised.split()
    required = results_schema()["$defs"]["row"]["required"]
    assert required == promised.split()
    with pytest.raises(ValueError, match="own keys"):
        row(extra={"nfe": 3})


def test_a_number_that_is_not_finite_becomes_null(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, "compare", {})
    run.add(row(metrics={"energy": Estimate(float("inf"), float("nan"))}, steps=None))
    found = valid(load_results(tmp_path))["rows"][0]
    assert found["metrics"]["energy"] == {"value": None, "stderr": None}
    assert found["steps"] is None


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt, "interrupted"), (RuntimeError, "failed")]
)
def test_what_stops_a_run_leaves_the_finished_rows(
    tmp_path: Path, error: type[BaseException], status: str
) -> None:
    def stopped() -> None:
        with RunFolder(tmp_path, "compare", {}) as run:
            run.add(row())
            raise error

    with pytest.raises(error):
        stopped()
    found = valid(load_results(tmp_path))
    assert found["status"] == status
    assert len(found["rows"]) == 1


@pytest.mark.parametrize("moment", ["fsync", "replace"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_write_keeps_the_old_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    error: BaseException | type[BaseException],
) -> None:
    run = RunFolder(tmp_path, "compare", {})
    run.add(row())
    before = (tmp_path / "results.json").read_bytes()

    def stop(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, moment, stop)
        with pytest.raises((KeyboardInterrupt, OSError)):
            run.add(row(nfe=40))
    assert (tmp_path / "results.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    run.write()
    assert len(load_results(tmp_path)["rows"]) == 2


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"--out .* cannot be written"):
            RunFolder(path, "compare", {})

    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(results.tempfile, "TemporaryFile", refuse)  # root may write everywhere
    with pytest.raises(ValueError, match=r"--out .*\(Permission denied\)"):
        RunFolder(tmp_path / "new", "compare", {})


def test_results_are_readable_by_whom_the_umask_lets(tmp_path: Path) -> None:
    RunFolder(tmp_path, "compare", {}).write()
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "results.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged"),
        ("[]", "not a results file"),
        ("{}", "not a results file"),
        (json.dumps({"schema_version": 99}), "schema version 99"),
        (None, "no results at"),
    ],
)
def test_loading_says_what_is_wrong(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_results(tmp_path)


def test_plain_knows_what_settings_hold() -> None:
    @dataclass(frozen=True)
    class Langevin:
        snr: float = 0.16

    found = plain({"corrector": Langevin(), "x": torch.ones(2), "n": np.int64(3), 4: {"a"}})
    assert found == {
        "corrector": {"name": "Langevin", "snr": 0.16},
        "x": [1.0, 1.0],
        "n": 3,
        "4": "{'a'}",
    }
