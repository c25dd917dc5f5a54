"""Derivatives of a diffusion by forward-mode autograd, along directions, a bounded number at once.

Every row of a field depends on its own row of ``x`` alone, so that one ``jvp`` of the whole batch
gives each sample its own derivative.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from sde_diffusion.broadcast import expand
from sde_diffusion.ito.fields import Field, Kind, applied, covariance_times, noise_like

ELEMENTS = 1 << 24  # of the tensors that the directions of one chunk may take together
_PROBED = 4  # samples at which a diffusion's structure is probed


def covariance_divergence(diffusion: Field, kind: Kind, x: Tensor, t: Tensor) -> Tensor:
    """``(div G G^T)_i = sum_j d(G G^T)_ij / dx_j``, of ``x``'s shape.

    One derivative for isotropic and diagonal noise; else one ``jvp`` per element of an event, in
    chunks of at most ``ELEMENTS`` numbers.
    """
    if kind == "isotropic":
        # One number per sample: its gradient is the gradient of their sum.
        summed: Tensor = grad(lambda x: expand(diffusion(x, t).square(), x).sum())(x)
        return summed
    if kind == "diagonal":
        return _along(lambda x: diffusion(x, t).square().expand_as(x), x, torch.ones_like(x))
    basis = torch.eye(x[:1].numel(), dtype=x.dtype, device=x.device).reshape(-1, *x.shape[1:])

    def column(direction: Tensor) -> Tensor:
        direction = direction.expand_as(x)
        return _along(lambda x: covariance_times(kind, diffusion(x, t), direction), x, direction)

    motions = noise_like(kind, diffusion(x, t), x).shape[-1]
    return _summed(column, basis, x.numel() * max(1, motions))


def ito_correction(diffusion: Field, kind: Kind, x: Tensor, t: Tensor) -> Tensor:
    """``sum_k (G_k . grad) G_k`` over the columns of G, of ``x``'s shape: twice what separates the
    Ito drift from the Stratonovich one."""
    if kind in ("isotropic", "diagonal"):
        g = diffusion(x, t)
        size = expand(g, x) if kind == "isotropic" else g
        if kind == "isotropic":
            # sum_k g d(g)/dx_k e_k = grad(g^2) / 2
            return 0.5 * covariance_divergence(diffusion, kind, x, t)
        return size * _along(lambda x: diffusion(x, t).expand_as(x), x, torch.ones_like(x))
    motions = noise_like(kind, diffusion(x, t), x)
    basis = torch.eye(motions.shape[1], dtype=x.dtype, device=x.device)

    def column(direction: Tensor) -> Tensor:
        along = direction.expand_as(motions)
        return noise_derivative(diffusion, kind, x, t, along, along)

    return _summed(column, basis, x.numel() * motions.shape[1])


def noise_derivative(
    diffusion: Field, kind: Kind, x: Tensor, t: Tensor, along: Tensor, z: Tensor
) -> Tensor:
    """The derivative of ``G(x) z`` in the direction ``G(x) along``; both of the motions' shape."""
    direction = applied(kind, diffusion(x, t), along, x)
    return _along(lambda x: applied(kind, diffusion(x, t), z, x).expand_as(x), x, direction)


def commutes(diffusion: Field, kind: Kind, x: Tensor, t: Tensor) -> bool:
    """Whether the noise is commutative, ``(G_j . grad) G_k = (G_k . grad) G_j``, at a few samples
    of ``x`` and for one random pair of combinations of columns."""
    x, t = x[:_PROBED], t if t.ndim == 0 else t[:_PROBED]
    motions = noise_like(kind, diffusion(x, t), x)
    one, other = _random(motions, 1), _random(motions, 2)
    forth = noise_derivative(diffusion, kind, x, t, one, other)
    back = noise_derivative(diffusion, kind, x, t, other, one)
    size = diffusion(x, t).square().amax()
    return _equal(forth, back, size)


def acts_elementwise(field: Field, x: Tensor, t: Tensor) -> bool:
    """Whether element i of a field depends on element i of ``x`` alone, at a few samples and for
    one random direction."""
    x, t = x[:_PROBED], t if t.ndim == 0 else t[:_PROBED]
    direction = _random(x, 3)
    each = _along(lambda x: field(x, t).expand_as(x), x, torch.ones_like(x))
    along = _along(lambda x: field(x, t).expand_as(x), x, direction)
    return _equal(along, each * direction, field(x, t).abs().amax())


def _along(function: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> Tensor:
    derivative: Tensor = jvp(function, (x.contiguous(),), (direction.contiguous(),))[1]
    return derivative


def _summed(term: Callable[[Tensor], Tensor], directions: Tensor, elements: int) -> Tensor:
    """The sum of ``term`` over directions, in their order whatever the chunks are, so that rounding
    does not depend on the batch."""
    size = max(1, ELEMENTS // max(1, elements))
    total: Tensor | None = None
    for chunk in directions.split(size):
        for one in vmap(term)(chunk).unbind():
            total = one if total is None else total + one
    if total is None:
        raise ValueError("an event must have at least one element")
    return total


def _random(like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def _equal(a: Tensor, b: Tensor, size: Tensor) -> bool:
    """Whether two derivatives agree to their own rounding, or to that of terms of ``size`` that
    have cancelled in them."""
    slack = 1e-8 if a.dtype == torch.float64 else 1e-3
    scale = a.abs().amax() + b.abs().amax() + 1e-3 * size
    return bool(((a - b).abs() <= slack * scale).all())
