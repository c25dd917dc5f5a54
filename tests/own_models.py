"""Networks as a user would bring them, and some that do not fit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from sde_diffusion import VPSDE, EpsModel, GaussianMixture
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
