"""Score networks for images by their number of parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from sde_diffusion.errors import unknown_name
from sde_diffusion.networks.dit import DiT
from sde_diffusion.networks.unet import UNet

__all__ = ["SIZES", "sized_score_config"]

SIZES = {"tiny": 0.5e6, "small": 2.5e6, "base": 12e6, "large": 60e6}
FEWEST, MOST = 0.2e6, 500e6
ATTENTION_HEIGHT = 16


def sized_score_config(
    event_shape: Sequence[int],
    num_classes: int | None,
    size: str | float = "small",
    *,
    kind: str = "unet",
    patch_size: int | None = None,
    dropout: float = 0.0,
) -> dict[str, Any]:
    """Configuration of a U-Net or DiT with about as many parameters as asked for.

    The shape of the network is fixed by the image, and its width is then the one whose number of
    parameters is nearest to `size`.

    U-Net: images larger than 32 pixels are folded by 2; up to four levels, of 1, 2, 2, 2 times the
    first one's width, as long as the smaller side stays at least 4; two residual blocks per level;
    attention on the levels below the first whose feature map is at most 16 high.
    DiT: patches of 2 pixels (4 above 32); heads of 32 to 64; depth 6 up to 4 million parameters,
    else 12.

    Args:
        event_shape: (C, H, W).
        num_classes: classes it is conditional on, or None.
        size: ``tiny`` (0.5 million parameters), ``small`` (2.5), ``base`` (12), ``large`` (60), or
            a number of parameters from 0.2 to 500 million.
        kind: ``unet`` or ``dit``.
        patch_size: pixels per side that are folded (U-Net) or make a token (DiT), in place of the
            rule above; larger is cheaper.
        dropout: as in `UNet` and `DiT`.

    Raises:
        ValueError: unknown names, a size out of range, or no image.
    """
    wanted = _parameters(size)
    if kind not in _WIDTHS:
        raise unknown_name("kind of a sized score network", kind, _WIDTHS)
    shape = [int(n) for n in event_shape]
    if len(shape) != 3:
        raise ValueError(f"event_shape must be an image (C, H, W), got {tuple(shape)}")
    step, fold = _WIDTHS[kind], patch_size or _fold(shape, kind)

    def config(units: int) -> dict[str, Any]:
        width = units * step
        own = _unet(shape, width, fold) if kind == "unet" else _dit(width, wanted)
        common = {"kind": kind, "event_shape": shape, "num_classes": num_classes}
        return {**common, **own, "patch_size": fold, "dropout": dropout}

    # Every layer is a width, or the image's channels, by another, so that the number of parameters
    # is a quadratic of the width, and three of them tell all.
    one, two, three = (parameters_of(config(units)) for units in (1, 2, 3))
    square = (three - 2 * two + one) / 2
    slope = two - one - 3 * square
    rest = one - slope - square
    root = (math.sqrt(slope**2 + 4 * square * max(0.0, wanted - rest)) - slope) / (2 * square)
    units = max(1, math.floor(root))
    nearest = min((units, units + 1), key=lambda n: abs(square * n**2 + slope * n + rest - wanted))
    return config(nearest)


def parameters_of(config: dict[str, Any]) -> int:
    """Number of parameters of a U-Net or DiT, found without making its weights."""
    settings = dict(config)
    make = UNet if settings.pop("kind") == "unet" else DiT
    with torch.device("meta"):
        return sum(weight.numel() for weight in make(**settings).parameters())


_WIDTHS = {"unet": 4, "dit": 24}


def _parameters(size: str | float) -> float:
    if isinstance(size, str):
        if size not in SIZES:
            raise unknown_name("size", size, SIZES)
        return SIZES[size]
    if isinstance(size, bool) or not FEWEST <= size <= MOST:
        raise ValueError(
            f"size must be one of {', '.join(SIZES)} or a number of parameters from "
            f"{FEWEST:,.0f} to {MOST:,.0f}, got {size!r}"
        )
    return float(size)


def _fold(shape: list[int], kind: str) -> int:
    largest = (2 if max(shape[1:]) > 32 else 1) * (2 if kind == "dit" else 1)
    return next(n for n in (4, 2, 1) if n <= largest and all(side % n == 0 for side in shape[1:]))


def _unet(shape: list[int], width: int, fold: int) -> dict[str, Any]:
    sides = [n // fold for n in shape[1:]]
    heights = [sides[0]]
    while len(heights) < 4 and all(n % 2 == 0 and n >= 8 for n in sides):
        sides = [n // 2 for n in sides]
        heights.append(sides[0])
    return {
        "channels": [width] + [2 * width] * (len(heights) - 1),
        "blocks": 2,
        "embedding": 4 * width,
        "attention": [n for n in heights[1:] if n <= ATTENTION_HEIGHT],
    }


def _dit(width: int, wanted: float) -> dict[str, Any]:
    heads = next(n for n in range(max(1, width // 48), 0, -1) if width % n == 0)
    return {"width": width, "depth": 6 if wanted <= 4e6 else 12, "heads": heads}
