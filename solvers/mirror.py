"""A linear SDE seen from its other end, so that solvers carry data to noise as they carry noise to
data.

``x = alpha x_0 + sigma eps`` does not change when signal and noise change places: with ``alpha' =
sigma``, ``sigma' = alpha``, ``x_0' = eps`` and ``eps' = x_0`` it is the same ``x``, and the
probability-flow ODE ``d(x / alpha) / d(sigma / alpha) = eps`` (Karras et al. 2022,
arXiv:2206.00364, eq. 4) becomes ``d(x / sigma) / d(alpha / sigma) = x_0``, which is the same curve.
Clean data is the noisy end of the mirrored SDE, and the latent its clean end: a step still goes
from noisier to cleaner, and no solver knows the difference. One that interpolates eps interpolates
x_0 here, and the other way round.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sde_diffusion.prediction import Prediction, ScoreFn, cost_of, select
from sde_diffusion.sde import SDE, HostedLevel, NoiseLevel


@dataclass(frozen=True, init=False)
class MirroredSDE(SDE):
    """``sde`` with signal and noise exchanged, and time running the other way: ``t' = t_min + t_max
    - t``."""

    sde: SDE
    t_min: float
    t_max: float

    def __init__(self, sde: SDE) -> None:
        object.__setattr__(self, "sde", sde)
        object.__setattr__(self, "t_min", float(sde.t_min))
        object.__setattr__(self, "t_max", float(sde.t_max))

    def mirrored(self, t: Tensor) -> Tensor:
        """A time of one SDE as the other's."""
        return (self.t_min + self.t_max) - t

    def _schedule(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        there = self.sde.at(self.mirrored(t))
        # d sigma^2/dt = g^2 + 2 f sigma^2, and f' = d log(alpha')/dt' = -d log(sigma)/dt.
        f = -(there.f + 0.5 * there.g2 / there.sigma**2)
        g2 = -2 * (there.f + f) * there.alpha**2
        return there.sigma, there.alpha, -there.half_log_snr, f, g2

    def _time(self, half_log_snr: Tensor) -> Tensor:
        return self.mirrored(self.sde.time(-half_log_snr))

    def unmirrored(self, level: NoiseLevel) -> NoiseLevel:
        """The level of the SDE itself that a level of this one is."""
        f = -(level.f + 0.5 * level.g2 / level.sigma**2)
        g2 = -2 * (level.f + f) * level.alpha**2
        fields = (self.mirrored(level.t), level.sigma, level.alpha, -level.half_log_snr, f, g2)
        ratio = getattr(level, "host_ratio", None)
        return NoiseLevel(*fields) if ratio is None else HostedLevel.of(fields, 1 / ratio)


class MirroredScore:
    """A score function under the mirrored SDE: its x_0 is the noise, its noise x_0."""

    def __init__(self, score_fn: ScoreFn, sde: MirroredSDE) -> None:
        self.score_fn = score_fn
        self.sde = sde

    def cost_at(self, level: NoiseLevel) -> int:
        return cost_of(self.score_fn, self.sde.unmirrored(level))

    def __call__(self, x: Tensor, level: NoiseLevel) -> Prediction:
        prediction = self.score_fn(x, self.sde.unmirrored(level))
        if not isinstance(prediction, Prediction):
            return prediction  # for the count to refuse
        if prediction.misfit() is not None:
            return prediction
        return Prediction(x, level, x0=prediction.eps, eps=prediction.x0)

    def select(self, indices: Tensor) -> MirroredScore:
        return MirroredScore(select(self.score_fn, indices), self.sde)


def mirrored_times(sde: SDE, times: Tensor) -> Tensor:
    """A decreasing grid of ``sde`` as the mirrored SDE's, from data to noise: decreasing too."""
    mirrored = (float(sde.t_min) + float(sde.t_max)) - times.flip(0)
    ends = {float(sde.t_min): float(sde.t_max), float(sde.t_max): float(sde.t_min)}
    for place, original in ((0, times[-1].item()), (-1, times[0].item())):
        if original in ends:  # to the bit: a difference would be off by a rounding
            mirrored[place] = ends[original]
    return torch.as_tensor(mirrored, dtype=torch.float64)
