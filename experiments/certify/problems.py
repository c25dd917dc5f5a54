"""Closed-form problems: exact targets, exact solutions, exact moments, for tests and certificates.

Nothing here is computed with the code under test beyond ``sde.at`` (which ``test_sde.py`` holds
against derivatives and quadrature) and, for ``affine_run``, the sampler that is being measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from sde_diffusion import SDE, GaussianMixture, NoiseLevel, Prediction
from sde_diffusion.prediction import ScoreFn
from solvers import Plan, RecordedNoise, sample
from solvers.base import Integrator, Solver


def uniform_grid(sde: SDE, steps: int, start: float | None = None) -> Tensor:
    """Decreasing times, uniform in log-SNR from ``start`` (``t_max``) to ``t_min``."""
    return warped_grid(sde, steps, start, bend=0.0)


def warped_grid(sde: SDE, steps: int, start: float | None = None, bend: float = 0.6) -> Tensor:
    """Decreasing times whose log-SNR steps change smoothly by the factor
    ``(1 + bend)/(1 - bend)``."""
    start = float(sde.t_max if start is None else start)
    low, high = (float(sde.at(t).half_log_snr) for t in (start, float(sde.t_min)))
    u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    u = u + bend * torch.sin(2 * torch.pi * u) / (2 * torch.pi)
    times = sde.time(low + (high - low) * u)
    times[0], times[-1] = start, float(sde.t_min)
    return times


# --- a single Gaussian: everything is known ------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """Mean ``(D,)`` and covariance ``(D, D)`` of a law, float64."""

    mean: Tensor
    covariance: Tensor

    def distance(self, other: Moments) -> float:
        """Largest difference in any entry, relative to the other's largest standard deviation."""
        scale = other.covariance.diagonal().max().sqrt()
        mean = (self.mean - other.mean).abs().max() / scale
        return float(
            torch.maximum(mean, (self.covariance - other.covariance).abs().max() / scale**2)
        )


@dataclass(frozen=True)
class GaussianProblem:
    """Data ``N(mean, covariance)`` under an SDE: marginals and solutions in closed form.

    With ``v = alpha^2 c + sigma^2`` along an eigenvector of variance c, a path of the reverse
    family ``dx = [f x - (1 + eta^2)/2 g^2 score] dt + eta g dw`` has ``x - alpha m`` multiplied,
    from t to u, by ``sqrt(v_u/v_t) ((v_u/alpha_u^2) / (v_t/alpha_t^2))^(eta^2/2)``, plus noise
    which is such that the marginal stays the marginal: ``v' = 2 f v + g^2`` gives both.
    """

    sde: SDE
    mean: Tensor = field(
        default_factory=lambda: torch.tensor([0.5, -0.3], dtype=torch.float64), compare=False
    )
    covariance: Tensor = field(
        default_factory=lambda: torch.tensor([[0.8, 0.3], [0.3, 0.4]], dtype=torch.float64),
        compare=False,
    )

    @property
    def dimension(self) -> int:
        return len(self.mean)

    @property
    def target(self) -> GaussianMixture:
        return GaussianMixture(self.mean[None], self.covariance[None])

    @property
    def score_fn(self) -> ScoreFn:
        """The exact score, by a linear solve and none of ``targets.py``."""
        eye = torch.eye(self.dimension, dtype=torch.float64)

        def score(x: Tensor, level: NoiseLevel) -> Prediction:
            alpha, sigma = level.alpha.double(), level.sigma.double()
            if alpha.ndim == 0:
                alpha, sigma = alpha.expand(len(x)), sigma.expand(len(x))
            covariance = alpha[:, None, None] ** 2 * self.covariance + (
                sigma[:, None, None] ** 2 * eye
            )
            offset = x.double() - alpha[:, None] * self.mean
            pull = torch.linalg.solve(covariance, offset[:, :, None])[:, :, 0]
            return Prediction.from_score(x, level, -pull.to(x.dtype))

        return score

    def prior(self) -> Moments:
        """The law that ``sample(shape=...)`` starts from."""
        eye = torch.eye(self.dimension, dtype=torch.float64)
        return Moments(torch.zeros_like(self.mean), self.sde.prior_std().double() ** 2 * eye)

    def marginal(self, t: float) -> Moments:
        """The law of x_t."""
        level = self.sde.at(float(t))
        eye = torch.eye(self.dimension, dtype=torch.float64)
        return Moments(
            level.alpha * self.mean, level.alpha**2 * self.covariance + level.sigma**2 * eye
        )

    def exact_affine_map(self, start: float, end: float, eta: float = 0.0) -> tuple[Tensor, Tensor]:
        """``(A, b)``: the exact solution at ``end`` from x at ``start`` is ``A x + b`` (plus noise
        of covariance ``V_end - A V_start A^T`` where eta > 0)."""
        before, after = self.sde.at(float(start)), self.sde.at(float(end))
        variances, axes = torch.linalg.eigh(self.covariance)
        v_before = before.alpha**2 * variances + before.sigma**2
        v_after = after.alpha**2 * variances + after.sigma**2
        ratio = v_after / v_before
        factor = ratio.sqrt() * (ratio * (before.alpha / after.alpha) ** 2) ** (0.5 * eta**2)
        matrix = axes @ torch.diag(factor) @ axes.T
        return matrix, after.alpha * self.mean - before.alpha * (matrix @ self.mean)

    def exact_flow(self, x: Tensor, start: float, end: float) -> Tensor:
        """The probability-flow solution at ``end`` from ``x`` ``(B, D)`` at ``start``."""
        matrix, offset = self.exact_affine_map(start, end)
        return (x.double() @ matrix.T + offset).to(x.dtype)

    def exact_moments(self, moments: Moments, start: float, end: float, eta: float) -> Moments:
        """The law at ``end`` of the reverse family's exact solution that has ``moments`` at
        ``start`` (the marginal's, or the prior's)."""
        matrix, offset = self.exact_affine_map(start, end, eta)
        excess = moments.covariance - self.marginal(start).covariance
        return Moments(
            matrix @ moments.mean + offset,
            self.marginal(end).covariance + matrix @ excess @ matrix.T,
        )


@dataclass(frozen=True)
class IsotropicScore:
    """Exact score of data ``N(mean, variance I)``, for an event of any shape."""

    mean: float = 0.3
    variance: float = 0.5

    def __call__(self, x: Tensor, level: NoiseLevel) -> Prediction:
        alpha, sigma = (
            c.to(x.dtype).reshape(c.shape + (1,) * (x.ndim - 1) * (c.ndim > 0))
            for c in (level.alpha, level.sigma)
        )
        score = -(x - alpha * self.mean) / (alpha**2 * self.variance + sigma**2)
        return Prediction.from_score(x, level, score)


# --- a linear sampler on a Gaussian: exact mean and covariance -----------------------------------


class NotAffineError(ValueError):
    """A sampler is not linear in state and noise on a Gaussian target."""


@dataclass(frozen=True)
class AffineRun:
    """A whole run of a linear sampler: ``x_end = matrix x_start + offset + sum gains[i] z_i``.

    Attributes:
        gains: by ``(step index, slot)``, ``(D, D)``.
    """

    matrix: Tensor
    offset: Tensor
    gains: dict[tuple[int, int], Tensor]

    def moments(self, start: Moments) -> Moments:
        """Exact mean and covariance at the end: no Monte Carlo."""
        covariance = self.matrix @ start.covariance @ self.matrix.T
        for gain in self.gains.values():
            covariance = covariance + gain @ gain.T
        return Moments(self.matrix @ start.mean + self.offset, covariance)


def affine_run(
    score_fn: ScoreFn,
    sde: SDE,
    solver: Solver | Integrator,
    times: Tensor | Sequence[float],
    dimension: int,
    slots: Sequence[int] = (0,),
    plan: Plan | None = None,
    tolerance: float = 1e-8,
) -> AffineRun:
    """Read off what a linear sampler does over a whole run, in one run of ``sample``.

    The batch holds the origin and each basis vector without noise, then the origin with one unit of
    noise in one direction, at one step, in one slot. Multistep methods are served too. The last two
    samples are a random state with random noise: if the sampler is not affine, they do not come out
    as predicted, and this raises.

    Args:
        slots: noise slots that the solver draws from (a corrector's are 1, 2, ...).
        plan: as for ``sample``.
        tolerance: by which those two samples may miss, absolute and relative.
    Raises:
        NotAffineError: the last two samples say so.
    """
    steps = len(times) - 1
    places = [(step, slot) for step in range(steps) for slot in slots]
    rows = 1 + dimension + len(places) * dimension
    x = torch.zeros(rows + 2, dimension, dtype=torch.float64)
    x[1 : 1 + dimension] = torch.eye(dimension, dtype=torch.float64)
    generator = torch.Generator().manual_seed(7)
    x[rows:] = torch.randn(2, dimension, generator=generator, dtype=torch.float64)
    draws = {}
    for k, place in enumerate(places):
        draws[place] = torch.zeros_like(x)
        first = 1 + dimension + k * dimension
        draws[place][first : first + dimension] = torch.eye(dimension, dtype=torch.float64)
        draws[place][rows:] = torch.randn(2, dimension, generator=generator, dtype=torch.float64)
    noise = RecordedNoise(draws)
    end = sample(score_fn, sde, solver, x=x.clone(), grid=times, noise=noise, plan=plan).x
    offset = end[0]
    matrix = (end[1 : 1 + dimension] - offset).T
    gains = {
        place: (end[1 + dimension * (k + 1) : 1 + dimension * (k + 2)] - offset).T
        for k, place in enumerate(places)
    }
    expected = x[rows:] @ matrix.T + offset
    for place, gain in gains.items():
        expected = expected + draws[place][rows:] @ gain.T
    if not torch.allclose(end[rows:], expected, rtol=tolerance, atol=tolerance):
        raise NotAffineError(f"{solver!r} is not affine: {end[rows:]} is not {expected}")
    return AffineRun(matrix, offset, gains)


# --- references and slopes -----------------------------------------------------------------------


def fine_flow(
    score_fn: ScoreFn, sde: SDE, x: Tensor, start: float, end: float, rtol: float = 1e-10
) -> Tensor:
    """The probability-flow ODE ``dx/dt = f x - g^2 score / 2`` by scipy's DOP853, in t itself.

    For targets without a closed solution, and for guided scores, whose law has none. Each sample
    is integrated with the others to the same tolerance; the result is float64. Slow on a
    tabulated SDE, whose f has a kink at every table time: give ``rtol=1e-6`` there.
    """
    shape = x.shape

    def slope(t: float, flat: np.ndarray) -> np.ndarray:
        state = torch.from_numpy(flat).reshape(shape)
        level = sde.at(float(t))
        drift = level.f * state - 0.5 * level.g2 * score_fn(state, level).score
        return drift.detach().reshape(-1).numpy()

    first = x.detach().double().reshape(-1).numpy()
    solved = solve_ivp(slope, (start, end), first, method="DOP853", rtol=rtol, atol=1e-2 * rtol)
    if not solved.success:
        raise RuntimeError(f"the reference was not reached: {solved.message}")
    return torch.from_numpy(solved.y[:, -1].copy()).reshape(shape)


def fitted_order(steps: Sequence[int], errors: Sequence[float], finest: int = 3) -> float:
    """Order of convergence: minus the log-log slope of error against steps on the finest grids.

    Args:
        finest: how many of the grids with the most steps the line is fitted to, at least 2.
    Raises:
        ValueError: an error that is zero or not finite, where a slope means nothing.
    """
    if not 2 <= finest <= len(steps) == len(errors):
        raise ValueError(f"cannot fit {finest} of {len(steps)} steps, {len(errors)} errors")
    if not all(np.isfinite(e) and e > 0 for e in errors):
        raise ValueError(f"errors must be positive and finite, got {list(errors)}")
    chosen = sorted(zip(steps, errors, strict=True))[-finest:]
    n, e = np.log(np.array(chosen, dtype=float)).T
    return float(-np.polyfit(n, e, 1)[0])


def measured_order(
    error_at: Callable[[int], float], steps: Sequence[int], finest: int = 3
) -> float:
    """``fitted_order`` of ``error_at(n)`` over ``steps``."""
    return fitted_order(steps, [error_at(n) for n in steps], finest)
