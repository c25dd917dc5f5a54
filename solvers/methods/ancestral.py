"""Ancestral sampling: DDPM on VP, SMLD on VE, one formula for both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sde_diffusion.errors import require_between, unknown_name
from sde_diffusion.prediction import ScoreFn
from solvers.base import Coefficients, Solver, State, Step, Stepped
from solvers.noise import Noise


@dataclass(frozen=True)
class Ancestral(Solver):
    """Exact posterior given the predicted x0 (DDPM, SMLD); eta scales its noise down to DDIM at 0.

    With ``h = half_log_snr(end) - half_log_snr(start)`` the posterior's variance is
    ``sigma_end^2 (1 - exp(-2h))`` (Ho et al. 2020, arXiv:2006.11239, eq. 7, for any linear SDE),
    and ``x <- alpha_end x0 + sqrt(sigma_end^2 - eta^2 var) eps + eta sqrt(var) z`` (Song, Meng &
    Ermon 2021, arXiv:2010.02502, eq. 12).

    Args:
        eta: in [0, 1].
        variance: ``small``, the posterior's; ``large``, the forward step's ``sigma_start^2 (1 -
            exp(-2h))``, DDPM's other choice, which fits data of unit variance and converges to the
            same limit.
    """

    eta: float = 1.0
    variance: Literal["small", "large"] = "small"
    order = 1

    def __post_init__(self) -> None:
        require_between("eta", self.eta, 0, 1)
        if self.variance not in ("small", "large"):
            raise unknown_name("variance", self.variance, ("small", "large"))

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def coefficients(self, step: Step) -> Coefficients:
        start, end = step.start, step.end
        h = end.half_log_snr - start.half_log_snr
        lost = torch.expm1(-2 * h)
        direction = end.sigma * (torch.sqrt(1 + self.eta**2 * lost) - torch.exp(h))
        if not self.stochastic:
            return end.alpha / start.alpha, direction
        sigma = end.sigma if self.variance == "small" else start.sigma
        return end.alpha / start.alpha, direction, self.eta * sigma * torch.sqrt(-lost)

    def step(self, score_fn: ScoreFn, x: Tensor, step: Step, state: State, noise: Noise) -> Stepped:
        ratio, direction, *spread = self.coefficients_of(step, x)
        eps = score_fn(x, step.start).eps
        x_next = (ratio * x).addcmul_(direction, eps)
        if spread:
            z = noise(x, step)
            x_next.addcmul_(spread[0], z)
        return Stepped(x_next, state)
