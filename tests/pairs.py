"""Pairs of methods that estimate their error, and states to start them from."""

from __future__ import annotations

import torch
from torch import Tensor

from solvers import SRA1, BogackiShampine, DormandPrince, ImprovedEuler, Solver, Tsitouras
from tests.problems import SDES

PAIRS: dict[str, Solver] = {
    "bogacki_shampine": BogackiShampine(),
    "dormand_prince": DormandPrince(),
    "tsitouras": Tsitouras(),
}
STOCHASTIC: dict[str, Solver] = {"improved_euler": ImprovedEuler(), "sra1": SRA1()}


def start(name: str, count: int = 6, dimension: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, dimension, generator=generator, dtype=torch.float64)
    return x * SDES[name].prior_std()
