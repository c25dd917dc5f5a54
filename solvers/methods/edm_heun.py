"""EDM's stochastic sampler: a little noise back in, then a Heun step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sde_diffusion.errors import require_between
from sde_diffusion.prediction import ScoreFn
from sde_diffusion.sde import SDE, NoiseLevel
from solvers.base import Coefficients, Solver, State, Step, Stepped
from solvers.noise import Noise

_LARGEST_GAMMA = math.sqrt(2) - 1


@dataclass(frozen=True)
class EDMHeun(Solver):
    """Heun on the probability flow with churn: noise is raised by 1 + gamma before each step.

    Karras et al. 2022 (arXiv:2206.00364, alg. 2), in ``y = x / alpha``, ``s = sigma / alpha``,
    where every linear SDE's flow is ``dy/ds = eps``:

        s' = s (1 + gamma),   y' = y + s_noise sqrt(s'^2 - s^2) z,   Heun from s' to the end,
        gamma = min(s_churn / N, sqrt(2) - 1) where s_tmin <= s <= s_tmax, else 0.

    N is the number of steps of the run. Differences from the paper's code: s' never exceeds the
    SDE's own ``t_max`` level, where the score is defined, so that a step from ``t_max`` has no
    churn; and the last step, which ends at ``t_min`` and not at zero noise, is a Heun step too. At
    ``s_churn = 0`` this is ``ProbabilityFlow("heun")`` and draws no noise. Raising the noise
    keeps the marginal law exactly, so the weak order is 2 where ``s_noise = 1`` (another moves the
    limit), from some ``2.4 s_churn`` steps on: with fewer, gamma sits at its bound, every step
    puts in as much noise as the one before, and more steps help only by half as much.

    A ``Step`` made by hand, outside a run, is churned as a run of as many steps as its fields have
    entries: one, if they are 0-d.

    Args:
        s_churn: at least 0; 0 is deterministic.
        s_tmin, s_tmax: range of ``sigma / alpha`` in which there is churn.
        s_noise: deviation of the noise put in, 1 in theory; EDM took 1.003 to 1.007.
    """

    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0
    order = 2

    def __post_init__(self) -> None:
        require_between("s_churn", self.s_churn, 0, math.inf)
        require_between("s_tmin", self.s_tmin, 0, math.inf)
        require_between("s_noise", self.s_noise, 0, math.inf)
        if not self.s_tmax >= self.s_tmin:
            raise ValueError(f"s_tmax must be at least s_tmin={self.s_tmin!r}, got {self.s_tmax!r}")

    @property
    def stochastic(self) -> bool:
        return self.s_churn > 0

    def stages(self, sde: SDE, start: NoiseLevel, end: NoiseLevel) -> tuple[NoiseLevel, ...]:
        """The churned level, if there is churn."""
        if not self.stochastic:
            return ()
        count = max(1, start.t.numel())
        raised = math.log1p(min(self.s_churn / count, _LARGEST_GAMMA))
        s, v = start.sigma_over_alpha, start.half_log_snr
        lowest = sde.at(float(sde.t_max)).half_log_snr.to(v)
        churned = (s >= self.s_tmin) & (s <= self.s_tmax) & (v > lowest)
        inside = sde.at(sde.time(torch.maximum(v - raised, lowest)))
        pairs = zip(inside, start, strict=True)
        return (NoiseLevel(*(torch.where(churned, *pair) for pair in pairs)),)

    def coefficients(self, step: Step) -> Coefficients:
        """What multiplies x and z at the churned level; then, for the Euler and the Heun state,
        what multiplies that x and the slopes."""
        start, end = step.start, step.end
        churned = step.stages[0] if step.stages else start
        span = end.sigma_over_alpha - churned.sigma_over_alpha
        ratio, slope = end.alpha / churned.alpha, end.alpha * span
        flow = ratio, slope, 0.5 * slope
        if not self.stochastic:
            return flow
        # s'^2 - s^2 by expm1: near t_max, or with many steps, the two are nearly equal.
        added = torch.expm1(2 * (start.half_log_snr - churned.half_log_snr)).clamp(min=0)
        spread = self.s_noise * churned.alpha * start.sigma_over_alpha * torch.sqrt(added)
        return *flow, churned.alpha / start.alpha, spread

    def step(self, score_fn: ScoreFn, x: Tensor, step: Step, state: State, noise: Noise) -> Stepped:
        ratio, slope, half, *churn = self.coefficients_of(step, x)
        level = step.start
        if churn:
            raised, spread = churn
            z = noise(x, step)
            x, level = (raised * x).addcmul_(spread, z), step.stages[0]
        first = score_fn(x, level).eps
        scaled = ratio * x
        second = score_fn(torch.addcmul(scaled, slope, first), step.end).eps
        return Stepped(scaled.addcmul_(half, first).addcmul_(half, second), state)
