"""Noise for code that is not ours and draws from torch: its draws made, or seeded by, the run's."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sde_diffusion.sde import SDE
from solvers.base import Step, unbound
from solvers.noise import Noise

GENERATOR = threading.RLock()  # torch's CPU generator is one for all threads
_SEED_SLOT = 61  # of the draws that seed it; far from the slots of solvers


class PatchedNormals(TorchFunctionMode):
    """``torch.randn_like`` of the state answered with the run's noise, which no batch changes.

    Attributes:
        source: gives the noise of the next call; without one torch answers.
        asked: whether it was ever called.
    """

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.source: Callable[[], Tensor] | None = None
        self.asked = False
        self._shape = x.shape

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        ours = func is torch.randn_like and not kwargs and args[0].shape == self._shape
        if ours and self.source is not None:
            self.asked = True
            return self.source().to(args[0])
        return func(*args, **(kwargs or {}))


@contextmanager
def seeded(x: Tensor, sde: SDE, times: Tensor, noise: Noise) -> Iterator[None]:
    """Torch's generator seeded by the run's noise, and put back afterwards."""
    start, end = unbound(sde.at(times[[0, -1]]), x.device)
    drawn = noise(x, Step(0, start, end), _SEED_SLOT).cpu().double().numpy().tobytes()
    devices = [x.device] if x.device.type == "cuda" else []
    with GENERATOR, torch.random.fork_rng(devices=devices):
        torch.manual_seed(int.from_bytes(hashlib.sha256(drawn).digest()[:8], "big") >> 1)
        yield
