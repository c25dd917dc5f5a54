"""The Langevin corrector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sde_diffusion.broadcast import expand, per_sample_norm
from sde_diffusion.errors import require_count, require_finite, unknown_name
from sde_diffusion.prediction import ScoreFn
from sde_diffusion.sde import NoiseLevel
from solvers.base import Corrector, Step
from solvers.noise import Noise


@dataclass(frozen=True)
class Langevin(Corrector):
    """Langevin steps x <- x + d score + sqrt(2 d) z with d = 2 a (snr |z| / |score|)^2.

    Song et al. 2021, arXiv:2011.13456, alg. 4 and 5. ``a`` is 1 on VE and the chain's ``1 - beta``
    on VP; here it is ``(alpha_start / alpha_end)^2`` of the step, which is both, and has a meaning
    for every SDE and step count.

    Args:
        snr: signal-to-noise ratio r of a step, above 0.
        steps: Langevin steps at each level; each is one evaluation.
        norm: ``sample``: the norms of each sample; ``batch``: their means over the batch, as the
            paper's code has it, which makes samples depend on their batch and is there to reproduce
            published numbers.
    """

    snr: float = 0.16
    steps: int = 1
    norm: Literal["sample", "batch"] = "sample"

    def __post_init__(self) -> None:
        require_finite("snr", self.snr, above=0.0)
        require_count("steps", self.steps)
        if self.norm not in ("sample", "batch"):
            raise unknown_name("norm", self.norm, ("sample", "batch"))

    def correct(
        self, score_fn: ScoreFn, x: Tensor, level: NoiseLevel, step: Step, noise: Noise
    ) -> Tensor:
        shrink = step.start.alpha / step.end.alpha
        for k in range(self.steps):
            z = noise(x, step, slot=k + 1)
            score = score_fn(x, level).score
            size_of_z, size_of_score = per_sample_norm(z), per_sample_norm(score)
            if self.norm == "batch":
                size_of_z, size_of_score = size_of_z.mean(), size_of_score.mean()
            root = expand(self.snr * shrink * size_of_z / size_of_score, x)
            x = torch.addcmul(x, 2 * root**2, score).addcmul_(2 * root, z)
        return x
