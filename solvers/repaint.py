"""Going back on the grid, so that what is free and what is put back come to agree."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sde_diffusion.errors import require_count
from solvers.base import Solver, Step, make_steps
from solvers.guard import FiniteGuard
from solvers.noise import BrownianPath
from solvers.plans import Plan, Run
from solvers.progress import reporting
from solvers.solution import Solution

_BACK = 1_000_003  # the slot of the noise that leads back


@dataclass(frozen=True)
class RePaint(Plan):
    """The grid in pieces of ``jump`` steps, each walked ``times`` times.

    After a piece the state is noised back to where the piece began, by the SDE's own transition
    ``x <- (alpha_s / alpha_t) x + sqrt(sigma_s^2 - (alpha_s / alpha_t)^2 sigma_t^2) z``, and the
    piece is walked again with fresh noise (Lugmayr et al. 2022, arXiv:2201.09865, alg. 1 and app.
    B). Meant for ``Replacement``, whose parts then have time to agree; a solver's memory begins
    anew with each walk. Evaluations are those of ``times`` runs.

    Args:
        jump: steps of a piece.
        times: walks over each piece; 1 is the plain grid.
    """

    jump: int = 10
    times: int = 10

    def __post_init__(self) -> None:
        require_count("jump", self.jump)
        require_count("times", self.times)

    def check(self, solver: Solver, trajectory: bool, compile: bool, gradients: bool) -> None:
        for name, given in (
            ("trajectory", trajectory),
            ("compile", compile),
            ("gradients", gradients),
        ):
            if given:
                raise ValueError(f"{name} does not apply to RePaint, which goes back: leave it out")

    def run(self, run: Run) -> Solution:
        if isinstance(run.noise, BrownianPath):
            raise ValueError(
                "noise: a BrownianPath gives the same noise each time a piece is walked; leave "
                "noise out, or give CounterNoise"
            )
        solver, x = run.solver, run.x
        count = len(run.times) - 1
        # Each piece is a run of its own to the solver, whose memory does not reach across its ends.
        pieces = [
            make_steps(run.sde, solver, run.times[first : first + self.jump + 1], x)
            for first in range(0, count, self.jump)
        ]
        taken, total = 0, self.times * count
        with reporting(run.progress, total) as report:
            for piece in pieces:
                for walk in range(self.times):
                    state = solver.init(x)
                    guard = FiniteGuard(solver, run.score_fn.score_fn, run.noise, x, state)
                    for step in piece:
                        # The index is the noise's place; the same step is taken several times.
                        now = step._replace(index=taken)
                        stepped = solver.step(run.score_fn, x, now, state, run.noise)
                        x, state = stepped.x, stepped.state
                        taken += 1
                        guard.watch((now,), x, state)
                        if report is not None:
                            report(taken, total)
                    guard.finish(x)
                    if walk < self.times - 1:
                        x = _back(x, piece, now, run)
        solution = Solution(x, run.score_fn.nfe, run.score_fn.network_passes, run.times)
        solution.stats.update(accepted=taken, rejected=0)
        return solution


def _back(x: torch.Tensor, piece: list[Step], now: Step, run: Run) -> torch.Tensor:
    """From the end of a piece to its start."""
    start, end = piece[0].start, piece[-1].end
    ratio = start.alpha / end.alpha
    spread = (start.sigma**2 - (ratio * end.sigma) ** 2).clamp_min(0).sqrt()
    return ratio * x + spread * run.noise(x, now, _BACK)
