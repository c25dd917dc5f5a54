"""The reverse diffusion predictor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sde_diffusion.prediction import ScoreFn
from solvers.base import Coefficients, Solver, State, Step, Stepped
from solvers.noise import Noise


@dataclass(frozen=True)
class ReverseDiffusion(Solver):
    """Reverse of the forward step, discretised alike (Song et al. 2021, arXiv:2011.13456, app. E).

    The forward step from end to start is ``x + (a - 1) x + G z`` with its exact ``a =
    alpha_start/alpha_end`` and ``G^2 = sigma_start^2 - a^2 sigma_end^2``; reversed, ``x <- (2 - a)
    x + G^2 score + G z``. On a DDPM table this is the paper's VP predictor, on a geometric ladder
    its VE predictor.
    """

    order = 1
    stochastic = True

    def coefficients(self, step: Step) -> Coefficients:
        start, end = step.start, step.end
        variance = -(start.sigma**2) * torch.expm1(2 * (start.half_log_snr - end.half_log_snr))
        return 2 - start.alpha / end.alpha, -variance / start.sigma, torch.sqrt(variance)

    def step(self, score_fn: ScoreFn, x: Tensor, step: Step, state: State, noise: Noise) -> Stepped:
        keep, pull, spread = self.coefficients_of(step, x)
        eps = score_fn(x, step.start).eps
        z = noise(x, step)
        return Stepped((keep * x).addcmul_(pull, eps).addcmul_(spread, z), state)
