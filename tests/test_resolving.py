"""Ranks of rows, and repeats added until they are resolved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from experiments import compare, work
from experiments.compare import CompareOptions, make_plan
from experiments.estimates import Estimate
from experiments.intervals import PairedBootstrap, paired_difference, t_interval
from experiments.resolving import column_of, more_repeats, row_intervals, unresolved, with_ranks
from experiments.results import Row, load_results, results_schema
from experiments.tables import BEST, TIED, comparison_tables
from tests.test_compare import Silent


def made(solver: str, values: list[float], floor: list[float] | None = None, **extra: Any) -> Row:
    more = {
        "spec": solver,
        "guided_by": "unguided",
        "budget": 10,
        "primary": "energy",
        "status": "ok",
        "repeats": len(values),
        "by_repeat": {"energy": values},
        "floor_by_repeat": {"energy": floor or [0.1] * len(values)},
    }
    return Row(
        solver=solver,
        settings={},
        sde="vp",
        target="ring",
        steps=10,
        nfe=10.0,
        network_passes=10.0,
        seconds=1.0,
        metrics={"energy": Estimate(float(np.mean(values)))},
        extra=more | extra,
    )


def ranks(*rows: Row) -> list[Any]:
    return [row.extra["rank"] for row in with_ranks(rows)]


def test_rows_are_ranked_within_their_column_only() -> None:
    good, bad = made("a", [1.0, 1.1, 0.9]), made("b", [5.0, 5.2, 5.1])
    other = made("a", [9.0, 9.1, 9.2], budget=20)
    own = made("c", [0.1, 0.2, 0.1], budget=None)
    failed = made("d", [0.0, 0.0, 0.0], status="failed")
    assert ranks(good, bad, other, own, failed) == [[1, 1], [2, 2], None, None, None]


def test_the_difference_from_the_best_has_an_interval_wider_than_one_pairs() -> None:
    rows = with_ranks(
        [made("a", [1.0, 1.1, 0.9]), made("b", [5.0, 5.2, 5.1]), made("c", [9.0] * 3)]
    )
    versus = rows[1].extra["versus_best"]
    alone = paired_difference([5.0, 5.2, 5.1], [1.0, 1.1, 0.9])
    assert (versus["spec"], versus["value"]) == ("a", pytest.approx(4.1))
    assert alone.interval is not None
    assert versus["interval"].low < alone.interval.low < 4.1 < alone.interval.high
    assert rows[0].extra["versus_best"]["value"] == 0


def test_laws_with_floors_of_their_own_are_ranked_above_them() -> None:
    # The second has the smaller distance and the larger excess.
    first = made("a", [5.01, 5.02, 5.03], floor=[5.0, 5.01, 5.02])
    second = made("b", [2.0, 2.1, 2.2], floor=[0.5, 0.6, 0.7])
    assert ranks(first, second) == [[1, 1], [2, 2]]


def test_unresolved_columns_get_repeats_within_the_budget() -> None:
    a, b = made("a", [1.0, 1.1, 0.9]), made("b", [1.1, 0.9, 1.05])
    rows = [row.as_dict() for row in with_ranks([a, b])]
    (column,) = unresolved(rows)
    assert column == column_of(rows[0]) == ("ring", "vp", "unguided", 10)
    cost = {column: 2.0}
    assert more_repeats(rows, [column], cost, max_repeats=30, seconds_left=None) == {column: 5}
    assert more_repeats(rows, [column], cost, max_repeats=4, seconds_left=None) == {column: 4}
    assert more_repeats(rows, [column], cost, max_repeats=3, seconds_left=None) == {}
    assert more_repeats(rows, [column], cost, max_repeats=None, seconds_left=3) == {column: 4}
    assert more_repeats(rows, [column], cost, max_repeats=None, seconds_left=1) == {}
    same = [row.as_dict() for row in with_ranks([a, made("also a", [1.0, 1.1, 0.9])])]
    assert unresolved(same) == []  # no number of repeats tells a sampler from itself


def test_intervals_of_a_row() -> None:
    values = {"energy": [1.0, 1.2, 1.1], "rms": [0.5, 0.6, 0.55]}
    floor = {"energy": [0.5, 0.72, 0.6]}
    found = row_intervals(values, floor, [], PairedBootstrap())
    assert set(found) == {"energy", "energy_above_floor", "rms"}
    assert found["energy"] == t_interval(values["energy"])
    excess = paired_difference(values["energy"], floor["energy"]).interval
    assert found["energy_above_floor"] == excess
    distances = [np.random.default_rng(r).exponential(size=200) for r in range(3)]
    sharper = row_intervals(values, floor, distances, PairedBootstrap())["rms"]
    assert sharper is not None
    assert sharper.low < np.mean([np.sqrt((d**2).mean()) for d in distances]) < sharper.high


def run(folder: Path, **options: Any) -> compare.Outcome:
    given: dict[str, Any] = {
        "targets": ["ring"],
        "sdes": ["vp"],
        "solvers": ["ddim", "ancestral", "ancestral:eta=0.0"],
        "budgets": [5],
        "samples": 40,
        "repeats": 2,
    }
    return compare.run(make_plan(CompareOptions(**given | options, out=str(folder))), Silent())


def test_until_resolved_adds_repeats_and_computes_only_these(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    performed: list[tuple[str, int]] = []
    real = work.perform

    def counted(task: Any, *rest: Any) -> work.Done:
        performed.append((task.key, task.repeat))
        return real(task, *rest)

    monkeypatch.setattr("experiments.pool.perform", counted)
    first = run(tmp_path)
    assert {row["repeats"] for row in first.folder.rows} == {2}
    before = len(performed)
    outcome = run(tmp_path, until_resolved=True, max_repeats=4)
    results = load_results(tmp_path)
    jsonschema.Draft202012Validator(results_schema()).validate(results)
    assert {row["repeats"] for row in outcome.folder.rows} == {4}
    assert {row["samples"] for row in outcome.folder.rows} == {160}
    assert {repeat for _, repeat in performed[before:]} == {2, 3}
    assert len(performed) == len(set(performed))
    for row in results["rows"]:
        assert len(row["by_repeat"]["energy"]) == len(row["floor_by_repeat"]["energy"]) == 4
        low, high = row["intervals"]["energy"]
        assert low < row["metrics"]["energy"]["value"] < high
    # The first repeats are those of the first run, to the bit.
    assert [row["by_repeat"]["energy"][:2] for row in results["rows"]] == [
        row["by_repeat"]["energy"] for row in first.folder.rows
    ]


def test_repeats_end_where_the_best_is_known(tmp_path: Path) -> None:
    outcome = run(
        tmp_path,
        solvers=["ddim", "euler_maruyama"],
        budgets=[6],
        samples=300,
        repeats=4,
        until_resolved=True,
    )
    rows = {row["solver"]: row for row in outcome.folder.rows}
    assert rows["ddim"]["rank"] == [1, 1]
    assert rows["euler_maruyama"]["rank"] == [2, 2]
    assert rows["ddim"]["repeats"] == rows["euler_maruyama"]["repeats"] < 30
    (table,) = comparison_tables(outcome.folder.rows)
    cells = [str(cell.style) for cell in table.columns[1].cells if hasattr(cell, "style")]
    assert BEST in cells
    assert TIED not in cells


def test_limits_without_what_they_limit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--budget-seconds 5 limits --until-resolved"):
        run(tmp_path / "a", budget_seconds=5.0)
    with pytest.raises(ValueError, match="--max-repeats must be at least 2, got 1"):
        run(tmp_path / "b", until_resolved=True, max_repeats=1)
