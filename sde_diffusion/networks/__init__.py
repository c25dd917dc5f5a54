"""Score networks and classifiers, built from JSON-able configurations."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from sde_diffusion.errors import unknown_name
from sde_diffusion.networks.classifier import (
    ClassifierNet,
    FeatureMap,
    JudgeNet,
    NoisedClassifier,
    RandomFeatures,
)
from sde_diffusion.networks.dit import DiT
from sde_diffusion.networks.mlp import MLP
from sde_diffusion.networks.sizes import sized_score_config
from sde_diffusion.networks.unet import UNet

__all__ = [
    "MLP",
    "ClassifierNet",
    "DiT",
    "FeatureMap",
    "JudgeNet",
    "NoisedClassifier",
    "RandomFeatures",
    "UNet",
    "build_network",
    "default_score_config",
    "sized_score_config",
]

_KINDS: dict[str, type[nn.Module]] = {
    "mlp": MLP,
    "unet": UNet,
    "dit": DiT,
    "classifier": ClassifierNet,
    "judge": JudgeNet,
    "random_features": RandomFeatures,
}


def build_network(config: dict[str, Any]) -> nn.Module:
    """Build a network from ``{"kind": ..., "event_shape": [...], ...settings}``.

    Kinds: mlp, unet, dit (score networks), classifier (of noised inputs), judge and random_features
    (of clean ones). Every network's ``config()`` gives back what it was built from.

    Raises:
        ValueError: no kind, an unknown kind (the nearest one is named), or settings it does not
            have.
    """
    settings = dict(config)
    kind = settings.pop("kind", None)
    if kind not in _KINDS:
        raise unknown_name("network kind", kind, _KINDS)
    known = inspect.signature(_KINDS[kind]).parameters
    for name in settings:
        if name not in known:
            raise unknown_name(f"setting of network {kind!r}", name, known)
    try:
        return _KINDS[kind](**settings)
    except TypeError as error:
        raise ValueError(f"network {kind!r} cannot be built from {settings}: {error}") from error


def default_score_config(event_shape: Sequence[int], num_classes: int | None) -> dict[str, Any]:
    """The score network that `train` takes where none is named: U-Net for images, else MLP.

    Images of even sides from 8 pixels on are folded by 2; levels are added while the smaller side
    stays even and at least 4, up to three.
    """
    shape = [int(n) for n in event_shape]
    common: dict[str, Any] = {"event_shape": shape, "num_classes": num_classes}
    if len(shape) != 3 or min(shape[1:]) < 4:
        return {"kind": "mlp", **common, "width": 128, "blocks": 3}
    patch = 2 if min(shape[1:]) >= 8 and all(n % 2 == 0 for n in shape[1:]) else 1
    height, width = shape[1] // patch, shape[2] // patch
    widths = (48, 64, 96)
    levels = 1
    while levels < len(widths) and min(height, width) >= 4 and height % 2 == 0 and width % 2 == 0:
        height, width = height // 2, width // 2
        levels += 1
    return {
        "kind": "unet",
        **common,
        "channels": list(widths[:levels]),
        "blocks": 1,
        "patch_size": patch,
    }
