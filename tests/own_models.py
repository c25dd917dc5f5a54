"""Networks as a user would bring them, and some that do not fit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from sde_diffusion import VESDE, VPSDE, EpsModel, GaussianMixture, Prediction
from sde_diffusion.checkpoints import load_model

MIXTURE = GaussianMixture(
    means=torch.tensor([[-0.4, 0.0], [0.4, 0.2]]), covariances=torch.tensor([0.01, 0.02])
)


def mixture() -> Any:
    """An exact one."""
    sde = VPSDE()
    return SimpleNamespace(
        model=MIXTURE.model(sde), sde=sde, event_shape=(2,), data_range=(-1.0, 1.0)
    )


def digits() -> Any:
    """The shipped network, as if it came from elsewhere."""
    found = load_model("digits-vp")
    return SimpleNamespace(
        model=found.model,
        sde=found.sde,
        event_shape=found.event_shape,
        num_classes=found.num_classes,
        classifier=found.classifier,
    )


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.linear(x)


def untrained() -> Any:
    """A pair, whose weights are drawn."""
    sde = VPSDE()
    return EpsModel(_Net(), sde), sde


def bare_network() -> Any:
    return _Net(), VPSDE()


def breaks() -> Any:
    raise KeyError("weights")


def gives_nothing() -> Any:
    return None


def first_value(x: Tensor) -> Tensor:
    """A feature extractor."""
    return x.flatten(1)[:, :1]


def of_wrong_shape(x: Tensor) -> Tensor:
    return x.sum()


def _images() -> GaussianMixture:
    """Three classes of 8 × 8 images, each a blob of its own: of known law."""
    places = torch.arange(8.0)
    bumps = [torch.exp(-((places - at) ** 2) / 3) for at in (1.5, 3.5, 5.5)]
    means = torch.stack([(1.2 * torch.outer(a, a) - 0.6)[None] for a in bumps])
    return GaussianMixture(
        means=means.flatten(1),
        covariances=torch.full((3,), 0.01),
        labels=torch.arange(3),
        event_shape=(1, 8, 8),
    )


IMAGES = _images()


class _Exact(nn.Module):
    """The mixture's score behind parameters, as a trained network has."""

    def __init__(self, sde: Any) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self._model = IMAGES.model(sde)

    def forward(self, x: Tensor, level: Any, label: Any = None) -> Prediction:
        return Prediction.from_eps(x, level, self.gain * self._model(x, level, label).eps)


def labelled_vp() -> Any:
    """Images with classes and a classifier, under VP."""
    sde = VPSDE()
    return SimpleNamespace(
        model=_Exact(sde), sde=sde, event_shape=(1, 8, 8), num_classes=3,
        classifier=IMAGES.classifier(sde), data_range=(0.0, 255.0),
    )  # fmt: skip


def plain_ve() -> Any:
    """Images without classes, under VE."""
    sde = VESDE()
    return SimpleNamespace(
        model=_Exact(sde), sde=sde, event_shape=(1, 8, 8), data_range=(0.0, 255.0)
    )
