"""One place that lines per-sample coefficients up with events of any shape."""

from __future__ import annotations

from torch import Tensor


def expand(coefficient: Tensor, x: Tensor) -> Tensor:
    """Reshape a 0-d or ``(B,)`` coefficient so that it multiplies ``x`` of shape ``(B, *event)``.

    The result has ``x``'s dtype: a ``(B,)`` float64 coefficient must not promote a float32 state.
    """
    coefficient = coefficient.to(x.dtype)
    if coefficient.ndim == 0 or coefficient.ndim == x.ndim:
        return coefficient
    return coefficient.reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim))


def per_sample_norm(x: Tensor) -> Tensor:
    """Euclidean norm of each sample over its event dimensions: ``(B, *event) -> (B,)``."""
    return x.abs() if x.ndim == 1 else x.flatten(1).norm(dim=1)


def per_sample_sum(x: Tensor) -> Tensor:
    """Sum over the event dimensions: ``(B, *event) -> (B,)``."""
    return x if x.ndim == 1 else x.flatten(1).sum(dim=1)
