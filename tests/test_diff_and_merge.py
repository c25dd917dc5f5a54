"""Two runs compared and merged: what changed is named, noise is not, nothing is counted twice."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from typer.testing import CliRunner

from experiments import compare
from experiments.cli import app
from experiments.compare import CompareOptions, make_plan
from experiments.differences import differences
from experiments.merging import merge
from experiments.records import read_table
from experiments.results import load_results, results_schema
from experiments.runs import Run, identity, load_run
from experiments.store import CellStore
from tests.test_compare import Silent

SMALL: dict[str, Any] = {
    "targets": ("ring",),
    "sdes": ("vp",),
    "solvers": ("ancestral", "ddim"),
    "budgets": (4, 7),
    "samples": 30,
    "repeats": 3,
}
MACHINE = ("seconds", "seconds_interval", "peak_bytes", "batch_size")
BESIDE = ("rank", "versus_best")  # they depend on the other rows of the column


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs a, and b: one solver more, one fewer evaluations less; c: a's other seed."""
    folder = tmp_path_factory.mktemp("runs")
    variants: dict[str, dict[str, Any]] = {
        "a": {},
        "b": {"solvers": ("ddim", "euler_maruyama"), "budgets": (7,)},
        "c": {"seed": 5, "solvers": ("ddim",)},
        "union": {"solvers": ("ancestral", "ddim", "euler_maruyama"), "budgets": (4, 7)},
    }
    for name, options in variants.items():
        plan = make_plan(CompareOptions(**{**SMALL, **options, "out": str(folder / name)}))
        compare.run(plan, Silent())
    return folder


def altered(run: Run, metric: str, repeat_to_add: dict[int, float], spec: str = "ddim") -> Run:
    """The run with figures of one sampler shifted, repeat by repeat."""
    records = {
        key: replace(
            record,
            metrics={
                **record.metrics,
                metric: record.metrics[metric] + repeat_to_add[record.repeat],
            },
        )
        if record.kind == "cell" and record.spec == spec
        else record
        for key, record in run.records.items()
    }
    return replace(run, records=records)


def test_a_run_does_not_differ_from_itself(runs: Path) -> None:
    found = differences(load_run(runs / "a"), load_run(runs / "a"))
    assert not found.changed
    assert len(found.changes) == 4 + 2  # the energy distance of all, RMS of the ODE solver
    assert all(change.difference == change.low == change.high == 0 for change in found.changes)
    assert not found.settings


def test_a_shift_of_every_repeat_is_beyond_noise_though_small_beside_it(runs: Path) -> None:
    run = load_run(runs / "a")
    ddim = [row for row in run.rows if row["spec"] == "ddim"]
    shift = 0.2 * ddim[0]["metrics"]["energy"]["stderr"]
    wobble = shift / 50
    other = altered(run, "energy", {0: shift, 1: shift + wobble, 2: shift - wobble})
    found = differences(run, other)
    beyond = [change for change in found.changes if change.beyond]
    assert {change.what[2] for change in beyond} == {"ddim"}
    assert {change.metric for change in beyond} == {"energy"}
    for change in beyond:
        # Student's 97.5 % point with two degrees of freedom, from tables.
        reach = 4.302653 * wobble / np.sqrt(3)
        assert change.difference == pytest.approx(shift)
        assert change.low == pytest.approx(shift - reach, rel=1e-4)
        assert change.high == pytest.approx(shift + reach, rel=1e-4)
    assert found.changes[: len(beyond)] == beyond  # they come first


def test_differences_that_vary_as_much_as_they_are_large_are_noise(runs: Path) -> None:
    run = load_run(runs / "a")
    found = differences(run, altered(run, "energy", {0: 0.1, 1: -0.08, 2: 0.02}))
    assert not found.changed
    assert any(change.difference != 0 for change in found.changes)


def test_other_seeds_are_not_paired(runs: Path) -> None:
    found = differences(load_run(runs / "a"), load_run(runs / "c"))
    assert {change.repeats for change in found.changes} == {0}
    energy = next(change for change in found.changes if change.metric == "energy")
    from scipy.stats import ttest_ind

    values = [
        [cell.metrics["energy"] for cell in run.cells_of(row)]
        for run in (load_run(runs / "a"), load_run(runs / "c"))
        for row in run.rows
        if identity(row) == energy.what
    ]
    welch = ttest_ind(values[1], values[0], equal_var=False)
    assert energy.p == pytest.approx(welch.pvalue)
    interval = welch.confidence_interval(0.95)
    assert (energy.low, energy.high) == pytest.approx((interval.low, interval.high))
    assert ("config.seed", "0", "5") in found.settings


def test_false_alarms_stay_within_their_rate() -> None:
    """Of 400 comparisons of 20 rows of pure noise, at most 5 % name a change: 20, and 3.3 standard
    deviations of that count (14) are granted."""
    generator = np.random.default_rng(0)

    def noise() -> Run:
        rows = [
            {
                "target": "ring", "sde": "vp", "spec": f"s{i}", "budget": 5, "steps": 5,
                "guidance": "none", "scale": None, "solver": "s", "settings": {}, "repeats": 4,
                "samples": 40, "nfe": 5, "network_passes": 5, "primary": "energy",
                "metrics": {"energy": {"value": v.mean(), "stderr": v.std(ddof=1) / 2}},
            }
            for i, v in enumerate(generator.normal(size=(20, 4)))
        ]  # fmt: skip
        return Run(Path("x"), {"experiment": "compare", "rows": rows, "environment": {}}, {})

    alarms = sum(differences(noise(), noise()).changed for _ in range(400))
    assert alarms <= 34


def test_what_is_judged_differently_is_not_compared(runs: Path) -> None:
    run = load_run(runs / "a")
    rows = [{**row, "samples": row["samples"] * 2} for row in run.rows]
    found = differences(run, replace(run, results={**run.results, "rows": rows}))
    assert not found.changes
    assert len(found.incomparable) == len(rows)
    assert "samples 30 and 60" in found.incomparable[0][1]


def test_counts_and_failures_are_changes_without_noise(runs: Path) -> None:
    run = load_run(runs / "a")
    rows = run.rows
    rows[0] = {**rows[0], "nfe": rows[0]["nfe"] + 1}
    rows[1] = {**rows[1], "status": "failed", "metrics": {}}
    found = differences(run, replace(run, results={**run.results, "rows": rows}))
    assert [fact[1] for fact in found.facts] == ["nfe", "status"]
    assert found.changed


def test_the_command_says_so_and_exits_so(runs: Path, tmp_path: Path) -> None:
    a, b = str(runs / "a"), str(tmp_path / "b")
    shutil.copytree(a, b)
    runner = CliRunner()
    same = runner.invoke(app, ["diff", a, b, "--fail-on-change"])
    assert same.exit_code == 0
    assert "nothing changed" in same.output
    run = altered(load_run(b), "energy", {0: 1.0, 1: 1.01, 2: 0.99})
    for record in run.records.values():
        CellStore(Path(b)).put(record)
    CellStore(Path(b)).write_table(record for record in run.records.values())
    assert runner.invoke(app, ["diff", a, b]).exit_code == 0
    changed = runner.invoke(app, ["diff", a, b, "--fail-on-change"])
    assert changed.exit_code == 1
    assert "beyond noise" in changed.output
    assert "ddim" in changed.output.partition("within noise")[0]
    missing = runner.invoke(app, ["diff", a, str(tmp_path / "none")])
    assert missing.exit_code == 2


def test_a_merged_run_is_the_run_of_both(runs: Path, tmp_path: Path) -> None:
    path = merge(load_run(runs / "a"), load_run(runs / "b"), str(tmp_path / "m"), "merge")
    merged, whole = load_run(path), load_run(runs / "union")
    jsonschema.validate(load_results(path), results_schema())
    both = {identity(row): row for row in whole.rows}
    assert len(merged.rows) == 5  # of the six of the union, euler_maruyama at 4 in neither
    for row in merged.rows:
        expected = both[identity(row)]
        assert {k: v for k, v in row.items() if k not in MACHINE + BESIDE} == {
            k: v for k, v in expected.items() if k not in MACHINE + BESIDE
        }
        assert CellStore(path).tensors(row["cells"][0]) is not None
    assert len(read_table(path / "cells.parquet")) == 5 * 3


def test_repeats_of_other_seeds_become_one_row(runs: Path, tmp_path: Path) -> None:
    a, c = load_run(runs / "a"), load_run(runs / "c")
    merged = load_run(merge(a, c, str(tmp_path / "m"), "merge"))
    row = next(row for row in merged.rows if row["spec"] == "ddim")
    cells = [*a.records.values(), *c.records.values()]
    cells = [cell for cell in cells if (cell.kind, cell.spec) == ("cell", "ddim")]
    values = [cell.metrics["energy"] for cell in cells if cell.budget == row["budget"]]
    assert len(values) == row["repeats"] == 6
    assert row["samples"] == 180
    assert row["metrics"]["energy"]["value"] == pytest.approx(np.mean(values))
    assert row["metrics"]["energy"]["stderr"] == pytest.approx(np.std(values, ddof=1) / 6**0.5)
    assert sorted(row["by_repeat"]["energy"]) == sorted(values)
    floors = [r["floor_by_repeat"]["energy"] for run in (a, c) for r in run.rows if same(r, row)]
    assert row["floor_by_repeat"]["energy"] == [*floors[0], *floors[1]]
    # Student's 97.5 % point with five degrees of freedom, from tables.
    reach = 2.570582 * np.std(values, ddof=1) / 6**0.5
    low, high = row["intervals"]["energy"]
    assert (high + low) / 2 == pytest.approx(np.mean(values))
    assert (high - low) / 2 == pytest.approx(reach, rel=1e-6)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return identity(one) == identity(other)


def test_a_key_with_two_figures_is_named(runs: Path, tmp_path: Path) -> None:
    a = load_run(runs / "a")
    with pytest.raises(ValueError, match=r"different figures.*ring · vp · ddim · NFE 4 · repeat 0"):
        merge(a, altered(a, "energy", {0: 1.0, 1: 0.0, 2: 0.0}), str(tmp_path / "m"), "merge")
    assert not (tmp_path / "m").exists()


def test_repeats_of_two_programs_are_not_mixed(runs: Path, tmp_path: Path) -> None:
    a = load_run(runs / "a")
    records = {f"f{key[1:]}": replace(r, key=f"f{key[1:]}") for key, r in a.records.items()}
    rows = [{**row, "cells": [f"f{key[1:]}" for key in row["cells"]]} for row in a.rows]
    other = replace(a, records=records, results={**a.results, "rows": rows})
    with pytest.raises(ValueError, match="different keys"):
        merge(a, other, str(tmp_path / "m"), "merge")


def test_rows_of_the_first_schema_are_read_and_compared(runs: Path, tmp_path: Path) -> None:
    results = json.loads((runs / "a" / "results.json").read_text())
    since = ("cells", "error", "peak_bytes", "batch_size")
    old = {
        **results,
        "schema_version": 1,
        "rows": [{k: v for k, v in row.items() if k not in since} for row in results["rows"]],
    }
    (tmp_path / "results.json").write_text(json.dumps(old))
    read = load_results(tmp_path)
    jsonschema.validate(read, results_schema())
    assert all(row["cells"] == [] and row["error"] == "" for row in read["rows"])
    assert json.loads((tmp_path / "results.json").read_text())["schema_version"] == 1
    found = differences(load_run(tmp_path), load_run(runs / "a"))
    assert len(found.changes) == 6
    assert not found.changed
    with pytest.raises(ValueError, match="no cells to merge"):
        merge(load_run(tmp_path), load_run(runs / "a"), str(tmp_path / "m"), "merge")
