"""Exponential integrals: what interpolants of x0 contribute to a step, without cancellation.

A path of the reverse family with stochasticity ``tau`` goes, from a level t to a cleaner one u, by

    x_u = sigma_u/sigma_t exp(-T) x_t + alpha_u int x0(v) k(v) dv + sigma_u sqrt(1 - exp(-2 T)) z,
    T = int tau^2 dv,   k(v) = r(v) exp(-int_v^u r),   r = 1 + tau^2,   v = half_log_snr

(Lu et al. 2022, arXiv:2211.01095, eq. 8 for tau = 0; Xue et al. 2023, arXiv:2309.05019).
A method replaces x0 along the step by a polynomial through known values; its coefficients are
integrals of Lagrange polynomials against ``k``. In closed form they are combinations of the phi
functions that cancel where steps are small; here they are computed by Gauss-Legendre quadrature of
the integral itself, which never does. The nodes are those of the cube root of the distance from the
step's end, where the kernel sits: sixty-four of them integrate it to rounding for r h up to 2,000,
as in one single step over any SDE's range at tau = 12.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

_POINTS, _WEIGHTS = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(64))
_ROOTS = 0.5 * (1 + _POINTS)
_DISTANCES, _WEIGHTS = _ROOTS**3, 1.5 * _ROOTS**2 * _WEIGHTS  # from the end, in steps

Function = Callable[[Tensor], Tensor]


def integral(start: Tensor, end: Tensor, function: Function) -> Tensor:
    """``int_start^end function(v) dv``, elementwise; ``function`` sees one dimension more."""
    points, weights = _quadrature(start, end)
    return (function(points) * weights).sum(-1)


def interpolation_weights(
    nodes: Sequence[Tensor],
    start: Tensor,
    end: Tensor,
    kernel: Function,
    variable: Function = lambda v: v,
) -> tuple[Tensor, ...]:
    """``int_start^end L_i(v) kernel(v) dv`` for each Lagrange polynomial ``L_i`` of ``nodes``.

    All tensors are ``half_log_snr`` of one shape; the result has one entry per node.

    Args:
        variable: what of ``half_log_snr`` the interpolant is a polynomial in.
    """
    points, weights = _quadrature(start, end)
    mass = kernel(points) * weights
    at, places = variable(points), [variable(node)[..., None] for node in nodes]
    found = []
    for i, mine in enumerate(places):
        basis = mass
        for j, other in enumerate(places):
            if j != i:
                basis = basis * ((at - other) / (mine - other))
        found.append(basis.sum(-1))
    return tuple(found)


def constant_rate(rate: Tensor | float, end: Tensor) -> Function:
    """The kernel ``r exp(-r (end - v))`` of a stochasticity that is constant over the step."""
    wide = rate[..., None] if isinstance(rate, Tensor) else rate
    return lambda v: wide * torch.exp(-wide * (end[..., None] - v))


def _quadrature(start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    span = (end - start)[..., None]
    return end[..., None] - span * _DISTANCES.to(span), span * _WEIGHTS.to(span)
