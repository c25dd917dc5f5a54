"""DEIS: exponential multistep in the noise prediction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sde_diffusion.errors import require_count
from sde_diffusion.prediction import Prediction
from sde_diffusion.sde import NoiseLevel
from solvers.multistep import Multistep


@dataclass(frozen=True)
class DEIS(Multistep):
    """DEIS: exponential multistep in eps, interpolated in half_log_snr.

    ``x_u = alpha_u/alpha_t x_t - sigma_u int e^(l_u - l) eps(l) dl`` (Zhang & Chen 2023,
    arXiv:2204.13902, eq. 14, with l = half_log_snr as the variable of the polynomial; the paper
    offers t and rho). Order 1 is DDIM.

    Args:
        order: 1 to 4; order 4 evaluates once more in a run.
    """

    order: int = 3
    stochastic = False

    def __post_init__(self) -> None:
        require_count("order", self.order, most=4)

    def coordinate(self, level: NoiseLevel) -> Tensor:
        return level.half_log_snr

    def quantity(self, prediction: Prediction) -> Tensor:
        return prediction.eps

    def kernel(self, end: NoiseLevel, c: Tensor) -> Tensor:
        return -end.sigma * torch.exp(end.half_log_snr - c)

    def ratio(self, start: NoiseLevel, end: NoiseLevel) -> Tensor:
        return end.alpha / start.alpha
