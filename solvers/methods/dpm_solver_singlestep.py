"""Singlestep DPM-Solver++: exponential Runge-Kutta on the data prediction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sde_diffusion.errors import require_count
from sde_diffusion.prediction import ScoreFn
from sde_diffusion.sde import SDE, NoiseLevel
from solvers.base import Coefficients, Solver, State, Step, Stepped
from solvers.exponential import constant_rate, interpolation_weights
from solvers.noise import Noise

_FRACTIONS = {2: (1 / 2,), 3: (1 / 3, 2 / 3)}


@dataclass(frozen=True)
class DPMSolverSinglestep(Solver):
    """DPM-Solver++ 2S and 3S: exponential Runge-Kutta in half log-SNR, order evaluations a step.

    With ``v = half_log_snr`` the probability flow is, exactly, ``x_u = sigma_u/sigma_t x_t +
    alpha_u int x0(v) exp(v - v_u) dv`` (Lu et al. 2022, arXiv:2211.01095, eq. 8). Each stage and
    the end integrate the polynomial in v through the x0 found so far in this step. 2S has its stage
    at the middle; 3S at one and two thirds, as DPM-Solver-3 (arXiv:2206.00927, alg. 2). As ``h ->
    0`` the weights are those of the midpoint rule and of Heun's third-order rule; for every h they
    satisfy ``sum_i b_i c_i^j = j! phi_(j+1)(-h)``, j < order, so the order is 2 and 3, and an x0
    that is a polynomial in v is integrated without error. The published 2S and 3S drop the terms of
    these sums that higher orders do not need.

    A one-step run is one such step; nothing depends on earlier steps.

    Args:
        order: 2 or 3.
    """

    order: int = 3
    stochastic = False

    def __post_init__(self) -> None:
        if require_count("order", self.order) not in _FRACTIONS:
            raise ValueError(f"order must be 2 or 3 (1 is DDIM), got {self.order!r}")

    def stages(self, sde: SDE, start: NoiseLevel, end: NoiseLevel) -> tuple[NoiseLevel, ...]:
        ends = start.half_log_snr, end.half_log_snr
        return tuple(
            sde.at(sde.time(torch.lerp(*ends, fraction))) for fraction in _FRACTIONS[self.order]
        )

    def coefficients(self, step: Step) -> Coefficients:
        """For each stage and the end: what multiplies x, then what multiplies each x0."""
        start = step.start
        nodes = [start.half_log_snr]
        rows = []
        for level in (*step.stages, step.end):
            v = level.half_log_snr
            weights = interpolation_weights(nodes, start.half_log_snr, v, constant_rate(1.0, v))
            rows.append((level.sigma / start.sigma, *(level.alpha * w for w in weights)))
            nodes.append(v)
        return tuple(rows)

    def step(self, score_fn: ScoreFn, x: Tensor, step: Step, state: State, noise: Noise) -> Stepped:
        estimates: list[Tensor] = []
        at, level = x, step.start
        for row, target in zip(
            self.coefficients_of(step, x), (*step.stages, step.end), strict=True
        ):
            estimates.append(score_fn(at, level).x0)
            at, level = row[0] * x, target
            for weight, x0 in zip(row[1:], estimates, strict=True):
                at.addcmul_(weight, x0)
        return Stepped(at, state)
