"""A U-Net for images (C, H, W), from half a million parameters to sixty million and more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sde_diffusion.networks.embedding import Conditioning, fraction, group_norm, positive

__all__ = ["Attention", "ResidualBlock", "UNet", "image_shape"]


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


class Attention(nn.Module):
    """Self-attention over the pixels of a feature map, around a residual that starts at zero.

    Args:
        width: channels.
        head_width: channels per head, about: the number of heads is the largest up to
            ``width / head_width`` that divides `width`.
    """

    def __init__(self, width: int, head_width: int = 64) -> None:
        super().__init__()
        self.heads = next(n for n in range(max(1, width // head_width), 0, -1) if width % n == 0)
        self.norm = group_norm(width)
        self.inlet = nn.Conv2d(width, 3 * width, 1)
        self.outlet = nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.outlet.weight)

    def forward(self, h: Tensor) -> Tensor:
        """(B, width, H, W) -> the same."""
        # (B, 3, heads, head, pixels) -> three of (B, heads, pixels, head)
        parts = self.inlet(self.norm(h)).reshape(h.shape[0], 3, self.heads, -1, h[0, 0].numel())
        query, key, value = parts.transpose(-1, -2).unbind(1)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return h + self.outlet(mixed.transpose(-1, -2).reshape(h.shape))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a residual, modulated by a condition vector (FiLM).

    GroupNorm - SiLU - conv - GroupNorm * (1 + scale) + shift - SiLU - dropout - conv, the last one
    starting at zero (Ho et al. 2020; scale-shift norm after Dhariwal and Nichol 2021).

    Args:
        inputs: channels of what comes in.
        outputs: channels of what goes out.
        embedding: width of the condition vector; None: there is none.
        dropout: share of the hidden values that are dropped in training, in [0, 1).
        attention: whether self-attention follows.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding: int | None,
        *,
        dropout: float = 0.0,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.norm_in = group_norm(inputs)
        self.conv_in = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.film = None if embedding is None else nn.Linear(embedding, 2 * outputs)
        self.norm_out = group_norm(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = nn.Conv2d(outputs, outputs, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        self.bypass: nn.Module = (
            nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)
        )
        self.attention: nn.Module = Attention(outputs) if attention else nn.Identity()

    def forward(self, h: Tensor, condition: Tensor | None) -> Tensor:
        """(B, inputs, H, W), (B, embedding) -> (B, outputs, H, W)."""
        inner = self.norm_out(self.conv_in(nn.functional.silu(self.norm_in(h))))
        if self.film is not None:
            scale, shift = self.film(condition)[:, :, None, None].chunk(2, dim=1)
            inner = torch.addcmul(shift, inner, 1 + scale)
        inner = self.dropout(nn.functional.silu(inner))
        return self.attention(self.bypass(h) + self.conv_out(inner))


class UNet(nn.Module):
    """U-Net score network: ``net(x, time_label, label=None)``, (B, C, H, W) -> the same.

    Args:
        event_shape: (C, H, W); H and W multiples of ``patch_size * 2 ** (len(channels) - 1)``.
        num_classes: classes it is conditional on, or None; label `num_classes` is the null label.
        channels: width of each level; every further level has half the resolution.
        blocks: residual blocks per level on the way down, and again on the way up.
        patch_size: pixels per side that are folded into channels before the first level
            (space-to-depth): 2 makes every level four times cheaper.
        embedding: width of the time and class embedding.
        attention: heights of the feature maps that self-attention goes over, after every residual
            block there, and in the middle where the lowest is among them. The first map has the
            image's height divided by `patch_size`, every further level half of it.
        dropout: in the residual blocks, in [0, 1); drawn from torch's global generator while the
            network is in training mode.
        time_embedding: False: the network is blind to the time label, which it still takes
            (NCSNv2: a score network divided by sigma, `ScoreModel(divide_by_sigma=True)`).

    It keeps no running statistics: an average of its parameters is an average of the network.
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
        attention: Sequence[int] = (),
        dropout: float = 0.0,
        time_embedding: bool = True,
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
        heights = [self.event_shape[1] // patch_size // 2**level for level in range(len(widths))]
        for height in attention:
            if height not in heights:
                raise ValueError(
                    f"attention names the height {height}, and the feature maps have heights "
                    f"{', '.join(map(str, heights))}; choose among these"
                )
        fraction("dropout", dropout)
        self.settings: dict[str, Any] = {
            "channels": widths,
            "blocks": blocks,
            "patch_size": patch_size,
            "embedding": embedding,
        }
        # Only where they are asked for: configurations of earlier models stay as they are.
        later = {"attention": list(attention), "dropout": dropout}
        self.settings |= {name: value for name, value in later.items() if value}
        if not time_embedding:
            self.settings["time_embedding"] = False
        folded = self.event_shape[0] * patch_size**2
        self.patch_size = patch_size
        self.condition = Conditioning(embedding, num_classes, time_embedding=time_embedding)

        def block(inputs: int, outputs: int, level: int) -> ResidualBlock:
            attends = heights[level] in attention
            return ResidualBlock(
                inputs, outputs, self.condition.width, dropout=dropout, attention=attends
            )

        self.inlet = nn.Conv2d(folded, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        skips: list[int] = []
        width = widths[0]
        for level, outputs in enumerate(widths):
            if level:
                self.down.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
            for _ in range(blocks):
                self.down.append(block(width, outputs, level))
                width = outputs
                skips.append(width)
        self.middle = block(width, width, len(widths) - 1)
        for level, outputs in reversed(list(enumerate(widths))):
            for _ in range(blocks):
                self.up.append(block(width + skips.pop(), outputs, level))
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
