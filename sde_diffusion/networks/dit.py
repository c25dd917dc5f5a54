"""A diffusion transformer for images (C, H, W)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sde_diffusion.networks.embedding import Conditioning, fraction, positive
from sde_diffusion.networks.unet import image_shape

__all__ = ["DiT"]


class _Block(nn.Module):
    """Attention and an MLP over tokens, each scaled, shifted and gated by the condition.

    The gates start at zero (adaLN-Zero: Peebles & Xie 2023, arXiv:2212.09748, section 3.2), so that
    an untrained block is the identity.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_mix = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.inlet = nn.Linear(width, 3 * width)
        self.outlet = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        hidden = round(mlp_ratio * width)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(approximate="tanh"),
            nn.Dropout(dropout),
            nn.Linear(hidden, width),
        )
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        """(B, tokens, width), (B, width) -> (B, tokens, width)."""
        shift_mix, scale_mix, gate_mix, shift_mlp, scale_mlp, gate_mlp = self.modulation(condition)[
            :, None
        ].chunk(6, dim=-1)
        h = h + gate_mix * self._attend(_modulated(self.norm_mix(h), scale_mix, shift_mix))
        return h + gate_mlp * self.mlp(_modulated(self.norm_mlp(h), scale_mlp, shift_mlp))

    def _attend(self, h: Tensor) -> Tensor:
        batch, tokens, width = h.shape
        parts = self.inlet(h).reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.outlet(mixed.transpose(1, 2).reshape(batch, tokens, width))


def _modulated(h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(shift, h, 1 + scale)


def _positions(rows: int, columns: int, width: int) -> Tensor:
    """Sines and cosines of a token's row and column, (rows * columns, width)."""
    frequencies = 10_000.0 ** (-torch.arange(width // 4) / (width // 4))
    angles = [torch.arange(n)[:, None] * frequencies for n in (rows, columns)]
    down, across = (torch.cat([a.sin(), a.cos()], dim=1) for a in angles)
    return torch.cat(
        [down[:, None].expand(-1, columns, -1), across[None].expand(rows, -1, -1)], dim=2
    ).reshape(rows * columns, -1)


class DiT(nn.Module):
    """Diffusion transformer: ``net(x, time_label, label=None)``, (B, C, H, W) -> the same.

    After Peebles & Xie 2023, arXiv:2212.09748: patches are tokens, their places fixed sines, time
    and class enter by adaLN-Zero.

    Args:
        event_shape: (C, H, W); H and W multiples of `patch_size`.
        num_classes: classes it is conditional on, or None; label `num_classes` is the null label.
        width: of a token; a multiple of 4 and of `heads`.
        depth: number of blocks.
        heads: attention heads.
        patch_size: pixels per side of a token.
        mlp_ratio: hidden units of a block's MLP by `width`, above 0.
        dropout: in the MLPs, in [0, 1); drawn from torch's global generator while the network is in
            training mode.

    It keeps no running statistics: an average of its parameters is an average of the network.
    """

    positions: Tensor

    def __init__(
        self,
        event_shape: Sequence[int],
        num_classes: int | None = None,
        *,
        width: int = 192,
        depth: int = 6,
        heads: int = 3,
        patch_size: int = 2,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in {
            "width": width,
            "depth": depth,
            "heads": heads,
            "patch_size": patch_size,
        }.items():
            positive(name, value)
        if width % 4 or width % heads:
            raise ValueError(f"width must be a multiple of 4 and of heads={heads}, got {width}")
        if not mlp_ratio > 0:
            raise ValueError(f"mlp_ratio must be above 0, got {mlp_ratio!r}")
        self.event_shape = image_shape(event_shape, patch_size)
        self.num_classes = num_classes
        self.settings: dict[str, Any] = {
            "width": width,
            "depth": depth,
            "heads": heads,
            "patch_size": patch_size,
            "mlp_ratio": float(mlp_ratio),
            "dropout": fraction("dropout", dropout),
        }
        self.patch_size = patch_size
        channels, height, across = self.event_shape
        self.grid = (height // patch_size, across // patch_size)
        self.condition = Conditioning(width, num_classes)
        self.inlet = nn.Linear(channels * patch_size**2, width)
        self.register_buffer("positions", _positions(*self.grid, width), persistent=False)
        self.blocks = nn.ModuleList(_Block(width, heads, mlp_ratio, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(width, 2 * width)
        self.outlet = nn.Linear(width, channels * patch_size**2)
        for layer in (self.modulation, self.outlet):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @property
    def null_label(self) -> int | None:
        """The label that stands for no label, or None for an unconditional network."""
        return self.num_classes

    def config(self) -> dict[str, Any]:
        """JSON-able description from which `build_network` makes the same network."""
        return {
            "kind": "dit",
            "event_shape": list(self.event_shape),
            "num_classes": self.num_classes,
            **self.settings,
        }

    def forward(self, x: Tensor, time_label: Tensor, label: Tensor | None = None) -> Tensor:
        """Estimate of the network's target at x (B, C, H, W), labels (B,)."""
        condition = self.condition(time_label, label)
        h = nn.functional.pixel_unshuffle(x, self.patch_size).flatten(2).transpose(1, 2)
        h = self.inlet(h) + self.positions
        for block in self.blocks:
            h = block(h, condition)
        scale, shift = self.modulation(condition)[:, None].chunk(2, dim=-1)
        h = self.outlet(_modulated(self.norm(h), scale, shift))
        h = h.transpose(1, 2).reshape(x.shape[0], -1, *self.grid)
        return nn.functional.pixel_shuffle(h, self.patch_size)
