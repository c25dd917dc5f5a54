"""The law of a data set's own samples: every sample a component without width.

Its score under an SDE is what a network trained for ever on these samples would learn, so its
samples memorise: they end on the data. It is exact all the same, and so are a solver's errors on
it, in images as in the plane.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from sde_diffusion.data import load_data
from sde_diffusion.errors import require_finite
from sde_diffusion.samples import as_tensor
from sde_diffusion.targets import GaussianMixture

MOST = 2**28  # numbers of the data: 2 GiB of them in float64


def empirical_mixture(x: Tensor, labels: Tensor | None = None, std: float = 0.0) -> GaussianMixture:
    """``1/N sum_n N(x_n, std^2 I)``: at noise level (alpha, sigma) the law of
    ``alpha x_n + sqrt(alpha^2 std^2 + sigma^2) eps`` for n drawn at random.

    Args:
        x: ``(N, *event)``.
        labels: ``(N,)`` integers from 0, the classes; None: one class.
        std: at least 0. At 0 clean data has no density, only the samples themselves.
    Raises:
        ValueError: no samples, values that are not finite, a negative std, wrong labels.
    """
    require_finite("std", std)
    if std < 0:
        raise ValueError(f"std must be at least 0, got {std!r}")
    if x.ndim < 1 or x.numel() == 0:
        raise ValueError(f"x must hold samples (N, *event), got shape {tuple(x.shape)}")
    variances = torch.full((len(x),), std**2, dtype=torch.float64)
    return GaussianMixture(x.reshape(len(x), -1), variances, labels=labels, event_shape=x.shape[1:])


def empirical_target(source: str | Path, std: float = 0.0) -> GaussianMixture:
    """The `empirical_mixture` of all samples of a data set, in [-1, 1], with its classes.

    Args:
        source: as `load_data` takes it: ``digits``, ``mnist5k``, a .npy file, a folder of images.
    Raises:
        ValueError: no such data, or more of it than ``MOST`` numbers.
    """
    data = load_data(source)
    parts = [part for part in (data.train_x, data.test_x) if len(part)]
    size = sum(math.prod(part.shape) for part in parts)
    if size > MOST:
        raise ValueError(
            f"the data {str(source)!r} holds {size:,} numbers, and an empirical target at most "
            f"{MOST:,}; give fewer or smaller samples"
        )
    labels = None
    if data.train_y is not None and data.test_y is not None:
        labels = torch.cat([data.train_y, data.test_y])
    return empirical_mixture(torch.cat([as_tensor(part) for part in parts]), labels, std)
