"""Evaluations, counted where they happen."""

from __future__ import annotations

from torch import Tensor

from sde_diffusion.prediction import Prediction, ScoreFn, select
from sde_diffusion.sde import NoiseLevel


class CountedScoreFn:
    """A score function that counts its calls.

    Attributes:
        nfe: calls so far.
        network_passes: the sum of their costs.
    """

    def __init__(self, score_fn: ScoreFn) -> None:
        self.score_fn = score_fn
        self.nfe = 0
        self.network_passes = 0
        self._cost_at = getattr(score_fn, "cost_at", None)
        self._cost: int = getattr(score_fn, "cost", 1)

    def __call__(self, x: Tensor, level: NoiseLevel) -> Prediction:
        prediction = self.score_fn(x, level)
        self.count(prediction, level)
        return prediction

    def count(self, prediction: Prediction, level: NoiseLevel) -> None:
        """Note one call that gave ``prediction``."""
        if self.nfe == 0 and not isinstance(prediction, Prediction):
            raise TypeError(
                f"score_fn must return a Prediction, got {type(prediction).__name__}: "
                "wrap a network in EpsModel, X0Model, VModel, ScoreModel or EDMModel"
            )
        if self.nfe == 0 and (wrong := prediction.misfit()) is not None:
            raise ValueError(
                f"score_fn gave a prediction of shape {tuple(wrong)} for x of shape "
                f"{tuple(prediction.x.shape)}; the network's output must have the shape of x"
            )
        self.nfe += 1
        self.network_passes += self._cost if self._cost_at is None else self._cost_at(level)

    def apart(self) -> CountedScoreFn:
        """The same score function with counts of its own."""
        return CountedScoreFn(self.score_fn)

    def select(self, indices: Tensor) -> CountedScoreFn:
        """The score function of a part of the batch, with counts of its own."""
        return CountedScoreFn(select(self.score_fn, indices))
