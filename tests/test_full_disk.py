"""A disk that fills up while a run writes: what was finished stays whole, and the rerun goes on."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from experiments.cli import app
from experiments.records import read_table
from experiments.results import load_results, results_schema
from experiments.store import CellStore

ARGUMENTS = "compare --target ring --sde vp --solver ddim --nfe 4,7 --samples 20 --repeats 2"
MACHINE = {"seconds", "judging_seconds", "peak_bytes"}


def run(folder: Path) -> Any:
    return CliRunner().invoke(app, [*ARGUMENTS.split(), "--jobs", "1", "--out", str(folder)])


def figures(folder: Path) -> list[dict[str, Any]]:
    rows = [record.as_dict() for record in read_table(folder / "cells.parquet")]
    return [{k: v for k, v in row.items() if k not in MACHINE} for row in rows]


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A disk that is full after so many files: every file of a run is flushed to it by fsync."""
    real = os.fsync

    def full_after(files: int) -> None:
        left = [files]

        def fsync(descriptor: int) -> None:
            left[0] -= not os.path.isdir(f"/proc/self/fd/{descriptor}")
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)

    return full_after


def one_line(done: Any) -> str:
    assert done.exit_code == 1, done.output
    (line,) = done.stderr.strip().splitlines()
    return str(line)


# Files in order: results.json and experiment.toml; two floors; two fine solutions of two files
# each; four cells of two each, and results.json again after the first row.
@pytest.mark.parametrize("files", [0, 3, 8, 13])
def test_finished_cells_stay_and_the_rerun_gives_the_same_table(
    files: int, tmp_path: Path, disk: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk(files)
    line = one_line(run(tmp_path / "full"))
    assert "cannot write" in line
    assert "(No space left on device)" in line
    if files:  # with none the first write fails, before there is anything to speak of
        assert "make room there, and the same command goes on" in line
    kept = CellStore(tmp_path / "full").all()
    assert all(record.status == "ok" for record in kept)
    assert len(kept) >= (files - 4) // 2
    held = [p.name for p in (tmp_path / "full").rglob("*") if p.is_file()]
    assert not [name for name in held if name.endswith((".tmp", ".partial"))]
    monkeypatch.undo()
    again = run(tmp_path / "full")
    assert again.exit_code == 0, again.output
    assert run(tmp_path / "whole").exit_code == 0
    assert figures(tmp_path / "full") == figures(tmp_path / "whole")
    # None that was finished was computed again: its wall time is still the first run's.
    after = {record.key: record for record in CellStore(tmp_path / "full").all()}
    assert all(after[record.key] == record for record in kept)


def test_a_table_that_does_not_fit_leaves_the_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pq, "write_table", full)
    line = one_line(run(tmp_path))
    assert "cells.parquet' (No space left on device); 4 cells are finished" in line
    assert load_results(tmp_path)["status"] == "failed"
    assert len(CellStore(tmp_path).all()) == 4 + 2 + 2  # and the fine solutions and floors


def test_timing_says_where_the_time_went(tmp_path: Path) -> None:
    assert run(tmp_path).exit_code == 0
    results = load_results(tmp_path)
    jsonschema.Draft202012Validator(results_schema()).validate(results)
    records = CellStore(tmp_path).all()
    timing = results["timing"]
    assert timing["processes"] == 1
    assert timing["sampling"] == pytest.approx(sum(r.seconds or 0.0 for r in records))
    assert timing["judging"] == pytest.approx(sum(r.judging_seconds or 0.0 for r in records))
    assert all(r.judging_seconds for r in records if r.kind == "floor")
    share = 1 - (timing["sampling"] + timing["judging"]) / timing["total"]
    assert 0 < timing["overhead_share"] == pytest.approx(share)
    # A run that computes nothing has no share to speak of.
    assert run(tmp_path).exit_code == 0
    assert load_results(tmp_path)["timing"]["overhead_share"] is None
