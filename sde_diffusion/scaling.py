"""How raw values become the model's [-1, 1], what is done to a batch before it trains, and back."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Preparation", "Scaling"]


@dataclass(frozen=True)
class Scaling:
    """The affine map between the raw values of a data set and the model's [-1, 1].

    Raw values on ``levels`` equally spaced levels from `low` to `high` are bins when they are
    dequantised: level ``k`` (from 0) stands for the values between ``k`` and ``k + 1`` steps, as
    ``u = (k + U) / levels`` with U uniform on [0, 1) (Uria et al. 2013, arXiv:1306.0186). Then the
    outer edges of the bins, half a step outside [low, high], are mapped onto -1 and 1, and a raw
    value is mapped to the middle of its bin; `quantise` leads from anywhere in a bin back to it.

    Attributes:
        low: the smallest raw value.
        high: the largest raw value.
        levels: number of raw levels (256 for 8 bits), or None where values are continuous. It is
            no part of the map: scalings that differ in it alone are equal.
        dequantised: whether the edges of the bins, not `low` and `high`, are mapped onto -1 and 1.
    """

    low: float
    high: float
    levels: int | None = field(default=None, compare=False)
    dequantised: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(
                f"scaling needs finite low < high, got low={self.low}, high={self.high}; "
                "data whose values are all equal cannot be modelled"
            )
        if self.levels is not None and self.levels < 2:
            raise ValueError(f"levels must be at least 2 or None, got {self.levels}")
        if self.dequantised and self.levels is None:
            raise ValueError(
                "dequantise needs data on known levels (8-bit images, digits), and these values "
                "are continuous; leave dequantise out"
            )

    @property
    def step(self) -> float:
        """Raw distance between two levels; 1 where values are continuous."""
        return 1.0 if self.levels is None else (self.high - self.low) / (self.levels - 1)

    @property
    def _edges(self) -> tuple[float, float]:
        margin = 0.5 * self.step if self.dequantised else 0.0
        return self.low - margin, self.high + margin

    @property
    def bin_width(self) -> float:
        """Width in the model's [-1, 1] of one raw level; of one raw unit for continuous values."""
        low, high = self._edges
        return 2.0 * self.step / (high - low)

    @property
    def bits_offset(self) -> float:
        """Bits per dimension to add to ``-log2 p(x) / D``, p the density in the model's [-1, 1].

        The probability of a raw sample is the density's integral over its bin, so the offset is
        ``-log2(bin_width)``: 7 for dequantised 8-bit data, ``log2(levels / 2)`` for dequantised
        data in general, ``log2((levels - 1) / 2)`` without dequantisation (log2(127.5) for 8 bits;
        then p is the density of a discrete law and has no upper bound). For continuous values the
        result is the negative log density in raw units, ``log2((high - low) / 2)``.
        """
        return -math.log2(self.bin_width)

    def to_model(self, raw: Tensor) -> Tensor:
        """Raw values to [-1, 1]; any shape."""
        low, high = self._edges
        return (raw - low) * (2.0 / (high - low)) - 1.0

    def to_raw(self, x: Tensor) -> Tensor:
        """Model values back to the raw range; any shape, neither rounded nor clipped."""
        low, high = self._edges
        return (x + 1.0) * (0.5 * (high - low)) + low

    def quantise(self, x: Tensor) -> Tensor:
        """Model values to the nearest raw level, clipped to [low, high]; any shape.

        Continuous values, which have no levels, are only clipped.
        """
        raw = self.to_raw(x)
        if self.levels is not None:
            # Half a step up belongs to the upper level, as U = 0 does in a dequantised bin.
            raw = ((raw - self.low) / self.step + 0.5).floor() * self.step + self.low
        return raw.clamp(self.low, self.high)

    def to_unit(self, x: Tensor) -> Tensor:
        """Model values to [0, 1] and clipped there, as pictures want them; any shape."""
        return ((x + 1.0) * 0.5).clamp(0.0, 1.0)


@dataclass(frozen=True)
class Preparation:
    """What is done to each training batch, at random.

    Attributes:
        dequantise: uniform noise of the width of a level is added to every value.
        flip: every image is mirrored left to right with probability 1/2.
    """

    dequantise: bool = False
    flip: bool = False

    def apply(self, x: Tensor, scaling: Scaling, generator: torch.Generator) -> Tensor:
        """A batch (B, *event), as it trains; without dequantise and flip, `x` itself.

        Args:
            x: (B, *event) in the model's [-1, 1], values in the middle of their bins.
            scaling: the data's, dequantised where `dequantise` is set.
            generator: on the CPU; unused where nothing is to be drawn.
        """
        if self.dequantise:
            uniform = torch.rand(x.shape, generator=generator, dtype=x.dtype)
            x = x + (uniform - 0.5) * scaling.bin_width
        if self.flip:
            mirrored = torch.rand(len(x), generator=generator) < 0.5
            x = torch.where(mirrored.reshape(-1, *[1] * (x.ndim - 1)), x.flip(-1), x)
        return x
