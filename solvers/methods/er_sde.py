"""ER-SDE-Solver: the extended reverse-time SDE with a noise scaling function of one's choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from sde_diffusion.errors import require_count, unknown_name
from sde_diffusion.sde import NoiseLevel
from solvers.exponential import Function, integral
from solvers.stochastic_adams import StochasticAdams

NoiseScale = Callable[[Tensor], Tensor]

NOISE_SCALES: dict[str, NoiseScale] = {
    "ode": lambda s: s,
    "sde": lambda s: s**2,
    "er_sde_5": lambda s: s * (torch.exp(s**0.3) + 10),
}


@dataclass(frozen=True)
class ERSDE(StochasticAdams):
    """ER-SDE-Solver-1, -2, -3: multistep on the extended reverse-time SDE, one evaluation a step.

    Cui et al. 2023 (arXiv:2309.06169), in ``y = x / alpha``, ``s = sigma / alpha`` for every linear
    SDE, with a noise scaling function phi:

        y_u = phi_u/phi_t y_t + phi_u int x0 d(1/phi) + sqrt(s_u^2 - s_t^2 (phi_u/phi_t)^2) z

    which is the reverse family with ``tau^2 = d log(phi) / d log(s) - 1``, so ``phi(s) / s`` must
    not fall with s. x0 is the polynomial in s through its last values (the paper's Taylor terms,
    with exact differences for any steps), and the integrals are Gauss-Legendre sums in float64.

    The setting is called ``terms``, for the weak order is 2 at most where there is noise; see
    ``solvers.stochastic_adams`` for orders, the first step, short runs and steps made by hand.
    ``noise_scale="ode"`` has orders 1 to 3.

    Args:
        terms: 1 to 3: the k of ER-SDE-Solver-k.
        noise_scale: ``ode``, s, the probability flow; ``sde``, s^2, the reverse SDE; ``er_sde_5``,
            ``s (exp(s^0.3) + 10)``, the paper's choice; or an elementwise differentiable function
            of ``sigma / alpha``.
    """

    terms: int = 3
    noise_scale: str | NoiseScale = "er_sde_5"

    def __post_init__(self) -> None:
        if require_count("terms", self.terms) > 3:
            raise ValueError(f"terms must be 1, 2 or 3, got {self.terms!r}")
        if callable(self.noise_scale):
            _largest_excess(self.noise_scale)
        elif self.noise_scale not in NOISE_SCALES:
            raise unknown_name("noise_scale", self.noise_scale, NOISE_SCALES)

    @property
    def predictor_terms(self) -> int:
        return self.terms

    @property
    def corrector_terms(self) -> int:
        return 0

    @property
    def stochastic(self) -> bool:
        return _largest_excess(self._phi) > 1e-12

    @property
    def _phi(self) -> NoiseScale:
        scale = self.noise_scale
        return NOISE_SCALES[scale] if isinstance(scale, str) else scale

    def variable(self, half_log_snr: Tensor) -> Tensor:
        return torch.exp(-half_log_snr)

    def stochasticity(self, start: NoiseLevel, end: NoiseLevel) -> Tensor:
        ends = start.half_log_snr, end.half_log_snr
        return integral(*ends, lambda v: _rate(self._phi, torch.exp(-v)) - 1)

    def kernel(self, start: NoiseLevel, end: NoiseLevel) -> Function:
        phi_end = self._phi(end.sigma_over_alpha)[..., None]

        def kernel(v: Tensor) -> Tensor:
            # alpha_u phi_u d(1/phi): d(1/phi) = d log(phi)/d log(s) / phi dv
            s = torch.exp(-v)
            return _rate(self._phi, s) * phi_end / self._phi(s)

        return kernel


def _rate(phi: NoiseScale, s: Tensor) -> Tensor:
    """``d log(phi) / d log(s)``, elementwise."""
    with torch.enable_grad():
        at = s.detach().clone().requires_grad_(True)
        value = phi(at)
        if not isinstance(value, Tensor) or value.shape != at.shape or not value.requires_grad:
            raise TypeError(
                "noise_scale must be an elementwise, differentiable function of a tensor"
            )
        (slope,) = torch.autograd.grad(value.sum(), at)
    return (s * slope / value).detach()


@cache
def _largest_excess(phi: NoiseScale) -> float:
    """The largest ``tau^2`` on the range of noise levels there are; raises where it is negative."""
    s = torch.logspace(-4, 2.5, 131, dtype=torch.float64)
    value, excess = phi(s), _rate(phi, s) - 1
    if not bool((value.isfinite() & (value > 0) & excess.isfinite()).all()):
        raise ValueError("noise_scale must be finite and above 0 for sigma/alpha in [1e-4, 300]")
    if bool((excess < -1e-9).any()):
        at = float(s[excess.argmin()])
        raise ValueError(
            "noise_scale(s) / s must not fall with s = sigma/alpha, or the noise would have "
            f"negative variance; it falls at s = {at:.3g}"
        )
    return float(excess.max())
