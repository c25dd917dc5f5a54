"""Solvers that do what a user's solver should not."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solvers import DDIM, Stepped


@dataclass(frozen=True)
class Raises(DDIM):
    """Raises at its first step."""

    def step(self, *args: Any, **kwargs: Any) -> Stepped:
        raise KeyError("no such thing")


@dataclass(frozen=True)
class Hangs(DDIM):
    """Never returns, in Python."""

    def step(self, *args: Any, **kwargs: Any) -> Stepped:
        while True:
            time.sleep(0.01)


@dataclass(frozen=True)
class HangsDeaf(DDIM):
    """Never returns, and hears no signal: like a deadlock in compiled code."""

    def step(self, *args: Any, **kwargs: Any) -> Stepped:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        while True:
            time.sleep(0.01)


@dataclass(frozen=True)
class Dies(DDIM):
    """Its process ends, the first time or always, as when memory runs out."""

    mark: str = ""

    def step(self, *args: Any, **kwargs: Any) -> Stepped:
        if not self.mark or not Path(self.mark).exists():
            if self.mark:
                Path(self.mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(*args, **kwargs)


@dataclass(frozen=True)
class DiesOfMany(DDIM):
    """Its process ends where there is more than one sample: as when memory runs out, not before
    there is work, when a sampler's evaluations are counted on one."""

    def step(self, score_fn: Any, x: Any, *args: Any, **kwargs: Any) -> Stepped:
        if len(x) > 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(score_fn, x, *args, **kwargs)
