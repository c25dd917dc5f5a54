"""The scale of guidance at which a solver breaks.

A solver without noise is compared, sample by sample, with the fine solution of the same guided ODE
from the same noise. It breaks where the RMS distance, over the data's own RMS deviation, first
exceeds a tolerance: samples are then no longer those that the guided equation has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from sde_diffusion.errors import require_finite

__all__ = ["Breaking", "breaking_scale"]

REPLICATES = 400
LEVEL = 0.95


class Breaking(NamedTuple):
    """Where an error first exceeds the tolerance.

    Attributes:
        scale: gamma; minus infinity: it does so at the smallest scale already; infinity: at none.
        low, high: 95 % interval, by the bootstrap over samples; infinite as ``scale`` may be.
    """

    scale: float
    low: float
    high: float


def breaking_scale(
    scales: Sequence[float],
    distances: Sequence[np.ndarray | None],
    tolerance: float,
    *,
    seed: int = 0,
) -> Breaking:
    """The scale from which the RMS of ``distances`` exceeds ``tolerance``.

    Between two scales the logarithm of the error is taken as linear. The same samples, from the
    same noise, stand at the same place for every scale and are resampled together.

    Args:
        scales: increasing.
        distances: (n,) each, in the data's deviations; None where the solver failed, which
            exceeds any tolerance.
        tolerance: above 0.
        seed: of the bootstrap.
    Raises:
        ValueError: scales not increasing, or arrays of different sizes.
    """
    require_finite("tolerance", tolerance, above=0.0)
    if not scales or any(b <= a for a, b in pairwise(scales)):
        raise ValueError(f"scales must increase, got {list(scales)}")
    sizes = {len(d) for d in distances if d is not None}
    if len(scales) != len(distances) or len(sizes) > 1:
        raise ValueError(
            f"distances must be one array per scale, of one size; got {len(distances)} for "
            f"{len(scales)} scales, of sizes {sorted(sizes)}"
        )
    n = sizes.pop() if sizes else 1
    squares = np.stack([np.full(n, np.inf) if d is None else np.square(d) for d in distances])
    chosen = np.random.default_rng(seed).integers(0, n, (REPLICATES, n))
    found = [_crossing(scales, squares[:, rows].mean(1), tolerance) for rows in chosen]
    tail = (1 - LEVEL) / 2
    low, high = (float(np.quantile(found, q, method="inverted_cdf")) for q in (tail, 1 - tail))
    return Breaking(_crossing(scales, squares.mean(1), tolerance), low, high)


def _crossing(scales: Sequence[float], mean_squares: np.ndarray, tolerance: float) -> float:
    errors = np.sqrt(mean_squares)
    above = np.flatnonzero(~(errors <= tolerance))  # NaN exceeds any tolerance
    if len(above) == 0:
        return math.inf
    k = int(above[0])
    if k == 0:
        return -math.inf
    if not np.isfinite(errors[k]) or errors[k - 1] == 0:
        return float(scales[k])
    before, after = math.log(errors[k - 1]), math.log(errors[k])
    part = (math.log(tolerance) - before) / (after - before)
    return float(scales[k - 1] + part * (scales[k] - scales[k - 1]))
