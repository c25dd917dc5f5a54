"""A predictor that predicts nothing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sde_diffusion.prediction import ScoreFn
from solvers.base import Coefficients, Solver, State, Step, Stepped
from solvers.noise import Noise


@dataclass(frozen=True)
class Hold(Solver):
    """Keeps x / alpha and moves on without an evaluation: with a corrector, annealed Langevin
    dynamics (NCSN)."""

    order = 0
    stochastic = False

    def coefficients(self, step: Step) -> Coefficients:
        return (step.end.alpha / step.start.alpha,)

    def step(self, score_fn: ScoreFn, x: Tensor, step: Step, state: State, noise: Noise) -> Stepped:
        (ratio,) = self.coefficients_of(step, x)
        return Stepped(ratio * x, state)
