"""SA-Solver: stochastic Adams predictor and corrector."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sde_diffusion.errors import require_between, require_count, unknown_name
from sde_diffusion.sde import NoiseLevel
from solvers.exponential import Function, constant_rate, integral
from solvers.stochastic_adams import StochasticAdams

_MOST_TERMS = 4


@dataclass(frozen=True)
class SASolver(StochasticAdams):
    """SA-Solver: Adams predictor-corrector on the reverse family with stochasticity tau, one
    evaluation a step.

    Xue et al. 2023 (arXiv:2309.05019), in data prediction: ``x_u =
    sigma_u/sigma_t exp(-T) x_t + alpha_u int x0(v) k(v) dv + sigma_u sqrt(1 - exp(-2 T)) z`` with
    ``T = int tau^2 dv`` and ``v = half_log_snr``; x0 is a polynomial through earlier values. Over a
    step a tau that varies is replaced by the constant of the same T, which is again a member of the
    family with the same marginals. Weights are integrals, exact for any steps. tau = 1 with one
    term and no corrector is ancestral sampling, tau = 0 a deterministic exponential Adams method.

    The paper's polynomials are in v. Towards small noise x0 settles exponentially in v, so that an
    extrapolation over steps that grow in v (uniform times on VP) overshoots: at 64 such steps and
    the default orders it misses a Gaussian's variance by more than that variance. Polynomials in
    ``asinh(sigma / alpha)``, which is v at large noise and sigma/alpha at small, do not overshoot,
    and have the same order.

    Orders, the correction of the first step, short runs and steps made by hand:
    ``solvers.stochastic_adams``.

    Args:
        predictor_order: values that the predictor interpolates, 1 to 4.
        corrector_order: values that the corrector interpolates, the new one included, 1 to 4; 0
            for no corrector. An s-step corrector of the paper has s + 1.
        tau: at least 0: a number, or a function of ``sigma / alpha`` (a tensor, elementwise, for
            instance ``lambda s: ((s > 0.05) & (s < 1)).double()``).
        coordinate: what x0 is a polynomial in: ``asinh`` of ``sigma / alpha``, or ``half_log_snr``.
    """

    predictor_order: int = 3
    corrector_order: int = 3
    tau: float | Callable[[Tensor], Tensor] = 1.0
    coordinate: Literal["asinh", "half_log_snr"] = "asinh"

    def __post_init__(self) -> None:
        for name, least in (("predictor_order", 1), ("corrector_order", 0)):
            if require_count(name, getattr(self, name), least=least) > _MOST_TERMS:
                raise ValueError(
                    f"{name} must be at most {_MOST_TERMS}, got {getattr(self, name)!r}"
                )
        if self.coordinate not in ("asinh", "half_log_snr"):
            raise unknown_name("coordinate", self.coordinate, ("asinh", "half_log_snr"))
        if not callable(self.tau):
            require_between("tau", self.tau, 0, math.inf)
            return
        tried = torch.logspace(-4, 3, 29, dtype=torch.float64)
        found = self.tau(tried)
        if not isinstance(found, Tensor) or found.shape != tried.shape:
            raise TypeError(
                "tau must return a tensor like the sigma/alpha it is called with, got "
                f"{type(found).__name__}"
            )
        if not bool((found.isfinite() & (found >= 0)).all()):
            raise ValueError(f"tau must be finite and at least 0 on [1e-4, 1e3], got {found}")

    @property
    def predictor_terms(self) -> int:
        return self.predictor_order

    @property
    def corrector_terms(self) -> int:
        return self.corrector_order

    @property
    def stochastic(self) -> bool:
        return callable(self.tau) or self.tau > 0

    def variable(self, half_log_snr: Tensor) -> Tensor:
        if self.coordinate == "half_log_snr":
            return half_log_snr
        return torch.asinh(torch.exp(-half_log_snr))

    def stochasticity(self, start: NoiseLevel, end: NoiseLevel) -> Tensor:
        ends = start.half_log_snr, end.half_log_snr
        tau = self.tau
        if not callable(tau):
            return tau**2 * (ends[1] - ends[0])
        return integral(*ends, lambda v: tau(torch.exp(-v)).to(v) ** 2)

    def kernel(self, start: NoiseLevel, end: NoiseLevel) -> Function:
        h = end.half_log_snr - start.half_log_snr
        return constant_rate(1 + self.stochasticity(start, end) / h, end.half_log_snr)
