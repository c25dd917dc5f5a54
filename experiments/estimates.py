"""A number with its standard error, from repetitions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from sde_diffusion.errors import require_count


class Estimate(NamedTuple):
    """A mean over repetitions and its standard error (None: one repetition says nothing of it)."""

    value: float
    stderr: float | None = None


def estimate(values: Iterable[float]) -> Estimate:
    """Mean of repetitions and the standard error of that mean, ``std(ddof=1) / sqrt(R)``."""
    array = np.asarray(list(values), dtype=np.float64)
    if array.size == 0:
        raise ValueError("values must hold at least one repetition, got none")
    if array.size == 1:
        return Estimate(float(array[0]))
    return Estimate(float(array.mean()), float(array.std(ddof=1) / math.sqrt(array.size)))


def repeated(metric: Callable[[int], float], repeats: int, seed: int = 0) -> Estimate:
    """``metric(seed)``, ``metric(seed + 1)``, ... ``repeats`` times: mean and standard error.

    ``metric`` draws what it needs from the seed it is given and returns one number.
    """
    repeats = require_count("repeats", repeats)
    return estimate(float(metric(seed + r)) for r in range(repeats))


def blocks(x: Tensor, repeats: int) -> tuple[Tensor, ...]:
    """``x`` (N, *event) in ``repeats`` parts of ``N // repeats`` samples; the rest is left out.

    Samples of one call are independent, so that its parts are as good as calls with fresh seeds.
    """
    repeats = require_count("repeats", repeats)
    size = len(x) // repeats
    if size < 2:
        raise ValueError(
            f"repeats must leave at least 2 samples each: {len(x)} samples, {repeats} repeats; "
            "draw more samples or ask for fewer repeats"
        )
    return x[: size * repeats].split(size)


def over_blocks(metric: Callable[..., float], *sets: Sequence[Tensor]) -> Estimate:
    """``metric(a_r, b_r, ...)`` for the r-th block of every set: mean and standard error."""
    return estimate(float(metric(*parts)) for parts in zip(*sets, strict=True))
