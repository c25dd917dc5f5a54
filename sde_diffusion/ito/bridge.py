"""Between the scores of general SDEs, ``(x, t) -> score``, and the score functions of linear ones,
``(x, level) -> Prediction``.

A general SDE has no alpha and sigma, so that x0 and eps mean nothing there and a score is a tensor.
For a linear SDE the two say the same.
"""

from __future__ import annotations

from torch import Tensor

from sde_diffusion.ito.fields import Score
from sde_diffusion.prediction import Prediction, ScoreFn, cost_of, select
from sde_diffusion.sde import SDE, NoiseLevel

__all__ = ["score_fn_from", "score_from"]


def score_from(score_fn: ScoreFn, sde: SDE) -> Score:
    """A score function of a linear SDE, guided or not, as the score of ``ItoSDE.from_linear``."""
    return _LevelledScore(score_fn, sde)


def score_fn_from(score: Score) -> ScoreFn:
    """A score as a score function of the linear SDE whose score it is."""
    return _TimedScore(score)


class _LevelledScore:
    def __init__(self, score_fn: ScoreFn, sde: SDE) -> None:
        self.score_fn = score_fn
        self.sde = sde

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.score_fn(x, self.sde.at(t)).score

    def cost_at(self, t: Tensor) -> int:
        return cost_of(self.score_fn, self.sde.at(t))

    def select(self, indices: Tensor) -> _LevelledScore:
        return _LevelledScore(select(self.score_fn, indices), self.sde)


class _TimedScore:
    def __init__(self, score: Score) -> None:
        self.score = score
        self.cost = getattr(score, "cost", 1)

    def __call__(self, x: Tensor, level: NoiseLevel) -> Prediction:
        return Prediction.from_score(x, level, self.score(x, level.t))
