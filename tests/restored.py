"""What the tests of restoration share: a normal prior, what is known of a sample, states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sde_diffusion import GaussianMixture, Inpainting

STD = 0.6
NORMAL = GaussianMixture(
    torch.tensor([[0.5, -0.3, 0.2, 1.0]], dtype=torch.float64),
    torch.tensor([STD**2], dtype=torch.float64),
)
KNOWN = Inpainting(torch.tensor([1, 0, 1, 0]), noise_std=0.1)
Y = KNOWN.check(torch.tensor([[0.1, 0.0, 0.9, 0.0]], dtype=torch.float64))


def states(sde: Any, t: float, n: int = 6, dimension: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(6)
    level = sde.at(t)
    scale = (level.alpha**2 + level.sigma**2).sqrt()
    return scale * torch.randn(n, dimension, generator=generator, dtype=torch.float64)
