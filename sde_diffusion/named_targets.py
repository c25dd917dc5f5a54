"""The exact targets by name. All are scaled to about unit standard deviation, as data for training
is."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sde_diffusion.errors import unknown_name
from sde_diffusion.targets import GaussianMixture


def gaussian() -> GaussianMixture:
    """One correlated 2-D Gaussian: every linear sampler's mean and covariance are known exactly."""
    return GaussianMixture(torch.tensor([[0.5, -0.3]]), torch.tensor([[[0.8, 0.3], [0.3, 0.4]]]))


def ring() -> GaussianMixture:
    """Eight modes of standard deviation 0.1 on a circle in 2-D; the class is the mode."""
    angle = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
    means = math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], 1)
    return GaussianMixture(means, torch.full((8,), 0.01), labels=torch.arange(8))


def moons() -> GaussianMixture:
    """Two interleaved half-circles in 2-D, 32 components each; the class is the moon."""
    angle = torch.linspace(0, math.pi, 32, dtype=torch.float64)
    upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], 1)
    return _fine_mixture([upper, -upper], width=0.08)


def spiral() -> GaussianMixture:
    """Two interleaved spiral arms in 2-D, 48 components each; the class is the arm."""
    turn = torch.linspace(0.1, 1, 48, dtype=torch.float64).sqrt()
    angle = 3 * math.pi * turn
    arm = turn[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    return _fine_mixture([arm, -arm], width=0.05)


def gmm16() -> GaussianMixture:
    """Ten anisotropic, rotated components in 16-D with unequal weights; the class is the component.

    Standard deviations along the axes of a component run from 0.1 to 0.7.
    """
    generator = torch.Generator().manual_seed(16)
    means = 0.9 * torch.randn(10, 16, generator=generator, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(10, 16, 16, generator=generator, dtype=torch.float64))
    deviations = 0.1 * 7 ** torch.rand(10, 16, generator=generator, dtype=torch.float64)
    covariances = rotation @ torch.diag_embed(deviations**2) @ rotation.mT
    weights = 1 + torch.rand(10, generator=generator, dtype=torch.float64)
    return GaussianMixture(means, covariances, weights, torch.arange(10))


def _fine_mixture(curves: list[Tensor], width: float) -> GaussianMixture:
    """Equal isotropic components along curves, one class each, scaled to unit mean variance."""
    points = torch.cat(curves)
    scale = (points.var(0, correction=0).mean() + width**2).sqrt()
    labels = torch.repeat_interleave(
        torch.arange(len(curves)), torch.tensor([len(c) for c in curves])
    )
    return GaussianMixture(
        points / scale, torch.full((len(points),), width**2) / scale**2, labels=labels
    )


TARGETS: dict[str, Callable[[], GaussianMixture]] = {
    "gaussian": gaussian,
    "gmm16": gmm16,
    "moons": moons,
    "ring": ring,
    "spiral": spiral,
}


def named_target(name: str) -> GaussianMixture:
    """The target called ``name``; a ``ValueError`` lists the names and the nearest match."""
    if name not in TARGETS:
        raise unknown_name("target", name, TARGETS)
    return TARGETS[name]()
