"""Pairs of stochastic Runge-Kutta methods on the reverse SDE, for adaptive steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sde_diffusion.prediction import ScoreFn
from sde_diffusion.sde import SDE, NoiseLevel
from solvers.base import Coefficients, Solver, State, Step, Stepped
from solvers.noise import AREA, Noise


@dataclass(frozen=True)
class ImprovedEuler(Solver):
    """Stochastic improved Euler on the reverse SDE in t, with Euler-Maruyama's result as its error.

    Jolicoeur-Martineau et al. 2021, arXiv:2105.14080, alg. 1: ``x' = x - [f x - g^2 score] h + g
    sqrt(h) z``, the same from x with drift and g of ``(x', t - h)``, and their mean is carried on.
    Two evaluations a step. The paper's control is ``Adaptive`` with its own constants: ``safety
    0.9``, a power 0.9 of the error in place of 2/3, and ``max`` in place of the sum of tolerances.
    """

    order = 2
    stochastic = True
    error_order = 1.5

    def coefficients(self, step: Step) -> Coefficients:
        h = step.start.t - step.end.t
        factors: list[Tensor] = []
        for level in (step.start, step.end):
            factors += [-level.f * h, -level.g2 * h / level.sigma, torch.sqrt(level.g2 * h)]
        return tuple(factors)

    def step(self, score_fn: ScoreFn, x: Tensor, step: Step, state: State, noise: Noise) -> Stepped:
        keep, pull, spread, keep_end, pull_end, spread_end = self.coefficients_of(step, x)
        z = noise(x, step)
        eps = score_fn(x, step.start).eps
        euler = (x + keep * x).addcmul_(pull, eps).addcmul_(spread, z)
        again = score_fn(euler, step.end).eps
        other = (x + keep_end * euler).addcmul_(pull_end, again).addcmul_(spread_end, z)
        error = 0.5 * (other - euler)
        return Stepped(euler + error, (), error)


@dataclass(frozen=True)
class SRA1(Solver):
    """Stochastic Runge-Kutta of strong order 1.5 for additive noise, with Euler-Maruyama embedded.

    In ``y = x / alpha`` over the clock ``u = (sigma / alpha)^2`` the reverse SDE is ``dy = -eps /
    sqrt(u) dtau + dB`` with ``tau = u_start - u``: its noise is additive and constant. The method
    is SRA1 (Roessler 2010, SIAM J. Numer. Anal. 48(3), table 6.3), whose second stage sees the
    step's space-time area; the estimate is its distance to the embedded method of strong order 1
    (Rackauckas & Nie 2017, DCDS-B 22(7)). Two evaluations a step.
    """

    order = 2
    stochastic = True
    error_order = 1.5

    def stages(self, sde: SDE, start: NoiseLevel, end: NoiseLevel) -> tuple[NoiseLevel, ...]:
        clock = torch.lerp(start.sigma_over_alpha**2, end.sigma_over_alpha**2, 0.75)
        return (sde.at(sde.time(-0.5 * torch.log(clock))),)

    def coefficients(self, step: Step) -> Coefficients:
        start, (stage,), end = step.start, step.stages, step.end
        first, inner = start.sigma_over_alpha, stage.sigma_over_alpha
        h = first**2 - end.sigma_over_alpha**2
        root = torch.sqrt(h)
        return (
            stage.alpha / start.alpha,
            -0.75 * h * stage.alpha / first,
            0.75 * root * stage.alpha,
            root * stage.alpha * (1.5 / math.sqrt(12)),
            end.alpha / start.alpha,
            -h * end.alpha / first,
            root * end.alpha,
            -2 / 3 * h * end.alpha / inner,
            2 / 3 * h * end.alpha / first,
        )

    def step(self, score_fn: ScoreFn, x: Tensor, step: Step, state: State, noise: Noise) -> Stepped:
        ratio, pull, spread, tilt, keep, drift, shake, late, early = self.coefficients_of(step, x)
        z, area = noise(x, step), noise(x, step, AREA)
        eps = score_fn(x, step.start).eps
        inner = (ratio * x).addcmul_(pull, eps).addcmul_(spread, z).addcmul_(tilt, area)
        again = score_fn(inner, step.stages[0]).eps
        euler = (keep * x).addcmul_(drift, eps).addcmul_(shake, z)
        error = (late * again).addcmul_(early, eps)
        return Stepped(euler + error, (), error)
