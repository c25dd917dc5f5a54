"""A sampler's law of error: its order with an interval, where it holds, and what it predicts.

In its asymptotic region a sampler's error is ``constant * steps ** -order``. The region is found by
this rule: it holds the finest grids whose error is above the floor, at least three; from there a
coarser grid belongs to it as long as the slope between it and the next one agrees with the line
fitted to the grids found so far: within 0.2, a tenth of the order, or three standard errors of
the difference, whichever is most.

The interval of the line has two parts. Sampling: the line is fitted again to each bootstrap
replicate of the errors, whose grids are resampled together. Lack of fit: the scatter about the line
beyond what sampling explains, by Student's t with two degrees of freedom fewer than grids; higher
terms of the error show there, which no number of samples removes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sde_diffusion.errors import require_finite

__all__ = ["ErrorLaw", "Needed", "evaluations_text", "fit_law"]

LEAST = 3  # grids of a region
AGREE, AGREE_PART = 0.2, 0.1  # of slopes: so much, or such a part of the order
LEVEL = 0.95
_FARTHEST = 1e9  # steps beyond which nothing is predicted


@dataclass(frozen=True)
class Needed:
    """Evaluations for a wanted error.

    Attributes:
        nfe, low, high: and the ends of the 95 % interval; infinite where the law never gets there.
        how: "measured": between two measured grids; "fitted": inside the region; "extrapolated":
            finer than all grids; "reached": at the coarsest grid already.
    """

    nfe: float
    low: float
    high: float
    how: str


def evaluations_text(needed: Needed) -> str:
    """Evaluations for a wanted error: "37 (35–39)"."""

    def short(n: float) -> str:
        return f"{n:.0f}" if n < 1e5 else f"{n:.1e}" if math.isfinite(n) else "never"

    if needed.how == "reached":
        return f"≤ {short(needed.nfe)}"
    star = "*" if needed.how == "extrapolated" else ""
    return f"{short(needed.nfe)}{star} ({short(needed.low)}–{short(needed.high)})"


@dataclass(frozen=True)
class ErrorLaw:
    """``log error = intercept - order * log steps`` on grids of ``first`` to ``last`` steps.

    Attributes:
        order_low, order_high: 95 % interval of the order.
        cost, offset: evaluations are ``cost * steps + offset``.
    """

    order: float
    order_low: float
    order_high: float
    first: int
    last: int
    intercept: float
    steps: tuple[int, ...]
    errors: tuple[float, ...]
    cost: float
    offset: float
    sampling: np.ndarray  # (2, 2) covariance of intercept and order over the bootstrap's lines
    scatter: float  # beyond sampling, standard deviation of one grid's log error

    def error(self, steps: float) -> float:
        """The fitted error at a number of steps."""
        return math.exp(self.intercept - self.order * math.log(steps))

    def band(self, steps: float) -> tuple[float, float]:
        """The 95 % interval of the fitted error at a number of steps."""
        x = math.log(steps)
        centre, half = self.intercept - self.order * x, float(self._half(np.array(x)))
        return math.exp(centre - half), math.exp(centre + half)

    def needed(self, wanted: float) -> Needed:
        """Evaluations for an error of ``wanted``.

        Raises:
            ValueError: ``wanted`` is not above 0.
        """
        require_finite("--wanted", wanted, above=0.0)
        if self.errors[0] <= wanted:
            nfe = self._nfe(self.steps[0])
            return Needed(nfe, nfe, nfe, "reached")
        if wanted > self.error(self.first):
            return self._between(wanted)
        steps = math.exp((self.intercept - math.log(wanted)) / self.order)
        low = self._inverse(wanted, lower=True)
        high = self._inverse(wanted, lower=False)
        how = "fitted" if steps <= self.last else "extrapolated"
        return Needed(self._nfe(steps), self._nfe(low), self._nfe(high), how)

    def _between(self, wanted: float) -> Needed:
        """Log-log between measured grids, coarser than the region; as wide as those two."""
        k = next((i for i, e in enumerate(self.errors) if e <= wanted), len(self.errors) - 1)
        (n0, n1), (e0, e1) = self.steps[k - 1 : k + 1], self.errors[k - 1 : k + 1]
        part = math.log(e0 / wanted) / math.log(e0 / e1) if e1 < e0 else 1.0
        steps = n0 * (n1 / n0) ** min(part, 1.0)
        return Needed(self._nfe(steps), self._nfe(n0), self._nfe(n1), "measured")

    def _inverse(self, wanted: float, *, lower: bool) -> float:
        """Where the band's lower or upper end comes down to ``wanted``."""
        grid = np.geomspace(1.0, _FARTHEST, 4000)
        sign = -1.0 if lower else 1.0
        logs = np.log(grid)
        ends = self.intercept - self.order * logs + sign * self._half(logs)
        below = np.flatnonzero(ends <= math.log(wanted))
        return float(grid[below[0]]) if len(below) else math.inf

    def _nfe(self, steps: float) -> float:
        if not math.isfinite(steps):
            return steps
        return self.cost * max(1, math.ceil(steps - 1e-9)) + self.offset

    def _half(self, x: np.ndarray) -> np.ndarray:
        """Half the width of the interval of log error, at logarithms of steps."""
        (aa, ap), (_, pp) = self.sampling
        sampling = _NORMAL * np.sqrt(np.maximum(aa - 2 * ap * x + pp * x**2, 0.0))
        inside = [math.log(n) for n in self.steps if self.first <= n <= self.last]
        away = x - sum(inside) / len(inside)
        leverage = 1 / len(inside) + away**2 / _spread(inside)
        fit = _student(len(inside) - 2) * self.scatter * np.sqrt(leverage)
        return np.asarray(np.hypot(sampling, fit))


def fit_law(
    steps: Sequence[int],
    errors: Sequence[float],
    replicates: np.ndarray,
    *,
    floor: float = 0.0,
    nfe: Sequence[float] | None = None,
) -> ErrorLaw | None:
    """The law of a sampler's errors, or None where no region is found.

    Args:
        steps: numbers of steps, increasing.
        errors: one error each; those not finite, or at most three times ``floor``, are left out.
        replicates: (R, K) errors of bootstrap replicates, R >= 2.
        floor: where the error stops falling for another reason (rounding, Monte Carlo).
        nfe: evaluations at each number of steps; the steps themselves by default.
    """
    usable = [k for k, e in enumerate(errors) if math.isfinite(e) and e > max(3 * floor, 0.0)]
    if len(usable) < LEAST:
        return None
    x = np.log(np.asarray(steps, dtype=np.float64)[usable])
    y = np.log(np.asarray(errors, dtype=np.float64)[usable])
    with np.errstate(divide="ignore"):
        copies = np.log(np.asarray(replicates, dtype=np.float64)[:, usable])
    copies = np.maximum(copies, y - 3.0)  # a replicate of a weak error may be zero
    start = _region(x, y, copies)
    if start is None:
        return None
    x, y, copies = x[start:], y[start:], copies[:, start:]
    intercept, order = (float(values[0]) for values in _fit(x, y[None]))
    sampling = np.cov(np.stack(_fit(x, copies)))
    scatter = _beyond_sampling(x, y, copies, intercept, order)
    half = math.hypot(
        _NORMAL * math.sqrt(sampling[1, 1]), _student(len(x) - 2) * scatter / math.sqrt(_spread(x))
    )
    counts = [int(steps[k]) for k in usable]
    costs = [float(n) for n in (counts if nfe is None else [nfe[k] for k in usable])]
    cost = (costs[-1] - costs[-2]) / (counts[-1] - counts[-2])
    return ErrorLaw(
        order,
        order - half,
        order + half,
        counts[start],
        counts[-1],
        intercept,
        tuple(counts),
        tuple(float(errors[k]) for k in usable),
        cost,
        costs[-1] - cost * counts[-1],
        sampling,
        scatter,
    )


def _region(x: np.ndarray, y: np.ndarray, copies: np.ndarray) -> int | None:
    """The coarsest grid of the region; None where the three finest do not agree."""
    start = len(x) - LEAST
    if not _agrees(x, y, copies, start, start + 1):
        return None
    while start > 0 and _agrees(x, y, copies, start - 1, start):
        start -= 1
    return start


def _agrees(x: np.ndarray, y: np.ndarray, copies: np.ndarray, k: int, start: int) -> bool:
    """Whether the slope from grid ``k`` to the next one is that of the grids from ``start``."""

    def difference(values: np.ndarray) -> np.ndarray:
        local = (values[:, k] - values[:, k + 1]) / (x[k + 1] - x[k])
        return np.asarray(local - _fit(x[start:], values[:, start:])[1])

    found = abs(float(difference(y[None])[0]))
    order = abs(float(_fit(x[start:], y[None, start:])[1][0]))
    return found <= max(AGREE, AGREE_PART * order, 3 * float(difference(copies).std()))


def _beyond_sampling(
    x: np.ndarray, y: np.ndarray, copies: np.ndarray, intercept: float, order: float
) -> float:
    """Standard deviation about the line that sampling does not explain; 0 where it explains all."""
    residual = y - (intercept - order * x)
    a, p = _fit(x, copies - y)
    expected = np.square(copies - y - (a[:, None] - p[:, None] * x)).sum(1).mean()
    return math.sqrt(max(0.0, float(residual @ residual) - float(expected)) / (len(x) - 2))


def _fit(x: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Intercepts and orders of least-squares lines through rows of ``values``."""
    dx = x - x.mean()
    orders = -(values @ dx) / (dx @ dx)
    return values.mean(1) + orders * x.mean(), orders


def _spread(x: Sequence[float] | np.ndarray) -> float:
    values = np.asarray(x, dtype=np.float64)
    return float(np.square(values - values.mean()).sum())


def _student(freedom: int) -> float:
    from scipy.stats import t

    return float(t.ppf(0.5 + LEVEL / 2, freedom))


_NORMAL = 1.959964
