"""A small U-Net for images (C, H, W)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sde_diffusion.networks.embedding import Conditioning, group_norm, positive

__all__ = ["ResidualBlock", "UNet", "image_shape"]


def image_shape(event_shape: Sequence[int], factor: int) -> tuple[int, int, int]:
    """Check that an event shape is an image (C, H, W) whose H and W `factor` divides."""
    shape = tuple(int(n) for n in event_shape)
    if len(shape) != 3:
        raise ValueError(
            f"event_shape must be an image (C, H, W), got {shape}; use kind 'mlp' for vectors"
        )
    if shape[1] % factor or shape[2] % factor:
        raise ValueError(
            f"event_shape {shape} cannot be reduced by {factor}: H and W must be multiples of it; "
            "use fewer levels in channels, or a smaller patch_size"
        )
    return shape[0], shape[1], shape[2]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a residual, modulated by a condition vector (FiLM).

    GroupNorm - SiLU - conv - GroupNorm * (1 + scale) + shift - SiLU - conv, the last one starting
    at zero (Ho et al. 2020; scale-shift norm after Dhariwal and Nichol 2021).
    """

    def __init__(self, inputs: int, outputs: int, embedding: int) -> None:
        super().__init__()
        self.norm_in = group_norm(inputs)
        self.conv_in = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.film = nn.Linear(embedding, 2 * outputs)
        self.norm_out = group_norm(outputs)
        self.conv_out = nn.Conv2d(outputs, outputs, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        self.bypass: nn.Module = (
            nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)
        )

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        """(B, inputs, H, W), (B, embedding) -> (B, outputs, H, W)."""
        scale, shift = self.film(condition)[:, :, None, None].chunk(2, dim=1)
        inner = self.conv_in(nn.functional.silu(self.norm_in(h)))
        inner = torch.addcmul(shift, self.norm_out(inner), 1 + scale)
        return self.bypass(h) + self.conv_out(nn.functional.silu(inner))


class UNet(nn.Module):
    """Small U-Net score network: ``net(x, time_label, label=None)``, (B, C, H, W) -> the same.

    Args:
        event_shape: (C, H, W); H and W multiples of ``patch_size * 2 ** (len(channels) - 1)``.
        num_classes: classes it is conditional on, or None; label `num_classes` is the null label.
        channels: width of each level; every further level has half the resolution.
        blocks: residual blocks per level on the way down, and again on the way up.
        patch_size: pixels per side that are folded into channels before the first level
            (space-to-depth): 2 makes every level four times cheaper.
        embedding: width of the time and class embedding.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        num_classes: int | None = None,
        *,
        channels: Sequence[int] = (48, 64),
        blocks: int = 1,
        patch_size: int = 2,
        embedding: int = 96,
    ) -> None:
        super().__init__()
        widths = [positive("channels", width) for width in channels]
        if not widths:
            raise ValueError("channels must name at least one level, got an empty list")
        positive("blocks", blocks)
        positive("patch_size", patch_size)
        positive("embedding", embedding)
        self.event_shape = image_shape(event_shape, patch_size * 2 ** (len(widths) - 1))
        self.num_classes = num_classes
        self.settings = {
            "channels": widths,
            "blocks": blocks,
            "patch_size": patch_size,
            "embedding": embedding,
        }
        folded = self.event_shape[0] * patch_size**2
        self.patch_size = patch_size
        self.condition = Conditioning(embedding, num_classes)
        self.inlet = nn.Conv2d(folded, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        skips: list[int] = []
        width = widths[0]
        for level, outputs in enumerate(widths):
            if level:
                self.down.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
            for _ in range(blocks):
                self.down.append(ResidualBlock(width, outputs, embedding))
                width = outputs
                skips.append(width)
        self.middle = ResidualBlock(width, width, embedding)
        for level, outputs in reversed(list(enumerate(widths))):
            for _ in range(blocks):
                self.up.append(ResidualBlock(width + skips.pop(), outputs, embedding))
                width = outputs
            if level:
                self.up.append(nn.Upsample(scale_factor=2, mode="nearest"))
        self.norm = group_norm(width)
        self.outlet = nn.Conv2d(width, folded, 3, padding=1)
        nn.init.zeros_(self.outlet.weight)
        for weight in self.parameters():
            if weight.ndim == 4:  # a third faster on a CPU, with the same values
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)

    @property
    def null_label(self) -> int | None:
        """The label that stands for no label, or None for an unconditional network."""
        return self.num_classes

    def config(self) -> dict[str, Any]:
        """JSON-able description from which `build_network` makes the same network."""
        return {
            "kind": "unet",
            "event_shape": list(self.event_shape),
            "num_classes": self.num_classes,
            **self.settings,
        }

    def forward(self, x: Tensor, time_label: Tensor, label: Tensor | None = None) -> Tensor:
        """Estimate of the network's target at x (B, C, H, W), labels (B,)."""
        condition = self.condition(time_label, label)
        h = nn.functional.pixel_unshuffle(x, self.patch_size) if self.patch_size > 1 else x
        h = self.inlet(h)
        skips: list[Tensor] = []
        for module in self.down:
            h = module(h, condition) if isinstance(module, ResidualBlock) else module(h)
            if isinstance(module, ResidualBlock):
                skips.append(h)
        h = self.middle(h, condition)
        for module in self.up:
            if isinstance(module, ResidualBlock):
                h = module(torch.cat([h, skips.pop()], dim=1), condition)
            else:
                h = module(h)
        h = self.outlet(nn.functional.silu(self.norm(h)))
        return nn.functional.pixel_shuffle(h, self.patch_size) if self.patch_size > 1 else h
