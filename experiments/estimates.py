"""A number with its standard error, from repetitions."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


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
