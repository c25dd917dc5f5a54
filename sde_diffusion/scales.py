"""How strong a guidance is: one number, one per sample, or a function of the noise level."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sde_diffusion.broadcast import expand
from sde_diffusion.errors import require_finite
from sde_diffusion.sde import NoiseLevel

Scale = float | Tensor | Callable[[NoiseLevel], "float | Tensor"]
"""A number, a 0-d tensor, ``(B,)``, or ``w(level)`` that gives one of them. A function sees the
level only, 0-d or ``(B,)``, so that a sample's scale does not depend on its batch."""


def check_scale(scale: Scale, name: str = "scale") -> None:
    """Raise unless ``scale`` is a finite number, a finite tensor 0-d or ``(B,)``, or a function."""
    if isinstance(scale, Tensor):
        if scale.ndim > 1:
            raise ValueError(
                f"{name} must be a number, 0-d or (B,), got shape {tuple(scale.shape)}"
            )
        if not bool(scale.isfinite().all()):
            raise ValueError(f"{name} must be finite, got {scale.tolist()}")
    elif not callable(scale):
        require_finite(name, scale)


def is_number(scale: Scale, value: float) -> bool:
    """Whether ``scale`` is the Python number ``value``, for which a shortcut may be taken."""
    return not isinstance(scale, Tensor) and not callable(scale) and scale == value


def scale_at(scale: Scale, level: NoiseLevel) -> float | Tensor:
    """The scale at a level: a number, or a tensor 0-d or ``(B,)``.

    Raises:
        ValueError: a function that gives a tensor of another shape.
    """
    value = scale(level) if callable(scale) else scale
    if isinstance(value, Tensor) and value.ndim > 1:
        raise ValueError(f"scale must give a number, 0-d or (B,), got shape {tuple(value.shape)}")
    return value


def weight_of(scale: Scale, level: NoiseLevel, x: Tensor) -> float | Tensor:
    """The scale, ready to multiply ``x``."""
    value = scale_at(scale, level)
    return expand(value, x).to(x.dtype) if isinstance(value, Tensor) else value


def below(ratio: float, scale: Scale = 1.0) -> Scale:
    """``scale`` where ``sigma / alpha`` is below ``ratio``, 0 above.

    For gradients through a network's estimate of x0: its error there is divided by alpha, and the
    gradient's effect on x0 by alpha squared, while so noisy a state says next to nothing of x0.

    Args:
        ratio: above 0, in sigma/alpha.
    """
    require_finite("ratio", ratio, above=0.0)
    check_scale(scale)

    def gated(level: NoiseLevel) -> Tensor:
        inside = level.sigma_over_alpha < ratio
        return torch.where(inside, scale_at(scale, level), 0.0)

    return gated
