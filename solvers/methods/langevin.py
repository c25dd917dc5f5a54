"""The Langevin corrector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from sde_diffusion.broadcast import expand, per_sample_norm
from sde_diffusion.errors import require_count, require_finite, unknown_name
from sde_diffusion.prediction import ScoreFn
from sde_diffusion.sde import NoiseLevel
from solvers.base import Coefficients, Corrector, Step
from solvers.noise import Noise


@dataclass(frozen=True)
class Langevin(Corrector):
    """Langevin steps x <- x + d score + sqrt(2 d) z with d = 2 a (snr |z| / |score|)^2.

    Song et al. 2021, arXiv:2011.13456, alg. 4 and 5. ``a`` is 1 on VE and the chain's ``1 - beta``
    on VP; here it is ``(alpha_start / alpha_end)^2`` of the step, which is both, and has a meaning
    for every SDE and step count.

    The paper's code takes the mean norms over the batch, which ties samples to their batch. Norms
    of each sample cut that tie, but make the step size depend on the sample: the kernel then
    leaves ``p |score|^2`` invariant instead of ``p``, which is invisible in a thousand dimensions
    and ruins two. The default therefore puts in the norms' root mean squares, ``sqrt(D)`` and
    ``sqrt(D) / sigma``, to which both tend in high dimension: ``d = 2 a (snr sigma)^2``.

    Args:
        snr: signal-to-noise ratio r of a step, above 0.
        steps: Langevin steps at each level; each is one evaluation.
        norm: ``expected``: root mean squares, as above; ``sample``: the norms of each sample, for
            high-dimensional events; ``batch``: means over the batch, to reproduce published
            numbers: the only setting in this library under which samples depend on their batch.
    """

    snr: float = 0.16
    steps: int = 1
    norm: Literal["expected", "sample", "batch"] = "expected"

    def __post_init__(self) -> None:
        require_finite("snr", self.snr, above=0.0)
        require_count("steps", self.steps)
        if self.norm not in ("expected", "sample", "batch"):
            raise unknown_name("norm", self.norm, ("expected", "sample", "batch"))

    def coefficients(self, step: Step, level: NoiseLevel) -> Coefficients:
        # sqrt(d / 2) with the expected norms.
        root = self.snr * (step.start.alpha / step.end.alpha) * level.sigma
        return -2 * root**2 / level.sigma, 2 * root

    def correct(
        self, score_fn: ScoreFn, x: Tensor, level: NoiseLevel, step: Step, noise: Noise
    ) -> Tensor:
        pull, spread = self.coefficients_of(step, level, x)
        for k in range(self.steps):
            z = noise(x, step, slot=k + 1)
            eps = score_fn(x, level).eps
            if self.norm == "expected":
                x = x.addcmul(pull, eps).addcmul_(spread, z)
            else:
                ratio = expand(self._ratio_of_norms(z, eps), x)
                x = x.addcmul(pull * ratio**2, eps).addcmul_(spread * ratio, z)
        return x

    def _ratio_of_norms(self, z: Tensor, eps: Tensor) -> Tensor:
        """``|z| / |eps|``, where ``|eps| = sigma |score|``."""
        size_of_z, size_of_eps = per_sample_norm(z), per_sample_norm(eps)
        if self.norm == "batch":
            return size_of_z.mean() / size_of_eps.mean()
        return size_of_z / size_of_eps
