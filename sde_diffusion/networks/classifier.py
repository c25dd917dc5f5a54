"""Classifiers: one of noised inputs, that guides; one of clean inputs, that judges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sde_diffusion.broadcast import expand
from sde_diffusion.networks.embedding import Conditioning, group_norm, positive
from sde_diffusion.samples import Samples, chunks
from sde_diffusion.sde import NoiseLevel

__all__ = ["ClassifierNet", "FeatureMap", "JudgeNet", "NoisedClassifier", "RandomFeatures"]

_MOST_DIMENSIONS = 2048


class FeatureMap(Protocol):
    """What a judge is to a metric: clean samples (B, *event) -> features (B, F)."""

    def features(self, x: Tensor) -> Tensor:
        """Features of clean samples in the model's range [-1, 1]."""
        ...


def _require_classes(num_classes: int | None) -> int:
    if num_classes is None:
        raise ValueError("num_classes must be a positive integer for a classifier, got None")
    return positive("num_classes", num_classes)


def _first_patch(event_shape: tuple[int, ...]) -> int:
    """2 where an image is even and at least 8 pixels wide (pixels are then folded), else 1."""
    return 2 if min(event_shape[1:]) >= 8 and all(n % 2 == 0 for n in event_shape[1:]) else 1


class _ConvTrunk(nn.Module):
    """Two stages of convolutions over an image, (B, C, H, W) -> (B, size)."""

    def __init__(self, event_shape: tuple[int, ...], width: int) -> None:
        super().__init__()
        patch = _first_patch(event_shape)
        self.fold = nn.PixelUnshuffle(patch) if patch > 1 else nn.Identity()
        side = [n // patch for n in event_shape[1:]]
        # Images larger than 16 cells are brought down first, so that the last stage stays small.
        early = 2 if max(side) > 16 else 1
        self.first = nn.Conv2d(event_shape[0] * patch**2, width, 3, stride=early, padding=1)
        self.norm_first = group_norm(width)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.norm_second = group_norm(width)
        self.third = nn.Conv2d(width, width, 3, stride=2, padding=1)
        cells = [min(2, math.ceil(math.ceil(n / early) / 2)) for n in side]
        self.pool = nn.AdaptiveAvgPool2d((cells[0], cells[1]))
        self.size = width * cells[0] * cells[1]

    def forward(self, x: Tensor, condition: tuple[Tensor, Tensor] | None) -> Tensor:
        h = self.norm_first(self.first(self.fold(x)))
        if condition is not None:
            scale, shift = condition
            h = torch.addcmul(shift[:, :, None, None], h, 1 + scale[:, :, None, None])
        h = nn.functional.silu(h)
        h = nn.functional.silu(self.norm_second(self.second(h)))
        return self.pool(nn.functional.silu(self.third(h))).flatten(1)


class _DenseTrunk(nn.Module):
    """Two linear layers over a flattened event, (B, *event) -> (B, size)."""

    def __init__(self, event_shape: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.first = nn.Linear(math.prod(event_shape), width)
        self.norm = nn.LayerNorm(width)
        self.second = nn.Linear(width, width)
        self.size = width

    def forward(self, x: Tensor, condition: tuple[Tensor, Tensor] | None) -> Tensor:
        h = self.norm(self.first(x.reshape(x.shape[0], -1)))
        if condition is not None:
            h = torch.addcmul(condition[1], h, 1 + condition[0])
        return nn.functional.silu(self.second(nn.functional.silu(h)))


def _trunk(event_shape: tuple[int, ...], width: int) -> _ConvTrunk | _DenseTrunk:
    convolutional = len(event_shape) == 3 and min(event_shape[1:]) >= 4
    return (_ConvTrunk if convolutional else _DenseTrunk)(event_shape, width)


class ClassifierNet(nn.Module):
    """Classifier of noised inputs of unit scale: ``net(x, time_label)`` -> logits (B, num_classes).

    Args:
        event_shape: shape of one sample; (C, H, W) gets convolutions, anything else linear layers.
        num_classes: number of classes.
        width: channels or hidden units.
    """

    def __init__(
        self, event_shape: Sequence[int], num_classes: int | None, *, width: int = 64
    ) -> None:
        super().__init__()
        self.event_shape = tuple(int(n) for n in event_shape)
        self.num_classes = _require_classes(num_classes)
        self.width = positive("width", width)
        self.condition = Conditioning(width, None)
        self.film = nn.Linear(width, 2 * width)
        self.trunk = _trunk(self.event_shape, width)
        self.hidden = nn.Linear(self.trunk.size, width)
        self.head = nn.Linear(width, self.num_classes)

    def config(self) -> dict[str, Any]:
        """JSON-able description from which `build_network` makes the same network."""
        return {
            "kind": "classifier",
            "event_shape": list(self.event_shape),
            "num_classes": self.num_classes,
            "width": self.width,
        }

    def forward(self, x: Tensor, time_label: Tensor) -> Tensor:
        """(B, *event) of about unit scale and (B,) time labels -> (B, num_classes) logits."""
        scale, shift = self.film(self.condition(time_label, None)).chunk(2, dim=1)
        h = self.trunk(x, (scale, shift))
        return self.head(nn.functional.silu(self.hidden(h)))


class NoisedClassifier(nn.Module):
    """A `ClassifierNet` as guidance calls it: ``classifier(x, level)`` -> logits (B, num_classes).

    The input is divided by ``sqrt(alpha^2 + sigma^2)``, so it has about unit scale at every level
    of every SDE, and the time label is ``-half_log_snr / 4 = log(sigma / alpha) / 4``, the c_noise
    of Karras et al. 2022 (table 1).
    """

    def __init__(self, net: ClassifierNet) -> None:
        super().__init__()
        self.net = net

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.net.num_classes

    def forward(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """Logits of p(y | x_t) for x (B, *event) at a level whose fields are 0-d or (B,)."""
        scale = torch.rsqrt(level.alpha**2 + level.sigma**2)
        label = (-0.25 * level.half_log_snr).to(x.dtype).expand(x.shape[0])
        return self.net(x * expand(scale, x), label)


class JudgeNet(nn.Module):
    """Classifier of clean samples that guidance never sees: accuracy of labels, and features.

    `features` is the penultimate layer, in whose space the Fréchet distance is taken.

    Args:
        event_shape: shape of one sample.
        num_classes: number of classes.
        width: channels or hidden units.
        size: number of features.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        num_classes: int | None,
        *,
        width: int = 32,
        size: int = 48,
    ) -> None:
        super().__init__()
        self.event_shape = tuple(int(n) for n in event_shape)
        self.num_classes = _require_classes(num_classes)
        self.settings = {"width": positive("width", width), "size": positive("size", size)}
        self.trunk = _trunk(self.event_shape, width)
        self.hidden = nn.Linear(self.trunk.size, size)
        self.head = nn.Linear(size, self.num_classes)

    def config(self) -> dict[str, Any]:
        """JSON-able description from which `build_network` makes the same network."""
        return {
            "kind": "judge",
            "event_shape": list(self.event_shape),
            "num_classes": self.num_classes,
            **self.settings,
        }

    def features(self, x: Tensor) -> Tensor:
        """Clean samples (B, *event) in [-1, 1] -> (B, size) features."""
        return nn.functional.silu(self.hidden(self.trunk(x, None)))

    def forward(self, x: Tensor) -> Tensor:
        """Clean samples (B, *event) -> (B, num_classes) logits."""
        return self.head(self.features(x))


def _principal_components(x: Samples, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (D,), the leading variances (kept,) and their directions (D, kept), in float64."""
    dimensions = math.prod(x.shape[1:])
    if dimensions > _MOST_DIMENSIONS:
        places = torch.linspace(0, len(x) - 1, min(len(x), _MOST_DIMENSIONS)).round().long()
        flat = x[places].reshape(len(places), -1).double()
        centre = flat.mean(0)
        _, singular, directions = torch.linalg.svd(flat - centre, full_matrices=False)
        values, vectors = singular.square() / len(flat), directions.T
        if len(values) < kept:  # fewer samples than components: the others have no variance
            values = nn.functional.pad(values, (0, kept - len(values)))
            vectors = nn.functional.pad(vectors, (0, kept - vectors.shape[1]))
        return centre, values[:kept].flip(0), vectors[:, :kept].flip(1)
    centre = torch.zeros(dimensions, dtype=torch.float64)
    for part in chunks(x):
        centre += part.reshape(len(part), -1).double().sum(0) / len(x)
    covariance = torch.zeros(dimensions, dimensions, dtype=torch.float64)
    for part in chunks(x):
        flat = part.reshape(len(part), -1).double() - centre
        covariance += flat.T @ flat / len(x)
    values, vectors = torch.linalg.eigh(covariance)
    return centre, values[-kept:], vectors[:, -kept:]


class RandomFeatures(nn.Module):
    """Features of data without labels: whitened principal components through random tanh units.

    ``features(x) = tanh(W z + b)``, with ``z`` the whitened leading components of the training data
    and W, b drawn once by a seed. Nothing is trained; the nonlinearity lets a Fréchet distance see
    more than the mean and the covariance of x. `fit` sets it from data.

    Args:
        event_shape: shape of one sample.
        components: principal components kept, at most the number of event dimensions.
        size: number of features.
    """

    projection: Tensor
    centre: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, event_shape: Sequence[int], *, components: int = 16, size: int = 48) -> None:
        super().__init__()
        self.event_shape = tuple(int(n) for n in event_shape)
        dimensions = math.prod(self.event_shape)
        kept = min(positive("components", components), dimensions)
        self.settings = {"components": kept, "size": positive("size", size)}
        self.register_buffer("centre", torch.zeros(dimensions))
        self.register_buffer("projection", torch.zeros(dimensions, kept))
        self.register_buffer("weight", torch.zeros(kept, size))
        self.register_buffer("bias", torch.zeros(size))

    @torch.no_grad()
    def fit(self, x: Samples, generator: torch.Generator) -> RandomFeatures:
        """Set the components from x (N, *event) and the random units from `generator`.

        Of events with more than 2,048 values the components come from 2,048 samples at even
        distances, of others from all samples.
        """
        kept, size = self.settings["components"], self.settings["size"]
        centre, values, vectors = _principal_components(x, kept)
        vectors = vectors * vectors.sum(0).sign().where(vectors.sum(0) != 0, torch.ones(()))
        self.centre.copy_(centre)
        self.projection.copy_(vectors / values.clamp_min(1e-4 * float(values.max()) + 1e-12).sqrt())
        self.weight.copy_(torch.randn(kept, size, generator=generator) / math.sqrt(kept))
        self.bias.copy_(torch.randn(size, generator=generator))
        return self

    def config(self) -> dict[str, Any]:
        """JSON-able description from which `build_network` makes the same network."""
        return {
            "kind": "random_features",
            "event_shape": list(self.event_shape),
            **self.settings,
        }

    def features(self, x: Tensor) -> Tensor:
        """Clean samples (B, *event) in [-1, 1] -> (B, size) features in (-1, 1)."""
        z = (x.reshape(x.shape[0], -1) - self.centre) @ self.projection
        return torch.tanh(z @ self.weight + self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The features; there are no classes to tell apart."""
        return self.features(x)
