"""What a drift, a diffusion and a score are here, and how a diffusion of each kind acts.

A field is a callable ``(x, t)``: ``x`` is ``(B, *event)``, ``t`` a 0-d tensor or ``(B,)``. Row b of
its value may depend on row b of ``x`` alone. With D the number of elements of an event, G is

* ``isotropic``: ``g I``; the field's value is 0-d or ``(B,)``. All the linear SDEs are so.
* ``diagonal``: ``diag(g)``, where ``g_i`` depends on ``x_i`` and ``t`` alone; ``(B, *event)``, or
  what broadcasts to it. One motion per element.
* ``scalar``: one motion that drives all elements, ``G = g`` a column; ``(B, *event)``.
* ``general``: any matrix; ``(B, D, M)`` with M motions, or ``(D, M)`` where it is constant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from sde_diffusion.broadcast import expand

Field = Callable[[Tensor, Tensor], Tensor]
Score = Callable[[Tensor, Tensor], Tensor]
Normals = Callable[[int], Tensor]
"""``normal(slot)``: standard normals of the state's shape, independent from slot to slot."""

Kind = Literal["isotropic", "diagonal", "scalar", "general"]
KINDS: tuple[Kind, ...] = ("isotropic", "diagonal", "scalar", "general")


def misfit(kind: Kind, g: Tensor, x: Tensor) -> str | None:
    """What shape a diffusion's value should have, where it has another; else ``None``."""
    shape, batch = tuple(g.shape), len(x)
    elements = x[:1].numel()
    if kind == "isotropic":
        return None if shape in ((), (batch,)) else f"() or ({batch},)"
    if kind == "general":
        fits = shape[:-1] in ((elements,), (batch, elements))
        return None if fits else f"({batch}, {elements}, M) or ({elements}, M)"
    try:
        fits = torch.broadcast_shapes(shape, x.shape) == x.shape
    except RuntimeError:
        fits = False
    return None if fits else f"{tuple(x.shape)}"


def noise_like(kind: Kind, g: Tensor, x: Tensor) -> Tensor:
    """A tensor, for its shape, dtype and device, of the motions that drive ``x``: ``x`` itself, or
    ``(B, M)``."""
    if kind == "general":
        return x.new_empty(len(x), g.shape[-1])
    return x.new_empty(len(x), 1) if kind == "scalar" else x


def applied(kind: Kind, g: Tensor, z: Tensor, x: Tensor) -> Tensor:
    """``G z``, of ``x``'s shape, for ``z`` of the motions' shape."""
    if kind == "general":  # summed per row: a matrix product's order may depend on the batch
        return (g * z[:, None, :]).sum(-1).reshape(x.shape)
    if kind == "scalar":
        return g * expand(z[:, 0], x)
    return (expand(g, x) if kind == "isotropic" else g) * z


def transposed(kind: Kind, g: Tensor, v: Tensor) -> Tensor:
    """``G^T v``, of the motions' shape, for ``v`` of the state's."""
    if kind == "general":
        return (g * v.reshape(len(v), -1, 1)).sum(-2)
    if kind == "scalar":
        return (g * v).reshape(len(v), -1).sum(1, keepdim=True)
    return (expand(g, v) if kind == "isotropic" else g) * v


def covariance_times(kind: Kind, g: Tensor, v: Tensor) -> Tensor:
    """``G G^T v``, of the state's shape."""
    return applied(kind, g, transposed(kind, g, v), v)


def variances(kind: Kind, g: Tensor, x: Tensor) -> Tensor:
    """The diagonal of ``G G^T``, broadcastable to ``x``'s shape."""
    if kind == "general":
        squares = g.square().sum(-1)
        return squares.reshape(x.shape if g.ndim == 3 else x.shape[1:])
    return expand(g, x).square() if kind == "isotropic" else g.square()
