"""SEEDS: exponential Runge-Kutta for the reverse SDE."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sde_diffusion.errors import require_between, require_count
from sde_diffusion.prediction import ScoreFn
from sde_diffusion.sde import SDE, NoiseLevel
from solvers.base import Coefficients, Solver, State, Step, Stepped
from solvers.exponential import constant_rate, interpolation_weights
from solvers.noise import Noise


class _Scheme(NamedTuple):
    """Stages as fractions of the step in half_log_snr; the factor on the weight of the last
    stage's newest x0."""

    fractions: tuple[float, ...]
    factor: float = 1.0


_SCHEMES = {
    1: _Scheme(()),
    2: _Scheme((1 / 2,)),
    # Ralston's nodes. With b = (2, 3, 4) / 9 and interpolation, a_32 would be 9/16; third order
    # needs b_3 a_32 c_2 = 1/6, a_32 = 3/4. Interpolation gives b itself for every h.
    3: _Scheme((1 / 2, 3 / 4), 4 / 3),
}


@dataclass(frozen=True)
class SEEDS(Solver):
    """SEEDS-1, -2, -3: stochastic exponential Runge-Kutta on the reverse SDE, order evaluations a
    step.

    With ``h = half_log_snr(u) - half_log_snr(t)`` and ``r = 1 + eta^2`` the reverse family is,
    exactly, ``x_u = sigma_u/sigma_t exp(-eta^2 h) x_t + alpha_u r int exp(-r (v_u - v)) x0(v) dv +
    N_u``; at eta = 1, that of Gonzalez et al. 2023 (arXiv:2305.14267), in data prediction.
    x0 is interpolated through the stages of the step. The noise of a stage at fraction c has its
    exact variance ``sigma_c^2 (1 - exp(-2 eta^2 c h))`` and its exact covariance with the noise of
    the whole step, as parts of one Brownian motion with the clock ``q_c = exp(2 eta^2 c h) - 1``:
    ``N_c = sigma_c exp(-eta^2 c h) (q_c/sqrt(q_1) z + sqrt(q_c (1 - q_c/q_1)) z_c)``.

    Order 3 is not the paper's SEEDS-3: with stages at 1/3 and 2/3 and the noises of one path the
    weak order is 2, for the last stage weighs its noise by 3/8 where 1/3 is due. Here the stages
    are at 1/2 and 3/4, and the parts ``z_c`` of their noises have half the correlation of a path.
    Mean and covariance on a Gaussian then have weak order 3; on other targets the noise is of weak
    order 2 and the drift of order 3. At eta = 0 order 2 is DPM-Solver++ 2S.

    Noise: slot 0 is the step's, slots 1 and 2 are the stages' own. Nothing depends on earlier
    steps.

    Args:
        order: 1 to 3.
        eta: at least 0; 1 is the reverse SDE, 0 the probability flow.
    """

    order: int = 2
    eta: float = 1.0

    def __post_init__(self) -> None:
        if require_count("order", self.order) not in _SCHEMES:
            raise ValueError(f"order must be 1, 2 or 3, got {self.order!r}")
        require_between("eta", self.eta, 0, math.inf)

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def stages(self, sde: SDE, start: NoiseLevel, end: NoiseLevel) -> tuple[NoiseLevel, ...]:
        ends = start.half_log_snr, end.half_log_snr
        fractions = _SCHEMES[self.order].fractions
        return tuple(sde.at(sde.time(torch.lerp(*ends, fraction))) for fraction in fractions)

    def coefficients(self, step: Step) -> Coefficients:
        """For each stage and the end: what multiplies x, each x0, and each normal."""
        start, rate = step.start, 1 + self.eta**2
        factor = _SCHEMES[self.order].factor
        nodes = [start.half_log_snr]
        rows = []
        for level in (*step.stages, step.end):
            v = level.half_log_snr
            kernel = constant_rate(rate, v)
            weights = list(interpolation_weights(nodes, start.half_log_snr, v, kernel))
            if level is not step.end and len(weights) == 2:
                weights[0] = weights[0] - (factor - 1) * weights[1]
                weights[1] = factor * weights[1]
            passed = v - start.half_log_snr
            keep = level.sigma / start.sigma * torch.exp(-(self.eta**2) * passed)
            rows.append((keep, tuple(level.alpha * w for w in weights)))
            nodes.append(v)
        spreads = self._spreads(step) if self.stochastic else [()] * len(rows)
        return tuple((*row, spread) for row, spread in zip(rows, spreads, strict=True))

    def _spreads(self, step: Step) -> list[tuple[Tensor, ...]]:
        """What multiplies the normals of slots 0, 1, ... at each stage and at the end."""
        h = step.end.half_log_snr - step.start.half_log_snr
        whole = self._lost(h)
        spreads: list[tuple[Tensor, ...]] = []
        shares: list[Tensor] = []  # of the variance at a stage, what the whole step's normal says
        for level in step.stages:
            passed = level.half_log_snr - step.start.half_log_snr
            lost = self._lost(passed)
            share = torch.exp(-2 * self.eta**2 * (h - passed)) * lost / whole
            deviation = level.sigma * torch.sqrt(lost)
            common, own = deviation * torch.sqrt(share), deviation * torch.sqrt(1 - share)
            if shares:
                # On a path, bridged between both ends, the correlation of the two stages is this.
                first = shares[0]
                bridge = torch.sqrt(first * (1 - share) / (share * (1 - first)))
                half = 0.5 * bridge
                spreads.append((common, own * half, own * torch.sqrt(1 - half**2)))
            else:
                spreads.append((common, own))
            shares.append(share)
        return [*spreads, (step.end.sigma * torch.sqrt(whole),)]

    def _lost(self, passed: Tensor) -> Tensor:
        return -torch.expm1(-2 * self.eta**2 * passed)

    def step(self, score_fn: ScoreFn, x: Tensor, step: Step, state: State, noise: Noise) -> Stepped:
        normals = [noise(x, step, slot) for slot in range(self.order if self.stochastic else 0)]
        estimates: list[Tensor] = []
        at, level = x, step.start
        for (keep, weights, spreads), target in zip(
            self.coefficients_of(step, x), (*step.stages, step.end), strict=True
        ):
            estimates.append(score_fn(at, level).x0)
            at, level = keep * x, target
            for weight, x0 in zip(weights, estimates, strict=True):
                at.addcmul_(weight, x0)
            for spread, z in zip(spreads, normals, strict=False):
                at.addcmul_(spread, z)
        return Stepped(at, state)
