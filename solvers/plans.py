"""Strategies over a grid: which step comes next, and what becomes of its result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from sde_diffusion.sde import SDE
from solvers.base import Solver, State, Step, Stepped, make_steps


class Walk(ABC):
    """One run of a plan."""

    total: int  # steps expected, for progress
    accepted: int
    rejected: int

    @abstractmethod
    def propose(self) -> Step | None:
        """The step to try next; ``None`` at the end."""

    @abstractmethod
    def keep(self, x: Tensor, state: State, stepped: Stepped) -> tuple[Tensor, State]:
        """The state to go on from, given the one before the proposed step and the step's result."""


class Plan(ABC):
    """A strategy over a grid."""

    @abstractmethod
    def start(self, sde: SDE, solver: Solver, times: Tensor, x: Tensor) -> Walk:
        """Prepare a run over ``times`` from ``x``."""


@dataclass(frozen=True)
class FixedGrid(Plan):
    """Every step of the grid, once."""

    def start(self, sde: SDE, solver: Solver, times: Tensor, x: Tensor) -> Walk:
        return _FixedWalk(make_steps(sde, solver, times, x))


class _FixedWalk(Walk):
    rejected = 0

    def __init__(self, steps: list[Step]) -> None:
        self.total = len(steps)
        self.accepted = 0
        self._steps: Iterator[Step] = iter(steps)

    def propose(self) -> Step | None:
        return next(self._steps, None)

    def keep(self, x: Tensor, state: State, stepped: Stepped) -> tuple[Tensor, State]:
        self.accepted += 1
        return stepped.x, stepped.state
