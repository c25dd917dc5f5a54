"""Euler-Maruyama on the reverse family of SDEs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sde_diffusion.errors import require_between
from sde_diffusion.prediction import ScoreFn
from solvers.base import Coefficients, Solver, State, Step, Stepped
from solvers.noise import Noise


@dataclass(frozen=True)
class EulerMaruyama(Solver):
    """Euler-Maruyama on dx = [f x - (1 + eta^2)/2 g^2 score] dt + eta g dw; eta = 1 is Anderson's
    reverse SDE.

    Every eta has the same marginals when the score is exact; 0 is the probability-flow ODE by
    Euler's method in t (Song et al. 2021, arXiv:2011.13456, eq. 6 and 13; Huang et al. 2021,
    arXiv:2106.02808). The noise is additive, so the strong order is 1 as well.

    Args:
        eta: at least 0.
    """

    eta: float = 1.0
    order = 1

    def __post_init__(self) -> None:
        require_between("eta", self.eta, 0, float("inf"))

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def coefficients(self, step: Step) -> Coefficients:
        start = step.start
        h = start.t - step.end.t
        pull = -0.5 * (1 + self.eta**2) * start.g2 * h / start.sigma
        return 1 - start.f * h, pull, self.eta * torch.sqrt(start.g2 * h)

    def step(self, score_fn: ScoreFn, x: Tensor, step: Step, state: State, noise: Noise) -> Stepped:
        keep, pull, spread = self.coefficients_of(step, x)
        eps = score_fn(x, step.start).eps
        x_next = (keep * x).addcmul_(pull, eps)
        if self.stochastic:
            z = noise(x, step)
            x_next.addcmul_(spread, z)
        return Stepped(x_next, state)
