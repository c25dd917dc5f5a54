"""Predictor-corrector sampling: any predictor with any corrector."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from sde_diffusion.errors import unknown_name
from sde_diffusion.prediction import ScoreFn
from sde_diffusion.sde import SDE, NoiseLevel
from solvers.base import Coefficients, Corrector, Solver, State, Step, Stepped
from solvers.methods.langevin import Langevin
from solvers.methods.reverse_diffusion import ReverseDiffusion
from solvers.noise import Noise


@dataclass(frozen=True)
class PredictorCorrector(Solver):
    """A predictor's step, then a corrector at the new level (Song et al. 2021, arXiv:2011.13456,
    alg. 1).

    The order declared is 0: a corrector's own bias does not shrink with the number of steps.

    Args:
        predictor: any solver.
        corrector: any corrector.
        first: ``predictor``, the paper's order: correct at the new level; ``corrector``, the
            published code's: correct at the old level, before predicting.
    """

    predictor: Solver = field(default_factory=ReverseDiffusion)
    corrector: Corrector = field(default_factory=Langevin)
    first: Literal["predictor", "corrector"] = "predictor"
    order = 0
    stochastic = True

    def __post_init__(self) -> None:
        if not isinstance(self.predictor, Solver):
            raise TypeError(f"predictor must be a Solver, got {self.predictor!r}")
        if not isinstance(self.corrector, Corrector):
            raise TypeError(f"corrector must be a Corrector, got {self.corrector!r}")
        if self.first not in ("predictor", "corrector"):
            raise unknown_name("first", self.first, ("predictor", "corrector"))

    def init(self, x: Tensor) -> State:
        return self.predictor.init(x)

    def stages(self, sde: SDE, start: NoiseLevel, end: NoiseLevel) -> tuple[NoiseLevel, ...]:
        return self.predictor.stages(sde, start, end)

    def coefficients(self, step: Step) -> Coefficients:
        level = step.start if self.first == "corrector" else step.end
        return self.predictor.coefficients(step), self.corrector.coefficients(step, level)

    def step(self, score_fn: ScoreFn, x: Tensor, step: Step, state: State, noise: Noise) -> Stepped:
        predicting = correcting = step
        if step.coefficients:
            mine, theirs = step.coefficients
            predicting = Step(step.index, step.start, step.end, step.stages, mine)
            correcting = Step(step.index, step.start, step.end, step.stages, theirs)
        if self.first == "corrector":
            x = self.corrector.correct(score_fn, x, step.start, correcting, noise)
            state = self.predictor.displaced(state)
            return self.predictor.step(score_fn, x, predicting, state, noise)
        predicted = self.predictor.step(score_fn, x, predicting, state, noise)
        x = self.corrector.correct(score_fn, predicted.x, step.end, correcting, noise)
        return Stepped(x, self.predictor.displaced(predicted.state), predicted.error)
