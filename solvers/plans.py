"""Strategies over a grid: which steps are taken, and what becomes of their results."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sde_diffusion.sde import SDE
from solvers.base import Solver, State, Step, make_steps
from solvers.compilation import compiled_step
from solvers.counting import CountedScoreFn
from solvers.guard import FiniteGuard
from solvers.noise import CounterNoise, Noise
from solvers.progress import Report, reporting
from solvers.solution import Solution


@dataclass(frozen=True)
class Run:
    """What ``sample`` has checked and prepared, for a plan to carry out.

    Attributes:
        score_fn: counts its calls.
        x: the state at ``times[0]``.
        times: the grid, decreasing, float64 on the CPU.
        stride: keep every ``stride``-th state; ``None`` for no trajectory.
        checkpoint: record for autograd only every so many steps, the others when they are needed.
    """

    score_fn: CountedScoreFn
    sde: SDE
    solver: Solver
    x: Tensor
    times: Tensor
    noise: Noise
    stride: int | None
    compile: bool
    progress: bool | Report
    checkpoint: bool = False


class Plan(ABC):
    """A strategy over a grid."""

    chooses_steps = False  # whether a run needs no ``steps``: of the grid it takes the two ends

    def check(  # noqa: B027
        self, solver: Solver, trajectory: bool, compile: bool, gradients: bool
    ) -> None:
        """Raise ``ValueError`` for what the plan cannot do, before any work."""

    def noise(self, sde: SDE, stochastic: bool, seed: int, sample_ids: Tensor | None) -> Noise:
        """The noise of a run for which the caller gives none."""
        return CounterNoise(seed, sample_ids)

    @abstractmethod
    def run(self, run: Run) -> Solution:
        """Carry ``run.x`` from ``run.times[0]`` to ``run.times[-1]``."""


@dataclass(frozen=True)
class FixedGrid(Plan):
    """Every step of the grid, once."""

    def run(self, run: Run) -> Solution:
        return walk(run, run.solver, make_steps(run.sde, run.solver, run.times, run.x), run.times)


def walk(run: Run, solver: Solver, steps: Sequence[Step], times: Tensor) -> Solution:
    """Take ``steps``, every one once, with ``solver``, from ``run.x``.

    Args:
        times: ``(len(steps) + 1,)``: where each step starts, and where the last ends.
    """
    score_fn, noise, stride = run.score_fn, run.noise, run.stride
    compiled = compiled_step(solver, score_fn, noise) if run.compile else None
    total = len(steps)

    def advance(
        x: Tensor, state: State, first: int, last: int
    ) -> tuple[Tensor, State, list[Tensor]]:
        shown = []
        for place in range(first, last):
            if compiled is None:
                stepped = solver.step(score_fn, x, steps[place], state, noise)
            else:
                stepped = compiled(x, steps[place], state)
            x, state = stepped.x, stepped.state
            if place + 1 in kept_at:
                shown.append(x)
        return x, state, shown

    kept_at = set() if stride is None else {*range(0, total, stride), total}
    # With checkpoints of every sqrt(n)-th state, and the steps from one on taken anew when the
    # gradient comes there, as many tensors are kept at a time (Chen et al. 2016, arXiv:1604.06174).
    together = math.ceil(math.sqrt(total)) if run.checkpoint else 1
    x, state = run.x, solver.init(run.x)
    kept = [x]
    guard = FiniteGuard(solver, score_fn.score_fn, noise, x, state)
    with reporting(run.progress, total) as report:
        for first in range(0, total, together):
            last = min(first + together, total)
            if run.checkpoint:
                x, state, shown = checkpoint(advance, x, state, first, last, use_reentrant=False)
            else:
                x, state, shown = advance(x, state, first, last)
            guard.watch(steps[first:last], x, state)
            kept += shown
            if report is not None:
                report(last, total)
    guard.finish(x)
    solution = Solution(x, score_fn.nfe, score_fn.network_passes, run.times)
    solution.stats.update(accepted=total, rejected=0)
    if stride is not None:
        solution.trajectory = torch.stack(kept)
        solution.trajectory_times = times[sorted(kept_at)]
    return solution
