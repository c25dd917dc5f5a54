"""How much of the data's variety samples have."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["within_class_variance"]


def within_class_variance(x: Tensor, labels: Tensor) -> float:
    """Mean over classes of the total variance of a class: the trace of its covariance.

    Unbiased: the denominator is one less than the number of a class's samples.

    Args:
        x: (N, *event).
        labels: (N,) classes; each that occurs must occur twice.
    Raises:
        ValueError: a class with a single sample.
    """
    parts = []
    for label in labels.unique():
        part = x[labels == label].flatten(1).double()
        if len(part) < 2:
            raise ValueError(
                f"class {int(label)} has a single sample, which has no variance; draw more samples"
            )
        parts.append(part.var(0).sum())
    return float(torch.stack(parts).mean())
