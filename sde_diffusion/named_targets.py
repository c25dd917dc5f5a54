"""The exact targets by name. All are scaled to about unit standard deviation, as data for training
is."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sde_diffusion.empirical import empirical_target
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


def heavy_tails() -> GaussianMixture:
    """Two modes in 2-D with the tails of Student's t, 3 degrees of freedom; the class is the mode.

    A scale mixture: ``x = mu + tau z / sqrt(u)``, u of a Gamma law of shape and rate nu/2. The
    integral over u is the trapezoidal rule in log u, step 1/2 from -9 to 2.5, whose error falls
    geometrically with the step: the density is Student's to 1e-5 relative within 10 tau, to 0.2 %
    at 50. Beyond, the widest component (90 tau) makes the tails Gaussian and all moments finite.
    """
    nu = 3.0
    log_u = torch.arange(-9, 2.51, 0.5, dtype=torch.float64)
    weights = (nu / 2 * (log_u - log_u.exp())).exp()
    means = torch.tensor([[1.0, 0.3], [-1.0, -0.3]], dtype=torch.float64)
    nodes = len(log_u)
    return _standardised(
        means.repeat_interleave(nodes, 0),
        (0.35**2 / log_u.exp()).repeat(2),
        weights.repeat(2),
        torch.arange(2).repeat_interleave(nodes),
    )


def swiss_roll() -> GaussianMixture:
    """A surface in 3-D: 384 flat pieces along a roll, thin across it; the class is the quarter.

    Pieces at equal distances along the spiral ``(t cos t, t sin t)``, t from 1.5 pi to 4.5 pi, and
    along the axis, of standard deviation 0.6 of those distances, and 0.1 across: 1/63 of the
    distance between two turns.
    """
    fine = torch.linspace(1.5 * math.pi, 4.5 * math.pi, 20_001, dtype=torch.float64)
    speed = (1 + fine**2).sqrt()
    length = torch.cumulative_trapezoid(speed, fine)
    along, across = 96, 4
    middle = (torch.arange(along, dtype=torch.float64) + 0.5) / along * length[-1]
    t = fine[torch.searchsorted(length, middle) + 1]
    cos, sin, zero = t.cos(), t.sin(), torch.zeros_like(t)
    height = 12 * ((torch.arange(across, dtype=torch.float64) + 0.5) / across - 0.5)
    means = torch.stack([t * cos, zero, t * sin], 1)[:, None] + torch.stack(
        [torch.zeros_like(height), height, torch.zeros_like(height)], 1
    )
    tangent = torch.stack([cos - t * sin, zero, sin + t * cos], 1)
    tangent = tangent / tangent.norm(dim=1, keepdim=True)
    normal = torch.stack([tangent[:, 2], zero, -tangent[:, 0]], 1)
    axis = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64).expand(along, 3)
    frame = torch.stack([tangent, axis, normal], 2)
    widths = torch.tensor([0.6 * float(length[-1]) / along, 0.6 * 12 / across, 0.1])
    covariances = frame @ torch.diag(widths.double() ** 2) @ frame.mT
    return _standardised(
        means.reshape(-1, 3),
        covariances.repeat_interleave(across, 0),
        torch.ones(along * across, dtype=torch.float64),
        (torch.arange(along) * 4 // along).repeat_interleave(across),
    )


def imbalanced() -> GaussianMixture:
    """Six modes on a circle in 2-D, each a third as likely as the one before; the class is the
    mode.

    The rarest has 1 sample in 364.
    """
    angle = torch.arange(6, dtype=torch.float64) * (math.pi / 3)
    means = torch.stack([angle.cos(), angle.sin()], 1)
    weights = 3.0 ** -torch.arange(6, dtype=torch.float64)
    return _standardised(means, torch.full((6,), 0.01).double(), weights, torch.arange(6))


def nearly_singular() -> GaussianMixture:
    """Four rotated modes in 8-D, almost flat: standard deviations from 1 to 0.001 in each; the
    class is the mode."""
    generator = torch.Generator().manual_seed(8)
    means = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(4, 8, 8, generator=generator, dtype=torch.float64))
    deviations = torch.logspace(0, -3, 8, dtype=torch.float64)
    covariances = rotation @ torch.diag(deviations**2) @ rotation.mT
    return _standardised(means, covariances, torch.ones(4).double(), torch.arange(4))


def _standardised(
    means: Tensor, covariances: Tensor, weights: Tensor, labels: Tensor
) -> GaussianMixture:
    """Scaled to a mean variance of 1."""
    scale = GaussianMixture(means, covariances, weights).covariance().diagonal().mean().sqrt()
    return GaussianMixture(means / scale, covariances / scale**2, weights, labels)


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
    "heavy_tails": heavy_tails,
    "imbalanced": imbalanced,
    "moons": moons,
    "nearly_singular": nearly_singular,
    "ring": ring,
    "spiral": spiral,
    "swiss_roll": swiss_roll,
}
EMPIRICAL = "empirical:"


def named_target(name: str) -> GaussianMixture:
    """The target called ``name``: one of ``TARGETS``, or ``empirical:DATA``, the law of a data
    set's own samples (`empirical_target`).

    Raises:
        ValueError: an unknown name, with all names and the nearest one; data that is not there.
    """
    if name.startswith(EMPIRICAL):
        return empirical_target(name.removeprefix(EMPIRICAL))
    if name not in TARGETS:
        raise unknown_name("target", name, TARGETS)
    return TARGETS[name]()
