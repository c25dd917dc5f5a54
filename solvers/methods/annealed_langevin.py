"""Annealed Langevin dynamics as a corrector."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from sde_diffusion.errors import require_count, require_finite
from sde_diffusion.prediction import ScoreFn
from sde_diffusion.sde import NoiseLevel
from solvers.base import Coefficients, Corrector, Step
from solvers.noise import Noise


@dataclass(frozen=True)
class AnnealedLangevin(Corrector):
    """Langevin steps of a size tied to the noise level: x <- x + d score + sqrt(2 d) z, d =
    step_size sigma^2.

    Song & Ermon 2020 (NCSNv2), arXiv:2006.09011, alg. 1, where ``d_i = epsilon sigma_i^2 /
    sigma_L^2``: ``step_size`` is ``epsilon / sigma_L^2``, 0.062 for the paper's CIFAR-10 model. On
    a Gaussian of that variance one step keeps the law up to a factor ``1 / (1 - step_size / 2)`` on
    the variance.

    Args:
        step_size: above 0, below 2, where the step becomes unstable.
        steps: Langevin steps at each level (T in the paper); each is one evaluation.
    """

    step_size: float = 0.06
    steps: int = 1

    def __post_init__(self) -> None:
        require_finite("step_size", self.step_size, above=0.0)
        if self.step_size >= 2:
            raise ValueError(
                f"step_size must be below 2, where Langevin steps diverge, got {self.step_size!r}"
            )
        require_count("steps", self.steps)

    def coefficients(self, step: Step, level: NoiseLevel) -> Coefficients:
        return -self.step_size * level.sigma, math.sqrt(2 * self.step_size) * level.sigma

    def correct(
        self, score_fn: ScoreFn, x: Tensor, level: NoiseLevel, step: Step, noise: Noise
    ) -> Tensor:
        pull, spread = self.coefficients_of(step, level, x)
        for k in range(self.steps):
            z = noise(x, step, slot=k + 1)
            eps = score_fn(x, level).eps
            x = x.addcmul(pull, eps).addcmul_(spread, z)
        return x
