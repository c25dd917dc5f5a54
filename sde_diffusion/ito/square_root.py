"""The square-root process of Cox, Ingersoll & Ross: noise that grows with the state, a stationary
law, and closed forms throughout.

``dx = kappa (theta - x) dt + s sqrt(x) dw`` with ``s^2 = 4 kappa theta / delta`` (Cox, Ingersoll &
Ross 1985, Econometrica 53, eq. 17-18). With ``c_t = theta (1 - exp(-kappa t)) / delta``, x_t given
x_0 is c_t times a non-central chi-square of delta degrees and non-centrality ``x_0 exp(-kappa
t) / c_t``; for whole delta it is the square of the length of a delta-dimensional
Ornstein-Uhlenbeck process, so that all its laws are drawn from normals. A gamma law of shape
``delta/2`` stays one: its scale b becomes ``exp(-kappa t) b + 2 c_t``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sde_diffusion.broadcast import expand, per_sample_sum
from sde_diffusion.errors import require_count
from sde_diffusion.ito.fields import Normals
from sde_diffusion.ito.laws import LogDensity, check_positive
from sde_diffusion.ito.sde import ItoSDE

_RATIO_TERMS = 64


@dataclass(frozen=True)
class SquareRootProcess:
    """The process's settings and closed forms; elementwise on events of any shape.

    Args:
        rate: kappa, the speed of the return to the mean.
        level: theta, the stationary mean.
        degrees: delta, a whole number from 2 (below, the process reaches 0).
        t_min, t_max: as in ``ItoSDE``.
    """

    rate: float = 6.0
    level: float = 1.0
    degrees: int = 4
    t_min: float = 1e-3
    t_max: float = 1.0

    def __post_init__(self) -> None:
        check_positive(rate=self.rate, level=self.level)
        require_count("degrees", self.degrees, least=2)

    @property
    def variance_rate(self) -> float:
        """``s^2``."""
        return 4 * self.rate * self.level / self.degrees

    def sde(self) -> ItoSDE:
        """The process as an ``ItoSDE``: stationary prior, transition, ``div G G^T = s^2``."""
        size = self.variance_rate**0.5
        return ItoSDE(
            lambda x, t: self.rate * (self.level - x),
            lambda x, t: size * x.sqrt(),
            kind="diagonal",
            t_min=self.t_min,
            t_max=self.t_max,
            prior=GammaPrior(self.degrees, 2 * self.level / self.degrees),
            transition=SquareRootTransition(self),
            divergence=lambda x, t: torch.full_like(x, self.variance_rate),
            coordinates="reflected",
        )

    def spread(self, t: Tensor) -> Tensor:
        """``c_t``, of ``t``'s shape."""
        return -self.level / self.degrees * torch.expm1(-self.rate * t)

    def scale_at(self, scale: Tensor, t: Tensor) -> Tensor:
        """The scale at ``t`` of a gamma law of shape ``degrees / 2`` that has ``scale`` at 0."""
        return torch.exp(-self.rate * t) * scale + 2 * self.spread(t)


@dataclass(frozen=True)
class GammaPrior:
    """A gamma law of shape ``degrees / 2``, elementwise, drawn as a sum of squares."""

    degrees: int
    scale: float

    def sample(self, normal: Normals) -> Tensor:
        squares = sum(normal(slot).square() for slot in range(self.degrees))
        return 0.5 * self.scale * torch.as_tensor(squares)

    def log_prob(self, x: Tensor) -> Tensor:
        return per_sample_sum(_log_gamma(x, 0.5 * self.degrees, torch.tensor(self.scale).to(x)))


@dataclass(frozen=True)
class SquareRootTransition:
    """The non-central chi-square kernel."""

    process: SquareRootProcess

    def sample(self, x0: Tensor, t: Tensor, normal: Normals) -> Tensor:
        c = expand(self.process.spread(t), x0)
        centre = (x0 * expand(torch.exp(-self.process.rate * t), x0)).sqrt()
        drawn = (centre + c.sqrt() * normal(0)).square()
        for slot in range(1, self.process.degrees):
            drawn = drawn + c * normal(slot).square()
        return drawn

    def score(self, x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """``nu/x - 1/(2c) + z r/(2x)`` with ``nu = delta/2 - 1``, ``z = sqrt(x x_0 exp(-kappa t)) /
        c`` and r the ratio of the Bessel functions ``I_{nu+1}(z) / I_nu(z)``."""
        wide, nu = x.double(), 0.5 * self.process.degrees - 1
        c = expand(self.process.spread(t).double(), wide)
        kept = expand(torch.exp(-self.process.rate * t.double()), wide)
        z = (wide * x0.double() * kept).sqrt() / c
        score = (nu + 0.5 * z * bessel_ratio(nu, z)) / wide - 0.5 / c
        return score.to(x.dtype)


def bessel_ratio(order: float, z: Tensor) -> Tensor:
    """``I_{order+1}(z) / I_order(z)`` for ``z >= 0``; relative error below 1e-6.

    Backward recurrence ``r_n = z / (2 (n + 1) + z r_{n+1})`` from Amos's bound ``z / (n + 1/2 +
    sqrt((n + 3/2)^2 + z^2))`` on the ratio of a high order (Amos 1974, Math. Comp. 28, eq. 11).
    """
    top = order + _RATIO_TERMS
    ratio = z / (top + 0.5 + ((top + 1.5) ** 2 + z**2).sqrt())
    for k in reversed(range(_RATIO_TERMS)):
        ratio = z / (2 * (order + k + 1) + z * ratio)
    return ratio


class GammaMixture:
    """Data ``sum_k w_k Gamma(degrees/2, b_k)`` under the process: all its marginals, their scores
    and its class posterior. One-dimensional events: ``x`` is ``(B,)`` or ``(B, 1)``.

    Args:
        scales: b, ``(K,)``, positive.
        weights: ``(K,)``, positive; equal by default.
    """

    def __init__(
        self, process: SquareRootProcess, scales: Tensor, weights: Tensor | None = None
    ) -> None:
        scales = torch.as_tensor(scales).double()
        weights = torch.ones_like(scales) if weights is None else torch.as_tensor(weights).double()
        for name, value in (("scales", scales), ("weights", weights)):
            if value.ndim != 1 or value.shape != scales.shape or not bool((value > 0).all()):
                raise ValueError(f"{name} must be K positive numbers, got {value.tolist()}")
        self.process = process
        self.scales = scales
        self.weights = weights / weights.sum()

    def sample(self, n: int, seed: int, t: float = 0.0, label: int | None = None) -> Tensor:
        """``n`` exact samples at ``t``, ``(n, 1)`` float64."""
        generator = torch.Generator().manual_seed(seed)
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        if label is not None:
            which = torch.full_like(which, label)
        scale = self.process.scale_at(self.scales, torch.tensor(t, dtype=torch.float64))[which]
        z = torch.randn(n, self.process.degrees, generator=generator, dtype=torch.float64)
        return (0.5 * scale * z.square().sum(1))[:, None]

    def log_prob(self, x: Tensor, t: Tensor) -> Tensor:
        """Log-density at ``t`` in nats, ``(B,)``."""
        return torch.logsumexp(self._joint(x, t), 1).to(x.dtype)

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """The exact score, of ``x``'s shape."""
        weight = torch.softmax(self._joint(x, t), 1)
        inverse = (weight / self._scales(t)).sum(1).reshape(x.shape)
        return ((0.5 * self.process.degrees - 1) / x.double() - inverse).to(x.dtype)

    def log_posterior(self, label: int) -> LogDensity:
        """``log p(label | x_t)`` as ``(x, t) -> (B,)``: an exact classifier."""
        require_count("label", label, least=0, most=len(self.scales) - 1)

        def log_posterior(x: Tensor, t: Tensor) -> Tensor:
            return torch.log_softmax(self._joint(x, t), 1)[:, label].to(x.dtype)

        return log_posterior

    def _joint(self, x: Tensor, t: Tensor) -> Tensor:
        if x[:1].numel() > 1:
            raise ValueError(f"x must be (B,) or (B, 1), got {tuple(x.shape)}")
        wide = x.double().reshape(-1, 1)
        densities = _log_gamma(wide, 0.5 * self.process.degrees, self._scales(t).to(wide.device))
        return self.weights.to(wide.device).log() + densities

    def _scales(self, t: Tensor) -> Tensor:
        return self.process.scale_at(self.scales.to(t.device), t.double().reshape(-1, 1))


def _log_gamma(x: Tensor, shape: float, scale: Tensor) -> Tensor:
    constant = torch.lgamma(torch.tensor(shape, dtype=torch.float64)).item()
    return (shape - 1) * x.log() - x / scale - shape * scale.log() - constant
