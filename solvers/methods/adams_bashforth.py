"""Adams-Bashforth in sigma/alpha (LMS)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sde_diffusion.errors import require_count
from sde_diffusion.prediction import Prediction
from sde_diffusion.sde import NoiseLevel
from solvers.multistep import Multistep


@dataclass(frozen=True)
class AdamsBashforth(Multistep):
    """Adams-Bashforth with variable steps on dy/ds = eps, y = x / alpha, s = sigma / alpha (LMS).

    ``x_u = alpha_u/alpha_t x_t + alpha_u int eps(s) ds`` with the polynomial in s (Hairer, Norsett
    & Wanner 1993, sec. III.5; k-diffusion's LMS sampler). Order 1 is DDIM.

    Args:
        order: 1 to 4; order 4 evaluates once more in a run.
    """

    order: int = 4
    stochastic = False

    def __post_init__(self) -> None:
        require_count("order", self.order, most=4)

    def coordinate(self, level: NoiseLevel) -> Tensor:
        return level.sigma_over_alpha

    def quantity(self, prediction: Prediction) -> Tensor:
        return prediction.eps

    def kernel(self, end: NoiseLevel, c: Tensor) -> Tensor:
        return end.alpha.expand_as(c)

    def ratio(self, start: NoiseLevel, end: NoiseLevel) -> Tensor:
        return end.alpha / start.alpha
