"""Guidance that needs no label and no gradient: by a weaker model, and by clipping x0."""

from __future__ import annotations

import torch
from torch import Tensor

from sde_diffusion.broadcast import expand
from sde_diffusion.errors import require_between, require_finite
from sde_diffusion.parametrization import part_of
from sde_diffusion.prediction import Prediction, ScoreFn, cost_of, select
from sde_diffusion.scales import Scale, check_scale, is_number, weight_of
from sde_diffusion.sde import NoiseLevel


def autoguided(score_fn: ScoreFn, weaker: ScoreFn, scale: Scale = 2.0) -> ScoreFn:
    """``weaker + scale * (score - weaker)`` (Karras et al. 2024, arXiv:2406.02507, eq. 3).

    The weaker score is of the same law and condition, made worse: a smaller network, or one trained
    for less time. Where the two agree nothing changes.

    Args:
        score_fn: the better score.
        weaker: the worse one.
        scale: a number, a 0-d tensor, ``(B,)``, or a function of the noise level. 0 is the weaker
            score, 1 the better (each by itself, at its own cost), above 1 away from the weaker.
    """
    check_scale(scale)
    if is_number(scale, 1):
        return score_fn
    if is_number(scale, 0):
        return weaker
    return _Autoguided(score_fn, weaker, scale)


class _Autoguided:
    def __init__(self, score_fn: ScoreFn, weaker: ScoreFn, scale: Scale) -> None:
        self.score_fn = score_fn
        self.weaker = weaker
        self.scale = scale

    def cost_at(self, level: NoiseLevel) -> int:
        return cost_of(self.score_fn, level) + cost_of(self.weaker, level)

    def __call__(self, x: Tensor, level: NoiseLevel) -> Prediction:
        better, worse = self.score_fn(x, level).eps, self.weaker(x, level).eps
        return Prediction.from_eps(
            x, level, worse + weight_of(self.scale, level, x) * (better - worse)
        )

    def select(self, indices: Tensor) -> _Autoguided:
        return _Autoguided(
            select(self.score_fn, indices),
            select(self.weaker, indices),
            part_of(self.scale, indices),
        )


def thresholded(score_fn: ScoreFn, quantile: float = 0.995, limit: float = 1.0) -> ScoreFn:
    """Dynamic thresholding, in x0 (Saharia et al. 2022, arXiv:2205.11487, sec. 2.3).

    Per sample, ``s`` is the larger of ``limit`` and that quantile of ``|x0|``; x0 is clipped to
    ``[-s, s]`` and multiplied by ``limit / s``. It acts on the estimate of the clean sample,
    whatever form the score has: the same rule on eps or v would be another one.

    Args:
        quantile: in (0, 1]; 1 takes the largest element, which scales without clipping.
        limit: where the data ends, above 0: 1 for data in [-1, 1].
    """
    require_between("quantile", quantile, 0, 1)
    require_finite("quantile", quantile, above=0.0)
    require_finite("limit", limit, above=0.0)
    return _Thresholded(score_fn, quantile, limit)


class _Thresholded:
    def __init__(self, score_fn: ScoreFn, quantile: float, limit: float) -> None:
        self.score_fn = score_fn
        self.quantile = quantile
        self.limit = limit

    def cost_at(self, level: NoiseLevel) -> int:
        return cost_of(self.score_fn, level)

    def __call__(self, x: Tensor, level: NoiseLevel) -> Prediction:
        x0 = self.score_fn(x, level).x0
        reach = expand(self._quantile(x0).clamp_min(self.limit), x0)
        return Prediction.from_x0(x, level, torch.clamp(x0, -reach, reach) * (self.limit / reach))

    def select(self, indices: Tensor) -> _Thresholded:
        return _Thresholded(select(self.score_fn, indices), self.quantile, self.limit)

    def _quantile(self, x0: Tensor) -> Tensor:
        """Of each sample's ``|x0|``, between neighbours by interpolation; ``torch.quantile``
        refuses batches above 16 million elements."""
        ordered = x0.abs().reshape(len(x0), -1).sort(dim=1).values
        place = self.quantile * (ordered.shape[1] - 1)
        low = int(place)
        high = min(low + 1, ordered.shape[1] - 1)
        return torch.lerp(ordered[:, low], ordered[:, high], place - low)
