"""What a solver of a general equation is: ``dx = b dt + G dw`` in its own time, up or down.

A solver is a frozen dataclass of settings with a ``step`` from ``step.start.t`` to ``step.end.t``,
whose difference is negative where time falls. Noise is ``noise(like, step, slot)``, standard normal
of the motions' shape: slot 0 is the increment, ``AREA`` the space-time area. Nothing may couple the
samples of a batch. What does not fit is refused in ``check``, before any work.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sde_diffusion.broadcast import expand
from sde_diffusion.ito.equations import Equation, narrowed
from sde_diffusion.ito.fields import Score
from sde_diffusion.sde import SDE
from solvers.base import Step
from solvers.noise import BrownianPath, Noise


class ItoMethod(ABC):
    """What solvers with a step and solvers with a loop of their own have in common."""

    @property
    @abstractmethod
    def stochastic(self) -> bool:
        """Whether it solves equations with noise; else ordinary ones."""

    @property
    def adaptive(self) -> bool:
        """Whether it chooses its own steps, so that a run needs no ``steps``."""
        return False

    def check(self, equation: Equation, x: Tensor) -> None:
        """Raise ``ValueError`` where the equation is not one that this solves."""
        if self.stochastic == equation.stochastic:
            return
        if self.stochastic:
            raise ValueError(
                f"solver {self!r} is for equations with noise, and this one has none: use "
                "RungeKutta() or Torchdiffeq()"
            )
        raise ValueError(
            f"solver {self!r} is for equations without noise, and this one has some: use "
            "EulerMaruyama(), Milstein() or Torchsde(), or solve sde.flow(score)"
        )


class ItoSolver(ItoMethod):
    """A method that advances the state by one step."""

    @abstractmethod
    def step(self, equation: Equation, x: Tensor, step: Step, noise: Noise) -> Tensor:
        """``x`` ``(B, *event)`` at ``step.end.t``, from ``step.start.t``."""


class Carried(NamedTuple):
    """What a method with its own loop gives back.

    Attributes:
        x: the state at the last time.
        nfe_per_sample: ``(B,)`` evaluations of the score where samples differ, else ``None``.
        network_passes: mean over the samples, where they differ.
        accepted, rejected: steps, their mean over the batch.
    """

    x: Tensor
    nfe_per_sample: Tensor | None
    network_passes: float
    accepted: float
    rejected: float


class ItoIntegrator(ItoMethod):
    """A method that owns its loop: an adapter to another library."""

    @abstractmethod
    def carry(self, equation: Equation, x: Tensor, steps: Sequence[Step], noise: Noise) -> Carried:
        """``x`` from the first step's start to the last one's end."""


@dataclass(frozen=True)
class Clock(SDE):
    """Time itself as the clock of a driving motion, in the form that ``BrownianPath`` reads.

    The motion of a general equation has variance ``|dt|``. Here ``(sigma / alpha)^2 = 1 + |t -
    end|``, which falls by just that over a step, whether t rises or falls.

    Args:
        t_min: the time at which the run ends.
        t_max: the time at which it starts; may be the smaller of the two.
    """

    t_min: float
    t_max: float

    def _schedule(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        left = 1 + (t - self.t_min).abs()
        one = torch.ones_like(t)
        return one, left.sqrt(), -0.5 * left.log(), one - 1, one

    def _time(self, half_log_snr: Tensor) -> Tensor:
        left = torch.exp(-2 * half_log_snr) - 1
        return self.t_min + left * (1 if self.t_max > self.t_min else -1)


def brownian_path(
    equation: Equation, seed: int, sample_ids: Tensor | None = None, depth: int = 30
) -> BrownianPath:
    """One Brownian path per sample over an equation's whole range of times: runs on different grids
    are then driven by the same motion. For ``sample_ito(noise=...)``."""
    return BrownianPath(Clock(equation.end, equation.start), seed, sample_ids, depth)


def steps_on(times: Tensor, clock: Clock, device: torch.device) -> list[Step]:
    """The steps of a grid, in the order in which they are taken, on a device."""
    wide = torch.float32 if device.type == "mps" else torch.float64
    levels = clock.at(times).map(lambda field: field.to(device=device, dtype=wide))
    ends = [levels.map(lambda field, i=i: field[i]) for i in range(len(times))]  # type: ignore[misc]
    return [Step(i, ends[i], ends[i + 1]) for i in range(len(times) - 1)]


class CountedScore:
    """A score that counts its calls, at the call.

    Attributes:
        nfe: calls so far.
        network_passes: the sum of their costs; a guidance beside it costs one more.
    """

    def __init__(self, score: Score, guided: bool, limit: int | None = None) -> None:
        self.score = score
        self.guided = guided
        self.limit = limit
        self.nfe = 0
        self.network_passes = 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if self.limit is not None and self.nfe >= self.limit:
            raise RuntimeError(
                f"max_nfe={self.limit} evaluations were not enough, at t = {float(t):.6g}: "
                "loosen rtol and atol, or raise max_nfe"
            )
        value = self.score(x, t)
        if self.nfe == 0 and getattr(value, "shape", None) != x.shape:
            raise ValueError(
                f"score must return a tensor of x's shape {tuple(x.shape)}, got "
                f"{tuple(value.shape) if isinstance(value, Tensor) else value!r}"
            )
        cost_at = getattr(self.score, "cost_at", None)
        self.nfe += 1
        self.network_passes += self.guided + int(
            cost_at(t) if cost_at is not None else getattr(self.score, "cost", 1)
        )
        return value

    def select(self, indices: Tensor) -> CountedScore:
        """The score of a part of the batch, with counts of its own."""
        return CountedScore(narrowed(self.score, indices), self.guided, self.limit)


def squared_length(step: Step) -> tuple[Tensor, Tensor]:
    """The step in time, with its sign, and the standard deviation of its motion."""
    span = step.end.t - step.start.t
    return span, span.abs().sqrt()


def spread_over(scale: Tensor, x: Tensor) -> Tensor:
    """A 0-d or ``(B,)`` step in ``x``'s shape and dtype."""
    return expand(scale, x).to(x.dtype)
