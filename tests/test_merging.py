"""Two runs of guidance, or of error-budget, in one folder: as if one run had computed them all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from experiments import error_budget, guidance_run
from experiments.budget_plan import BudgetOptions
from experiments.error_budget import make_plan as budget_plan
from experiments.guidance_judging import ExactGuidanceJudge
from experiments.guidance_run import GuidanceOptions
from experiments.merging import merge
from experiments.records import read_table
from experiments.reporting.page import render
from experiments.results import load_results, results_schema
from experiments.runs import Run, identity, load_run
from experiments.store import CellStore
from tests.test_compare import Silent

# What the machine says, and what depends on the other rows of the column.
BESIDE = ("seconds", "seconds_interval", "peak_bytes", "batch_size", "rank", "versus_best")
GUIDED: dict[str, Any] = {
    "targets": ("ring",),
    "solvers": ("ddim", "ancestral"),
    "budgets": (5,),
    "guidances": ("cfg",),
    "samples": 32,
    "repeats": 2,
    "tolerance": 0.1,
    "jobs": 1,
}
BUDGET: dict[str, Any] = {
    "targets": ("ring",),
    "sdes": ("vp",),
    "budgets": (4,),
    "samples": 24,
    "repeats": 2,
    "jobs": 1,
}
Make = Callable[..., Run]


@pytest.fixture
def guided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setattr(ExactGuidanceJudge, "fine_steps", 20)  # nothing here is about fineness

    def make(name: str, **options: Any) -> Run:
        given = GuidanceOptions(**{**GUIDED, **options, "out": str(tmp_path / name)})
        guidance_run.run(guidance_run.make_plan(given), Silent())
        return load_run(tmp_path / name)

    return make


@pytest.fixture
def budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setattr("experiments.budget_problem.FINE_ODE_STEPS", 6)
    monkeypatch.setattr("experiments.budget_problem.FINE_SDE_STEPS", 12)

    def make(name: str, **options: Any) -> Run:
        given = BudgetOptions(**{**BUDGET, **options, "out": str(tmp_path / name)})
        error_budget.run(budget_plan(given), Silent())
        return load_run(tmp_path / name)

    return make


def merged(a: Run, b: Run) -> Run:
    """Both, written and read again."""
    path = merge(a, b, str(a.path.parent / f"{a.path.name}+{b.path.name}"), "merge")
    jsonschema.validate(load_results(path), results_schema())
    return load_run(path)


def figures(run: Run) -> dict[tuple[str, ...], dict[str, Any]]:
    """Rows without what the machine says."""
    return {identity(row): {k: v for k, v in row.items() if k not in BESIDE} for row in run.rows}


def test_scales_of_two_runs_lie_on_one_line(guided: Make) -> None:
    a, b = guided("a", scales=(1.0, 8.0)), guided("b", scales=(4.0, 8.0))
    whole, both = guided("whole", scales=(1.0, 4.0, 8.0)), merged(a, b)
    assert figures(both) == figures(whole)
    broken = {row["breaks_at"]["scale"] for row in both.rows if row["breaks_at"]}
    assert broken
    # Not what either run says of its own scales.
    assert {row["breaks_at"]["scale"] for row in a.rows if row["breaks_at"]} != broken
    assert len(read_table(both.path / "cells.parquet")) == 2 * 3 * 2
    assert "merged" in both.results["config"]
    # A merged run is a run: with itself it is the same again, and a page can be made of it.
    assert figures(merged(both, whole)) == figures(whole)
    assert "breaks" in render(both, trajectories=False).lower()


def test_repeats_of_a_guidance_run_are_added(guided: Make) -> None:
    a, b = guided("a", scales=(1.0, 8.0)), guided("b", scales=(1.0, 8.0), repeats=3)
    both, whole = figures(merged(a, b)), figures(b)
    assert both == whole
    other = guided("other", scales=(8.0,), seed=7)
    for row in merged(a, other).rows:
        found = (row["repeats"], len(row["by_repeat"]["accuracy"]), len(row["cells"]))
        assert found == ((4, 4, 4) if row["scale"] == 8 else (2, 2, 2))
        # The line has both scales in the first seed alone, and the crossing is that of A.
        alike = next(r for r in a.rows if identity(r) == identity(row))
        assert row["breaks_at"] == alike["breaks_at"]


def test_scales_that_share_no_repeat_do_not_make_a_line(guided: Make) -> None:
    a = guided("a", scales=(1.0,), solvers=("ddim",))
    b = guided("b", scales=(8.0,), solvers=("ddim",), seed=7)
    assert [row["breaks_at"] for row in merged(a, b).rows] == [None, None]


def test_another_tolerance_is_another_question(guided: Make, tmp_path: Path) -> None:
    a, b = guided("a", scales=(1.0,)), guided("b", scales=(8.0,), tolerance=0.2)
    with pytest.raises(ValueError, match=r"--tolerance is 0\.1 in one run and 0\.2 in another"):
        merge(a, b, str(tmp_path / "m"), "merge")
    assert not (tmp_path / "m").exists()


def test_solvers_and_repeats_of_two_budgets_are_one_budget(budget: Make) -> None:
    a = budget("a", solvers=("ancestral", "ddim"))
    b = budget("b", solvers=("ddim", "euler_maruyama"), repeats=3)
    found = merged(a, b)
    assert figures(found) == figures(a) | figures(b)  # B's three repeats hold A's two
    assert len(found.rows) == 3
    assert len(read_table(found.path / "cells.parquet")) == 2 + 3 + 3
    # What the rows rest on is there too, so that the folder goes on as a run of either.
    assert {record.kind for record in found.records.values()} == {"cell", "fine", "floor"}
    assert "ancestral" in render(found, trajectories=False)


def test_seeds_of_two_budgets_are_repeats_of_one(budget: Make) -> None:
    a, b = budget("a", solvers=("ddim",)), budget("b", solvers=("ddim",), seed=3)
    (row,) = merged(a, b).rows
    assert (row["repeats"], row["samples"], len(row["cells"])) == (4, 96, 4)
    for name, part in row["parts"].items():
        values = [run.rows[0]["by_repeat"][name] for run in (a, b)]
        assert row["by_repeat"][name] == [*values[0], *values[1]]
        mean = sum(row["by_repeat"][name]) / 4
        assert part["value"] ** 2 == pytest.approx(max(0.0, mean))
        assert row["metrics"][name]["value"] == pytest.approx(mean)
    assert row["status"] == "ok"


def test_a_row_that_failed_in_one_run_is_taken_from_the_other(
    budget: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = budget("good", solvers=("ddim",))
    with monkeypatch.context() as failing:
        failing.setattr("experiments.budget_cells.solver_parts", _fails)
        bad = budget("bad", solvers=("ddim",))
    assert [row["status"] for row in bad.rows] == ["failed"]
    for pair in ((good, bad), (bad, good)):
        assert figures(merged(*pair)) == figures(good)
    (row,) = merged(bad, bad).rows
    assert (row["status"], row["parts"], row["metrics"]) == ("failed", {}, {})


def _fails(*args: Any) -> dict[str, float]:
    raise ArithmeticError("no")


def test_what_cannot_be_merged_says_why(budget: Make, guided: Make, tmp_path: Path) -> None:
    a, b = budget("a", solvers=("ddim",)), guided("b", scales=(1.0,))
    with pytest.raises(ValueError, match=r"a run of error-budget and .* one of guidance"):
        merge(a, b, str(tmp_path / "m"), "merge")
    network = {"targets": (), "sdes": (), "models": ("digits-vp",)}
    of_data = budget("c", solvers=("ddim",), samples=20, repeats=1, **network)
    with pytest.raises(ValueError, match="dealt out among the repeats"):
        merge(of_data, of_data, str(tmp_path / "m"), "merge")
    (tmp_path / "s").mkdir()
    steps = Run(tmp_path / "s", {"experiment": "steps", "rows": []}, {})
    with pytest.raises(ValueError, match=r"a run of steps, which has no cells to merge; name two"):
        merge(steps, a, str(tmp_path / "m"), "merge")
    assert not (tmp_path / "m").exists()
    assert CellStore(a.path).all()  # and nothing was lost
