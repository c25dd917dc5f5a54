"""Priors and transitions of a general SDE: what can be drawn, and whose score is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sde_diffusion.broadcast import expand, per_sample_sum
from sde_diffusion.errors import require_finite
from sde_diffusion.ito.fields import Normals

LogDensity = Callable[[Tensor, Tensor], Tensor]
"""``(x, t) -> (B,)``, in nats."""


class Prior(Protocol):
    """The law at ``t_max`` that sampling starts from."""

    def sample(self, normal: Normals) -> Tensor:
        """A batch, made from standard normals so that a sample is a function of its own noise."""
        ...

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats: ``(B, *event) -> (B,)``."""
        ...


class Transition(Protocol):
    """The law of ``x_t`` given ``x_0``."""

    def sample(self, x0: Tensor, t: Tensor, normal: Normals) -> Tensor:
        """``x_t`` from ``x0`` ``(B, *event)`` at ``t``, 0-d or ``(B,)``; ``normal(slot)`` has the
        shape of the result."""
        ...

    def score(self, x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """``grad_x log p(x_t = x | x_0)``, of ``x``'s shape."""
        ...


@dataclass(frozen=True)
class GaussianPrior:
    """``N(0, std^2)``, elementwise; ``std`` a number, or a tensor that broadcasts to an event."""

    std: float | Tensor = 1.0

    def sample(self, normal: Normals) -> Tensor:
        z = normal(0)
        return z * torch.as_tensor(self.std).to(z)

    def log_prob(self, x: Tensor) -> Tensor:
        std = torch.as_tensor(self.std).to(x).expand_as(x)
        return per_sample_sum(-0.5 * (x / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi))


@dataclass(frozen=True)
class ScaledTransition:
    """``N(alpha(t) x_0, sigma(t)^2 I)``: the kernel of a linear SDE.

    Args:
        scales: ``t -> (alpha, sigma)``, 0-d or ``(B,)`` as ``t`` is.
    """

    scales: Callable[[Tensor], tuple[Tensor, Tensor]]

    def sample(self, x0: Tensor, t: Tensor, normal: Normals) -> Tensor:
        alpha, sigma = (expand(scale, x0) for scale in self.scales(t))
        return alpha * x0 + sigma * normal(0)

    def score(self, x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (expand(scale, x) for scale in self.scales(t))
        return (alpha * x0 - x) / sigma**2


@dataclass(frozen=True)
class DensityTransition:
    """A transition known by its density: the score is taken by autograd.

    Args:
        sampler: ``(x0, t, normal) -> x_t``.
        log_prob: ``(x, x0, t) -> (B,)``, log-density in nats.
    """

    sampler: Callable[[Tensor, Tensor, Normals], Tensor]
    log_prob: Callable[[Tensor, Tensor, Tensor], Tensor]

    def sample(self, x0: Tensor, t: Tensor, normal: Normals) -> Tensor:
        return self.sampler(x0, t, normal)

    def score(self, x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        return gradient_of(lambda x, t: self.log_prob(x, x0, t))(x, t)


def gradient_of(log_density: LogDensity) -> Callable[[Tensor, Tensor], Tensor]:
    """``(x, t) -> grad_x log_density``, of ``x``'s shape, by autograd; works under ``no_grad``.

    Of ``log p_t(x)`` it is the score; of ``log p_t(y | x)`` the guidance of a reverse equation.
    """

    def gradient(x: Tensor, t: Tensor) -> Tensor:
        differentiable = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            x = x.clone() if x.is_inference() else x
            if not (differentiable and x.requires_grad):
                x = x.detach().requires_grad_()
            values = log_density(x, t)
            if values.shape != (len(x),):
                raise ValueError(
                    f"log_density must give one value per sample, ({len(x)},), got "
                    f"{tuple(values.shape)}: sum over the event"
                )
            (slope,) = torch.autograd.grad(values.sum(), x, create_graph=differentiable)
        return slope

    return gradient


def normals_from(generator: torch.Generator, like: Tensor) -> Normals:
    """Standard normals of ``like``'s shape from a generator, for training; each call draws anew."""

    def normal(slot: int) -> Tensor:
        drawn = torch.randn(
            like.shape, generator=generator, dtype=like.dtype, device=generator.device
        )
        return drawn.to(like.device)

    return normal


def check_positive(**values: float) -> None:
    """Raise ``ValueError`` unless every value is a finite number above 0."""
    for name, value in values.items():
        require_finite(name, value, above=0.0)
