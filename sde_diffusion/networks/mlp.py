"""A residual MLP for vectors (D,), and for scalars ()."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from sde_diffusion.networks.embedding import Conditioning, positive

__all__ = ["MLP"]


class _Block(nn.Module):
    def __init__(self, width: int, embedding: int | None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.film = None if embedding is None else nn.Linear(embedding, 2 * width)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, h: Tensor, condition: Tensor | None) -> Tensor:
        inner = self.norm(h)
        if self.film is not None:
            scale, shift = self.film(condition).chunk(2, dim=1)
            inner = inner * (1 + scale) + shift
        return h + self.second(nn.functional.silu(self.first(nn.functional.silu(inner))))


class MLP(nn.Module):
    """Residual MLP score network: ``net(x, time_label, label=None)``, (B, *event) -> (B, *event).

    Args:
        event_shape: shape of one sample, (D,), () or anything; it is flattened inside.
        num_classes: classes it is conditional on, or None; label `num_classes` is the null label.
        width: hidden units.
        blocks: residual blocks, each of two linear layers, modulated by time and class (FiLM).
        time_embedding: False: the network is blind to the time label, which it still takes.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        num_classes: int | None = None,
        *,
        width: int = 128,
        blocks: int = 3,
        time_embedding: bool = True,
    ) -> None:
        super().__init__()
        positive("width", width)
        positive("blocks", blocks)
        self.event_shape = tuple(int(n) for n in event_shape)
        size = math.prod(self.event_shape)
        self.num_classes = num_classes
        self.settings: dict[str, Any] = {"width": width, "blocks": blocks}
        if not time_embedding:
            self.settings["time_embedding"] = False
        self.condition = Conditioning(width, num_classes, time_embedding=time_embedding)
        self.inlet = nn.Linear(size, width)
        self.blocks = nn.ModuleList(_Block(width, self.condition.width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.outlet = nn.Linear(width, size)
        nn.init.zeros_(self.outlet.weight)
        nn.init.zeros_(self.outlet.bias)

    @property
    def null_label(self) -> int | None:
        """The label that stands for no label, or None for an unconditional network."""
        return self.num_classes

    def config(self) -> dict[str, Any]:
        """JSON-able description from which `build_network` makes the same network."""
        return {
            "kind": "mlp",
            "event_shape": list(self.event_shape),
            "num_classes": self.num_classes,
            **self.settings,
        }

    def forward(self, x: Tensor, time_label: Tensor, label: Tensor | None = None) -> Tensor:
        """Estimate of the network's target at x (B, *event), labels (B,)."""
        condition = self.condition(time_label, label)
        h = self.inlet(x.reshape(x.shape[0], -1))
        for block in self.blocks:
            h = block(h, condition)
        return self.outlet(nn.functional.silu(self.norm(h))).reshape(x.shape)
