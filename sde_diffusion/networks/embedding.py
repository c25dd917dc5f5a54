"""What every network shares: the time and class embedding, and small builders."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["Conditioning", "TimeFeatures", "fraction", "group_norm", "positive"]


def positive(name: str, value: int) -> int:
    """Return `value` if it is a positive integer, else raise a ValueError that names it."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


def fraction(name: str, value: float) -> float:
    """Return `value` if it lies in [0, 1), else raise a ValueError that names it."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must lie in [0, 1), got {value!r}")
    return float(value)


def group_norm(channels: int, groups: int = 8) -> nn.GroupNorm:
    """GroupNorm with the largest number of groups up to `groups` that divides `channels`."""
    return nn.GroupNorm(math.gcd(groups, channels), channels)


class TimeFeatures(nn.Module):
    """Sinusoidal features of a real time label, (B,) -> (B, 2 * count + 1).

    Angular frequencies are geometric from 1 to `fastest`, so one set serves t in [0, 1] (the
    smallest times of VP differ by 1e-3) and log(sigma)/4 in about [-1.6, 1.1]; the label itself is
    appended. After Vaswani et al. 2017, section 3.5.
    """

    frequencies: Tensor

    def __init__(self, count: int = 16, fastest: float = 300.0) -> None:
        super().__init__()
        positive("count", count)
        exponent = torch.linspace(0.0, math.log(fastest), count)
        self.register_buffer("frequencies", exponent.exp(), persistent=False)
        self.size = 2 * count + 1

    def forward(self, label: Tensor) -> Tensor:
        """(B,) labels -> (B, size) features."""
        angle = label[:, None] * self.frequencies
        return torch.cat([angle.sin(), angle.cos(), label[:, None]], dim=1)


class Conditioning(nn.Module):
    """Time and class label to one vector, (B,), (B,) -> (B, width).

    The class embedding has one row more than there are classes: the null label, with which the
    network is unconditional (Ho and Salimans 2022). It starts at zero, so an untrained network
    ignores its label.

    Args:
        width: of the vector.
        num_classes: classes, or None.
        time_embedding: False leaves the time label out, for networks that are blind to the noise
            level (NCSNv2: Song & Ermon 2020, arXiv:2006.09011, section 3.2); without classes too
            there is then nothing to embed, and the result is None.
    """

    def __init__(self, width: int, num_classes: int | None, *, time_embedding: bool = True) -> None:
        super().__init__()
        if num_classes is not None:
            positive("num_classes", num_classes)
        self.num_classes = num_classes
        self.width: int | None = width if time_embedding or num_classes is not None else None
        self.features: TimeFeatures | None = None
        if time_embedding:
            self.features = TimeFeatures()
            self.first = nn.Linear(self.features.size, width)
            self.second = nn.Linear(width, width)
        self.classes: nn.Embedding | None = None
        if num_classes is not None:
            self.classes = nn.Embedding(num_classes + 1, width)
            nn.init.zeros_(self.classes.weight)

    @property
    def null_label(self) -> int | None:
        """The label that stands for no label, or None for an unconditional network."""
        return self.num_classes

    def forward(self, time_label: Tensor, label: Tensor | None) -> Tensor | None:
        """Embed (B,) time labels and (B,) labels; no label is the null label."""
        hidden: Tensor | None = None
        if self.features is not None:
            hidden = self.second(nn.functional.silu(self.first(self.features(time_label))))
        if self.classes is None:
            if label is not None:
                raise ValueError(
                    "label was given to an unconditional network (num_classes=None); leave it out"
                )
            return None if hidden is None else nn.functional.silu(hidden)
        if label is None:
            own = self.classes.weight[-1:].expand(time_label.shape[0], -1)
        else:
            own = self.classes(label)
        return nn.functional.silu(own if hidden is None else hidden + own)
