"""Gradients taken inside a sampler, which itself records none."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sde_diffusion.sde import HostedLevel, NoiseLevel

Forward = Callable[[Tensor, NoiseLevel], tuple[Tensor, Tensor, tuple[Tensor, ...]]]


def pull_back(x: Tensor, level: NoiseLevel, forward: Forward) -> tuple[Tensor, ...]:
    """``(d output / d x)^T cotangent``, of ``x``'s shape, and what ``forward`` wants kept.

    It flows under ``no_grad`` and ``inference_mode`` too; with gradients enabled outside, the
    result can itself be differentiated.

    Args:
        forward: ``(x, level) -> (output, cotangent, kept)``; no sample's output may depend on
            another sample, so that one pass backwards serves the batch.
    """
    differentiable = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        # Tensors made under inference_mode may not take part in a gradient; their copies may.
        x, level = usable(x), _usable_level(level)
        if not differentiable or not x.requires_grad:
            x = x.detach().requires_grad_()
        output, cotangent, kept = forward(x, level)
        (gradient,) = torch.autograd.grad(output, x, cotangent, create_graph=differentiable)
    return gradient, *(kept if differentiable else (tensor.detach() for tensor in kept))


def usable(tensor: Tensor) -> Tensor:
    """The tensor, or its copy where it was made under ``inference_mode``."""
    return tensor.clone() if tensor.is_inference() else tensor


def _usable_level(level: NoiseLevel) -> NoiseLevel:
    if isinstance(level, HostedLevel):  # what the host knows decides what is evaluated, and counted
        return HostedLevel.of(map(usable, level), level.host_ratio)
    return level.map(usable)
