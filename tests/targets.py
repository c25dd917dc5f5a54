"""What the tests of exact targets share: the targets by name, and each by torch.distributions."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from sde_diffusion import GaussianMixture, NoiseLevel, named_target
from tests.problems import EXACT_TARGETS


def rotated(seed: int = 3, count: int = 3, dimension: int = 3) -> tuple[Tensor, Tensor]:
    """Means and full covariances."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(count, dimension, generator=generator, dtype=torch.float64)
    root = torch.randn(count, dimension, dimension, generator=generator, dtype=torch.float64)
    eye = torch.eye(dimension, dtype=torch.float64)
    return means, 0.3 * root @ root.mT + 0.05 * eye


@cache
def target_of(name: str) -> GaussianMixture:
    if name == "shared classes":  # several components in a class, unequal weights, rotated
        means, covariances = rotated(count=4)
        weights = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
        return GaussianMixture(means, covariances, weights, torch.tensor([0, 1, 0, 2]))
    return named_target(name)


NAMES = [*EXACT_TARGETS, "shared classes"]


def reference(
    target: GaussianMixture, level: NoiseLevel | None = None, label: int | None = None
) -> MixtureSameFamily:
    """The mixture at a 0-d level by torch.distributions, from its public numbers."""
    alpha, sigma = (1.0, 0.0) if level is None else (level.alpha.item(), level.sigma.item())
    covariances = full_covariances(target)
    eye = torch.eye(target.dimension, dtype=torch.float64)
    keep = slice(None) if label is None else target.labels == label
    return MixtureSameFamily(
        Categorical(target.weights[keep]),
        MultivariateNormal(
            alpha * target.means[keep], alpha**2 * covariances[keep] + sigma**2 * eye
        ),
    )


def full_covariances(target: GaussianMixture) -> Tensor:
    if target.rotation is None:
        return torch.diag_embed(target.variances)
    return target.rotation @ torch.diag_embed(target.variances) @ target.rotation.mT


def points(target: GaussianMixture, level: NoiseLevel, n: int = 16) -> Tensor:
    """Points of the law at a level, and some well outside it."""
    x0, _ = target.sample(n, seed=1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    x = level.alpha * x0 + level.sigma * noise
    return torch.cat([x, 2 * x + 0.5])
