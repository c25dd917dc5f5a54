"""Generators and initial weights from explicit seeds; the global generator is never moved."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

__all__ = ["generator_for", "seeded"]

_WORD = (1 << 64) - 1


def generator_for(*keys: int) -> torch.Generator:
    """A CPU generator seeded by all `keys` at once (splitmix64 mixing, Steele et al. 2014)."""
    state = 0
    for key in keys:
        state = (state + key + 0x9E3779B97F4A7C15) & _WORD
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD
        state ^= state >> 31
    return torch.Generator().manual_seed(state >> 1)


def seeded(make: Callable[[], nn.Module], *keys: int) -> nn.Module:
    """Build a network whose initial weights depend on `keys` alone, not on the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator_for(*keys).initial_seed())
        return make()
