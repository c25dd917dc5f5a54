"""What the tests of log-likelihoods share: a small mixture of known density, and its prior."""

from __future__ import annotations

import torch
from torch import Tensor

from sde_diffusion import VPSDE, GaussianMixture
from solvers import catalogue

_draws = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(5)).double()
TARGET = GaussianMixture(  # small and quick; three anisotropic components, rotated
    _draws[:, 0], 0.02 * torch.eye(4) + 0.1 * _draws @ _draws.mT, labels=torch.arange(3)
)
SDE_VP = VPSDE(t_min=1e-5)


def data(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return TARGET.sample(count, 0, dtype=dtype)[0]


def own_prior(sde: VPSDE, target: GaussianMixture = TARGET) -> object:
    return lambda z: target.log_prob_at(z, sde.at(float(sde.t_max)))


def tsitouras() -> object:
    return catalogue()["tsitouras"].type()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
