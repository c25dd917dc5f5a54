"""The measured order of a sampler: the slope of its error against its number of steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Slope(NamedTuple):
    """``error = constant * steps ** -order``, fitted to grids of ``first`` to ``last`` steps."""

    order: float
    stderr: float | None
    constant: float
    first: int
    last: int

    def error(self, steps: float) -> float:
        """The fitted error at a number of steps."""
        return self.constant * steps**-self.order


def fit_slope(
    steps: Sequence[int], errors: Sequence[float], *, floor: float = 0.0, points: int | None = None
) -> Slope | None:
    """Least squares in log–log on the finest grids whose error is still above the floor.

    Args:
        steps: numbers of steps.
        errors: one error each; those not finite, or at most three times ``floor``, are left out.
        floor: where the error stops falling for another reason (rounding, Monte Carlo).
        points: how many of the finest grids; by default half of them, at least three.
    Returns:
        The slope (its standard error None from two grids), or None if fewer than two are left.
    """
    usable = sorted(
        (n, e)
        for n, e in zip(steps, errors, strict=True)
        if math.isfinite(e) and e > max(3 * floor, 0.0)
    )
    count = max(3, (len(usable) + 1) // 2) if points is None else points
    usable = usable[-count:]
    if len({n for n, _ in usable}) < 2:
        return None
    x, y = (np.log(np.asarray(column, dtype=np.float64)) for column in zip(*usable, strict=True))
    dx = x - x.mean()
    slope = float(dx @ y / (dx @ dx))
    intercept = float(y.mean() - slope * x.mean())
    residual = y - (intercept + slope * x)
    stderr = (
        math.sqrt(float(residual @ residual) / (len(x) - 2) / float(dx @ dx))
        if len(x) > 2
        else None
    )
    return Slope(-slope, stderr, math.exp(intercept), usable[0][0], usable[-1][0])
