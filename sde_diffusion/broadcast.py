"""One place that lines per-sample coefficients up with events of any shape."""

from __future__ import annotations

from torch import Tensor


def expand(coefficient: Tensor, x: Tensor) -> Tensor:
    """Reshape a 0-d or ``(B,)`` coefficient so that it multiplies ``x`` of shape ``(B, *event)``.

    A ``(B,)`` coefficient takes ``x``'s dtype, so that float64 does not promote a float32 state; a
    0-d one never promotes and is returned as it is.
    """
    if coefficient.ndim == 0:
        return coefficient
    return coefficient.to(x.dtype).reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim))


def per_sample_norm(x: Tensor) -> Tensor:
    """Euclidean norm of each sample over its event dimensions: ``(B, *event) -> (B,)``."""
    return x.abs() if x.ndim == 1 else x.flatten(1).norm(dim=1)


def per_sample_sum(x: Tensor) -> Tensor:
    """Sum over the event dimensions: ``(B, *event) -> (B,)``."""
    return x if x.ndim == 1 else x.flatten(1).sum(dim=1)
