"""Laws of error: intervals that cover, the region by its rule, and the evaluations they predict."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments import steps
from experiments.asymptotics import ErrorLaw, fit_law
from experiments.results import load_results

COUNTS = [8, 16, 32, 64, 128, 256]


def law_of(errors: np.ndarray, spread: float, seed: int, floor: float = 0.0) -> ErrorLaw | None:
    """Errors whose logarithms have been disturbed by ``spread``, and replicates that say so."""
    noise = spread * np.random.default_rng(seed).standard_normal((300, len(errors)))
    return fit_law(COUNTS, list(errors), errors * np.exp(noise), floor=floor)


def test_intervals_cover_the_order_the_error_and_the_evaluations() -> None:
    rng = np.random.default_rng(0)
    order, constant, spread, runs = 2.0, 3.0, 0.05, 400
    true = constant * np.array(COUNTS, dtype=float) ** -order
    wanted = 1e-3
    steps_needed = (constant / wanted) ** (1 / order)
    covered, found = np.zeros(3), 0
    for run in range(runs):
        law = law_of(true * np.exp(spread * rng.standard_normal(len(true))), spread, run)
        if law is None:
            continue
        found += 1
        needed = law.needed(wanted)
        low, high = law.band(100.0)
        covered += [
            law.order_low <= order <= law.order_high,
            low <= constant * 100.0**-order <= high,
            needed.low - 1 <= steps_needed <= needed.high,  # whole steps, rounded up
        ]
    assert found >= 0.98 * runs  # three standard errors: noise hides a region in 3 of 1,000
    # 95 % by the bootstrap, and a little more by the part for lack of fit, which is never negative;
    # 0.93 is 95 % less two standard errors of a share of 400.
    assert (covered / found >= 0.93).all(), covered / found
    assert (covered / found <= 0.995).all(), covered / found  # wider is no merit


def test_the_region_ends_where_the_slope_turns_and_where_the_floor_is() -> None:
    n = np.array(COUNTS, dtype=float)
    law = law_of(n**-2.0 + 40 * n**-4.0, 1e-4, 0)  # slopes 2.49, 2.15, 2.04, 2.01, 2.00
    assert law is not None
    assert law.first == 16
    assert law.last == 256
    assert law.order == pytest.approx(2.0, abs=0.1)
    assert law.order_low < 2.0 < law.order_high  # what no sample removes is in the interval
    floored = law_of(n**-2.0, 1e-4, 0, floor=1e-4)  # above 3e-4: up to 32 steps
    assert floored is not None
    assert (floored.first, floored.last) == (8, 32)
    assert law_of(np.array([1, 0.5, 0.1, 0.09, 0.01, 0.009]), 1e-4, 0) is None
    assert law_of(n**-2.0, 1e-4, 0, floor=1e-3) is None  # two grids are no region


def test_evaluations_are_of_the_solver_not_its_steps() -> None:
    n = np.array(COUNTS, dtype=float)
    law = fit_law(COUNTS, list(n**-2.0), np.stack([n**-2.0] * 3), nfe=[2 * c - 1 for c in COUNTS])
    assert law is not None
    assert law.needed(1e-4).nfe == 2 * 100 - 1  # Heun's last step costs one
    assert law.needed(1e-4).how == "fitted"
    assert law.needed(1e-6).how == "extrapolated"
    assert law.needed(1e-6).nfe == 2 * 1000 - 1
    assert law.needed(1.0).how == "reached"
    bent = law_of(n**-2.0 + 40 * n**-4.0, 1e-4, 0)
    assert bent is not None
    between = bent.needed(0.01)
    assert between.how == "measured"
    assert between.low == 8 <= between.nfe <= between.high == 16
    with pytest.raises(ValueError, match="--wanted"):
        law.needed(0.0)


class Silent:
    """No progress bar."""

    def start(self, total: float) -> None: ...

    def now(self, what: str) -> None: ...

    def done(self, amount: float) -> None: ...


def test_a_prediction_on_ring_comes_true(tmp_path: Path) -> None:
    """What 8 to 64 steps predict for an error, measured at the steps that were predicted."""
    options = steps.StepsOptions(sdes=["vp"], solvers=["probability_flow:method=euler"])
    plan = steps.make_plan(
        replace(options, counts=[8, 16, 32, 64], wanted=[8e-3], out=str(tmp_path))
    )
    _, (fitted,) = steps.run(plan, Silent())
    assert fitted.law is not None
    (needed,) = fitted.needed
    assert needed.how == "extrapolated"
    assert needed.low < needed.nfe < needed.high
    again = steps.make_plan(
        replace(options, counts=[64, int(needed.nfe)], out=str(tmp_path / "again"))
    )
    error = steps.run(again, Silent())[1][0].errors[int(needed.nfe)].value
    low, high = fitted.law.band(needed.nfe)
    assert low <= error <= high
    assert error == pytest.approx(8e-3, rel=0.1)
    row = load_results(tmp_path)["rows"][0]
    assert row["law"]["order"] == pytest.approx(fitted.law.order)
    assert row["law"]["wanted"][0]["nfe"] == needed.nfe
    assert math.isclose(row["law"]["order"], 1.0, abs_tol=0.1)
