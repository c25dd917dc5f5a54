"""What the tests of guidance share: both guidances called alike, states, and how near is equal."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sde_diffusion import (
    GaussianMixture,
    ScoreFn,
    classifier_free_guided,
    classifier_guided,
    named_target,
)

# Classifier and classifier-free guidance of an exact target, called alike.
GUIDANCES: dict[str, Callable[..., ScoreFn]] = {
    "classifier": lambda target, sde, label, scale: classifier_guided(
        target.score_fn(sde), target.classifier(sde), label, scale
    ),
    "cfg": lambda target, sde, label, scale: classifier_free_guided(
        target.model(sde), label, scale
    ),
}


@cache
def target_of(name: str) -> GaussianMixture:
    return named_target(name)


def states(
    target: GaussianMixture, sde: Any, t: float, n: int = 24, dtype: torch.dtype = torch.float64
) -> Tensor:
    """States at ``t`` of samples of all classes: most are far from any one class."""
    x0, _ = target.sample(n, seed=5, dtype=dtype)
    generator = torch.Generator().manual_seed(6)
    return sde.perturb(x0, t, torch.randn(x0.shape, generator=generator, dtype=dtype))


def assert_scores_agree(found: Tensor, expected: Tensor) -> None:
    """To 1e-6, the promise, of the larger of 1 and each sample's own score."""
    scale = expected.abs().amax(1, keepdim=True).clamp_min(1)
    assert ((found - expected).abs() < 1e-6 * scale).all()
