"""What the tests of noise share: steps, states to draw for, and correlations."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sde_diffusion import SDE, VPSDE
from solvers import Step


def step_of(index: int, sde: SDE | None = None, start: float = 0.6, end: float = 0.5) -> Step:
    sde = sde or VPSDE()
    return Step(index, sde.at(start), sde.at(end))


def like(samples: int, *event: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.zeros(samples, *event, dtype=dtype)


def correlation(a: Tensor, b: Tensor) -> float:
    """In units of its standard error."""
    a, b = a.flatten() - a.mean(), b.flatten() - b.mean()
    return float((a * b).mean() / (a.std() * b.std()) * math.sqrt(a.numel()))
