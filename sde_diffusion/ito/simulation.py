"""Draws from a transition that has no closed form, by Euler-Maruyama."""

from __future__ import annotations

import torch
from torch import Tensor

from sde_diffusion.broadcast import expand
from sde_diffusion.errors import require_count
from sde_diffusion.ito.fields import applied, noise_like
from sde_diffusion.ito.sde import ItoSDE


def simulated(
    sde: ItoSDE, x0: Tensor, t: Tensor, steps: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """States at ``t`` from ``x0`` at 0, in equal steps, each sample to its own time.

    Weak order 1 in the step; of a positive SDE the absolute value is kept.

    Args:
        x0: ``(B, *event)``.
        t: ``(B,)``.
        steps: at least 1.
    Returns:
        The states ``(B, *event)``, and those one step before.
    """
    require_count("steps", steps)
    if t.shape != (len(x0),):
        raise ValueError(f"t must have one time per sample, ({len(x0)},), got {tuple(t.shape)}")
    span = (t / steps).to(x0.dtype)
    x = before = x0
    with torch.no_grad():
        for k in range(steps):
            before = x
            g = sde.diffusion(x, k * span)
            like = noise_like(sde.kind, g, x)
            z = torch.randn(
                like.shape, generator=generator, dtype=x.dtype, device=generator.device
            ).to(x.device)
            motion = expand(span.sqrt(), like) * z
            x = x + expand(span, x) * sde.drift(x, k * span) + applied(sde.kind, g, motion, x)
            x = x.abs() if sde.positive else x
    return x, before
