"""One step through ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sde_diffusion.prediction import Prediction
from sde_diffusion.sde import NoiseLevel
from solvers.base import Solver, State, Step, Stepped
from solvers.counting import CountedScoreFn
from solvers.noise import Noise


def compiled_step(
    solver: Solver, score_fn: CountedScoreFn, noise: Noise
) -> Callable[[Tensor, Step, State], Stepped]:
    """``(x, step, state) -> Stepped``, compiled; counting and noise stay outside the graphs.

    Both hold Python integers that change from step to step and would be compiled anew each time.
    """
    advance = torch.compile(solver.step)
    count = torch.compiler.disable(score_fn.count)
    outside = torch.compiler.disable(noise.__call__)

    def score(x: Tensor, level: NoiseLevel) -> Prediction:
        prediction = score_fn.score_fn(x, level)
        count(prediction, level)
        return prediction

    def step_once(x: Tensor, step: Step, state: State) -> Stepped:
        return advance(score, x, step, state, outside)

    return step_once
