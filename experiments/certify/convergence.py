"""Orders of convergence as slopes, and the rows they make in a certificate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from experiments.certify.bench import ROUNDING
from experiments.certify.certificate import TOLERANCE, Check, Curve, Sizes
from experiments.certify.problems import fitted_order

FINEST = 3  # grids that a slope is fitted to
_FIRST_STEPS = {1: 64, 2: 100, 3: 120}  # of those three, by declared order; above: as order 3
_LARGEST_ERROR = {1: 0.2, 2: 0.05}  # of the finest grid, in standard deviations; above: 0.02


def converge(
    error_at: Callable[[int], float],
    problem: str,
    declared: float,
    sizes: Sizes,
    floor: float = ROUNDING,
    most: int | None = None,
) -> Curve:
    """Errors on three grids, each twice as fine, and their slope.

    Where the slope misses the declared order the grids are refined, up to ``sizes.most`` steps:
    the slope of the finest counts. Where errors come down to ten times the floor, coarser grids
    are taken.
    """
    most = sizes.most if most is None else most
    first = max(8, int(_FIRST_STEPS.get(int(declared), _FIRST_STEPS[3]) * sizes.scale))
    first = min(first, most // 4)
    errors: dict[int, float] = {}
    slope: float | None
    coarsened = False
    while True:
        steps = [first * 2**k for k in range(FINEST)]
        for n in steps:
            if n not in errors:
                errors[n] = error_at(n)
        finest = [errors[n] for n in steps]
        if not all(map(math.isfinite, finest)):
            slope = -math.inf
            break
        if finest[-1] < 10 * floor:
            if first >= 12:
                first, coarsened = first // 2, True
                continue
            slope = None
            break
        slope = fitted_order(steps, finest, FINEST)
        if slope >= declared - TOLERANCE or coarsened or 8 * first > most:
            break
        first *= 2
    n_all = tuple(sorted(errors))
    return Curve(problem, n_all, tuple(errors[n] for n in n_all), declared, slope)


def order_check(key: str, name: str, declared: float, curves: Sequence[Curve]) -> Check:
    ordered = sorted(curves, key=lambda c: math.inf if c.slope is None else c.slope)
    worst = ordered[0]
    measured = "exact" if worst.slope is None else f"{worst.slope:.2f}"
    if worst.slope == -math.inf:
        measured = "not finite"
    note = f"worst on {worst.problem}, {worst.steps[-3]}–{worst.steps[-1]} steps"
    passed = all(curve.passed for curve in curves)
    return Check(key, name, f"{declared:g}", measured, passed, note, tuple(ordered))


def limit_check(declared: float, curves: Sequence[Curve]) -> Check:
    """The error on the finest grid: references share nothing with solvers, so it says where a
    solver goes."""
    worst = max(curves, key=lambda c: c.errors[-1] if math.isfinite(c.errors[-1]) else math.inf)
    allowed = _LARGEST_ERROR.get(int(declared), 0.02)
    error = worst.errors[-1]
    passed = math.isfinite(error) and error <= allowed
    note = f"worst on {worst.problem}, {worst.steps[-1]} steps; in standard deviations"
    return Check(
        "limit", "limit: error on the finest grid", f"≤ {allowed:g}", f"{error:.1e}", passed, note
    )
