"""Log-densities in bits per dimension, from how the data was scaled."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sde_diffusion.data_files import Scaling
from sde_diffusion.errors import require_count, require_finite

_KNOWN = {(0.0, 255.0): 256, (0.0, 65535.0): 65536}


def bin_width(scaling: Scaling, levels: int | None = None) -> float:
    """The distance of two neighbouring levels of the raw data, in the model's range.

    ``2 / 255`` for 8-bit data scaled to [-1, 1] by ``x / 127.5 - 1``; ``2 / 256`` where the outer
    edges of the levels' bins lie at -1 and 1.

    Args:
        levels: equally spaced from the scaling's ``low`` to its ``high``. By default what the
            scaling records, or 256 and 65,536 for 8- and 16-bit ranges.
    Raises:
        ValueError: no levels are known: the data is continuous, or the range is not 8- or 16-bit.
    """
    if levels is None:
        recorded: int | None = getattr(scaling, "levels", None)
        levels = recorded or _KNOWN.get((scaling.low, scaling.high))
    if levels is None:
        raise ValueError(
            f"levels is missing: a range of {scaling.low:g} to {scaling.high:g} does not say how "
            "many values the raw data takes; give their number, such as 17 for 0, 1, ..., 16"
        )
    count = require_count("levels", levels, least=2)
    ends = torch.tensor([scaling.low, scaling.high], dtype=torch.float64)
    low, high = scaling.to_model(ends).tolist()
    return float((high - low) / (count - 1))


def bits_per_dim(log_prob: Tensor, event_shape: Sequence[int], width: float) -> Tensor:
    """``-log2 p(x) / D - log2(width)``: bits per dimension of the raw data's levels.

    A level's probability is the density's integral over its bin, of volume ``width^D``. For 8-bit
    data the offset ``-log2(width)`` is 7 on [-1, 1] with the outer edges of the bins at -1 and 1,
    8 on [0, 1], and log2(127.5) for ``x / 127.5 - 1``.

    Args:
        log_prob: nats, of dequantised data (``solvers.dequantised_likelihood``): the mean over
            uniform noise in the bin is then an upper bound on the bits (Theis et al. 2016,
            arXiv:1511.01844, sec. 3.1). Of undequantised data it has no lower bound.
        event_shape: of one sample; D is its size.
        width: of a level's bin in the model's range, as ``bin_width`` gives it.
    """
    require_finite("width", width, above=0.0)
    dimensions = math.prod(event_shape)
    return -log_prob / (dimensions * math.log(2)) - math.log2(width)


def within_range(x: Tensor, margin: float = 0.0, *, clip: bool = False) -> Tensor:
    """``x`` if it lies in the model's [-1, 1] (and a margin); clipped to it if ``clip``.

    Raises:
        ValueError: a sample that does not, and ``clip`` is not set; names it.
    """
    low, high = -1 - margin, 1 + margin
    if clip:
        return x.clamp(low, high)
    slack = 1e-6  # of float32 scaling
    outside = (x < low - slack) | (x > high + slack) | ~x.isfinite()
    if bool(outside.any()):
        place = outside.nonzero()[0]
        raise ValueError(
            f"x[{int(place[0])}] holds {float(x[tuple(place)]):g}, outside [{low:g}, {high:g}], "
            "the range the data was scaled to; scale it as the training data was, or clip it"
        )
    return x
