"""Advice on synthetic rows, whose best samplers and knees are known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from experiments.advice import advise, difference, pareto_front
from experiments.estimates import Estimate
from experiments.intervals import paired_difference, t_interval
from experiments.resolving import with_ranks
from experiments.results import Row, plain

REPEATS = 8


def rows_of(
    figures: dict[str, dict[int, float]],
    *,
    spread: float = 0.01,
    seconds: dict[str, float] | None = None,
    **extra: Any,
) -> list[dict[str, Any]]:
    """Rows whose repeats scatter by ``spread``, independently; floor 0.1, scattering alike."""
    generator = np.random.default_rng(1)
    floor = (0.1 + spread * generator.normal(size=REPEATS)).tolist()
    rows = []
    for solver, by_budget in figures.items():
        for budget, mean in by_budget.items():
            values = (mean + spread * generator.normal(size=REPEATS)).tolist()
            more = {
                "spec": solver,
                "guided_by": "unguided",
                "budget": budget,
                "grid": "log_snr",
                "primary": "energy",
                "status": "ok",
                "repeats": REPEATS,
                "by_repeat": {"energy": values},
                "floor_by_repeat": {"energy": floor},
                "intervals": {
                    "energy": t_interval(values),
                    "energy_above_floor": paired_difference(values, floor).interval,
                },
            }
            rows.append(
                Row(
                    solver=solver,
                    settings={},
                    sde="vp",
                    target="ring",
                    steps=budget,
                    nfe=budget,
                    network_passes=budget,
                    seconds=budget * (seconds or {}).get(solver, 1.0),
                    metrics={"energy": Estimate(float(np.mean(values)))},
                    extra=more | extra,
                )
            )
    return [plain(row.as_dict()) for row in with_ranks(rows)]


def test_one_sampler_takes_over_from_another_and_the_knee_is_named() -> None:
    rows = rows_of(
        {
            "fast": {5: 2.0, 10: 1.0, 20: 0.6, 50: 0.6, 100: 0.6},
            "slow": {5: 9.0, 10: 4.0, 20: 0.1, 50: 0.1, 100: 0.1},
        }
    )
    advice = advise(rows)
    (panel,) = advice.panels
    assert [(r.low, r.high, r.solver, r.grid) for r in panel.recommended] == [
        (5, 10, "fast", "log_snr"),
        (20, 100, "slow", "log_snr"),
    ]
    assert [(e.solver, e.nfe) for e in panel.front_nfe] == [("fast", 5), ("fast", 10), ("slow", 20)]
    assert panel.knee is not None
    assert (panel.knee.solver, panel.knee.nfe) == ("slow", 20)
    assert panel.at_floor
    text = "\n".join(advice.lines)
    assert "under 20 evaluations use fast with grid log_snr" in text
    assert "from 20 evaluations on (tried to 100) use slow" in text
    assert "the knee is at 20 evaluations, slow, not told from true samples" in text


def test_nothing_is_said_that_is_not_resolved() -> None:
    rows = rows_of({"a": {10: 0.5, 20: 0.5}, "b": {10: 0.5, 20: 0.5}}, spread=0.2)
    advice = advise(rows)
    (panel,) = advice.panels
    assert panel.recommended == ()
    assert "no best sampler is resolved by 8 repeats" in advice.lines[0]
    assert not any(" use " in line for line in advice.lines)
    assert len(panel.front_nfe) == 1


def test_what_is_left_is_named_where_the_best_is_not_resolved() -> None:
    rows = rows_of({"a": {10: 0.5}, "b": {10: 0.5}, "bad": {10: 3.0}})
    (panel,) = advise(rows).panels
    assert panel.open == {10: ("a", "b")}
    assert "at 10 evaluations it is one of a, b; which is not resolved" in panel.lines[0]


def test_quality_that_still_gains_has_no_knee() -> None:
    rows = rows_of({"a": {10: 3.0, 20: 2.0, 40: 1.0}, "b": {10: 4.0, 20: 3.0, 40: 2.0}})
    (panel,) = advise(rows).panels
    assert panel.knee is None
    assert "no knee: 40 evaluations, the most tried, still gain" in "\n".join(panel.lines)
    assert "at every number of evaluations tried (10 to 40) use a" in panel.lines[0]


def test_a_knee_that_a_gain_unseen_may_hide_is_not_named() -> None:
    """The repeats scatter so much that half of the figure may be gained without being resolved."""
    rows = rows_of({"a": {10: 1.0, 20: 0.8}}, spread=0.5)
    (panel,) = advise(rows).panels
    assert len(panel.front_nfe) == 1
    assert panel.knee is None
    assert panel.gain_beyond > 0.5
    assert "no knee is resolved: it may be that a at 20 evaluations gains" in panel.lines[-1]
    (panel,) = advise(rows_of({"a": {10: 1.0, 20: 1.0}})).panels
    assert panel.knee is not None
    assert panel.gain_beyond < 0.05
    assert "beyond it at most" in panel.lines[-1]


def test_a_gain_that_one_repeat_cannot_tell_is_not_known() -> None:
    rows = rows_of({"a": {10: 1.0, 20: 0.5}})
    for row in rows:
        row["by_repeat"] = {"energy": row["by_repeat"]["energy"][:1]}
        row["floor_by_repeat"] = {"energy": row["floor_by_repeat"]["energy"][:1]}
    (panel,) = advise(rows).panels
    assert panel.knee is None
    assert panel.gain_beyond == math.inf


def test_a_step_that_costs_two_evaluations_is_no_cheaper_for_leaving_one_over() -> None:
    """Heun has 10 evaluations where 11 were allowed; it is worse than what used all of them."""
    rows = rows_of({"heun": {11: 0.9}, "multistep": {11: 0.6}}, spread=0.1)
    for row in rows:
        row["nfe"] = 10 if row["spec"] == "heun" else 11
    assert [r["spec"] for r in pareto_front(rows)] == ["multistep"]


def test_the_front_against_seconds_is_another() -> None:
    rows = rows_of(
        {"cheap": {10: 2.0, 20: 1.0}, "dear": {10: 1.5, 20: 0.5}}, seconds={"dear": 100.0}
    )
    assert [(r["spec"], r["nfe"]) for r in pareto_front(rows, "seconds")] == [
        ("cheap", 10),
        ("cheap", 20),
        ("dear", 20),
    ]
    assert [(r["spec"], r["nfe"]) for r in pareto_front(rows)] == [("dear", 10), ("dear", 20)]


def test_higher_is_better_where_it_is() -> None:
    rows = rows_of({"a": {10: 0.9}, "b": {10: 0.5}})
    for row in rows:
        row["primary"] = "accuracy"
        for key in ("metrics", "by_repeat", "floor_by_repeat"):
            row[key] = {"accuracy": row[key]["energy"]}
    assert difference(rows[0], rows[1]).value == pytest.approx(0.4, abs=0.02)
    assert [r["spec"] for r in pareto_front(rows)] == ["a"]


def test_older_rows_and_failed_ones_resolve_nothing() -> None:
    rows = rows_of({"a": {10: 0.5}, "b": {10: 3.0}})
    for row in rows:
        for key in ("by_repeat", "floor_by_repeat", "intervals", "rank"):
            del row[key]
    advice = advise(rows)
    assert advice.panels[0].recommended == ()
    failed = [{**row, "status": "failed", "metrics": {}} for row in rows]
    assert advise(failed).lines == ("nothing to advise on: no row is finished",)
    assert advise([]).panels == ()
