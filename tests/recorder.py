"""A network that remembers what it was called with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Recorder(nn.Module):
    """Remembers its arguments."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, ...]] = []
        for key, value in attributes.items():
            setattr(self, key, value)

    @staticmethod
    def output(x: Tensor) -> Tensor:
        return torch.sin(x)

    def forward(self, *arguments: Tensor) -> Tensor:
        self.calls.append(arguments)
        return self.output(arguments[0])
