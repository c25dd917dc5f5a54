"""Geometric Brownian motion: multiplicative noise with a solution in closed form.

``dx_i = mu_i x_i dt + x_i sum_j S_ij dw_j`` has ``x_i(t) = x_i(0) exp((mu_i - v_i/2) t + sum_j S_ij
w_j(t))``, ``v_i = sum_j S_ij^2`` (Kloeden & Platen 1992, eq. 4.4.6): log-normal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sde_diffusion.broadcast import expand, per_sample_sum
from sde_diffusion.errors import require_finite
from sde_diffusion.ito.fields import Normals
from sde_diffusion.ito.laws import check_positive
from sde_diffusion.ito.sde import ItoSDE


@dataclass(frozen=True)
class LogNormal:
    """``exp(N(mean, variance))``, elementwise: a prior, a law of data, or a marginal."""

    mean: Tensor | float
    variance: Tensor | float

    def sample(self, normal: Normals) -> Tensor:
        z = normal(0)
        return torch.exp(torch.as_tensor(self.mean) + torch.as_tensor(self.variance).sqrt() * z)

    def log_prob(self, x: Tensor) -> Tensor:
        y, variance = x.log(), torch.as_tensor(self.variance).to(x)
        density = -0.5 * (y - self.mean) ** 2 / variance - 0.5 * (2 * math.pi * variance).log() - y
        return per_sample_sum(density)

    def score(self, x: Tensor) -> Tensor:
        """The gradient of ``log_prob``."""
        return -((x.log() - self.mean) / self.variance + 1) / x


@dataclass(frozen=True)
class GeometricBrownianMotion:
    """``dx = rate x dt + volatility x dw``, elementwise, each element with a motion of its own.

    Args:
        rate: mu.
        volatility: above 0.
        t_min, t_max: as in ``ItoSDE``.
        prior: the law at ``t_max``; the process has no stationary one, so that this is the data's
            own marginal there, or near it.
    """

    rate: float = 0.1
    volatility: float = 1.0
    t_min: float = 1e-3
    t_max: float = 1.0
    prior: LogNormal | None = None

    def __post_init__(self) -> None:
        require_finite("rate", self.rate)
        check_positive(volatility=self.volatility)

    def sde(self) -> ItoSDE:
        """The process as an ``ItoSDE``; ``div G G^T`` is ``2 volatility^2 x``."""
        return ItoSDE(
            lambda x, t: self.rate * x,
            lambda x, t: self.volatility * x,
            kind="diagonal",
            t_min=self.t_min,
            t_max=self.t_max,
            prior=self.prior,
            transition=GeometricTransition(self),
            divergence=lambda x, t: 2 * self.volatility**2 * x,
            coordinates="log",
        )

    def solution(self, x0: Tensor, t: Tensor | float, motion: Tensor) -> Tensor:
        """The state at ``t`` from ``x0``, driven by a motion that has reached ``motion``."""
        return x0 * torch.exp(self._trend * t + self.volatility * motion)

    def marginal(self, data: LogNormal, t: Tensor | float) -> LogNormal:
        """The law at ``t`` of data that is log-normal."""
        return LogNormal(data.mean + self._trend * t, data.variance + self.volatility**2 * t)

    @property
    def _trend(self) -> float:
        return self.rate - 0.5 * self.volatility**2


@dataclass(frozen=True)
class GeometricTransition:
    """The log-normal kernel."""

    process: GeometricBrownianMotion

    def sample(self, x0: Tensor, t: Tensor, normal: Normals) -> Tensor:
        t = expand(t, x0)
        return self.process.solution(x0, t, t.sqrt() * normal(0))

    def score(self, x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        return self.process.marginal(LogNormal(x0.log(), 0.0), expand(t, x)).score(x)


def correlated_geometric(rate: Tensor, volatility: Tensor, t_max: float = 1.0) -> ItoSDE:
    """Geometric motions driven by shared ones: general noise ``G_ij = x_i S_ij``, commutative.

    Args:
        rate: ``(D,)``.
        volatility: S, ``(D, M)``.
    """
    if volatility.ndim != 2 or rate.shape != volatility.shape[:1]:
        raise ValueError(
            f"volatility must be (D, M) and rate (D,), got {tuple(volatility.shape)} and "
            f"{tuple(rate.shape)}"
        )
    return ItoSDE(
        lambda x, t: rate.to(x) * x,
        lambda x, t: x[:, :, None] * volatility.to(x),
        kind="general",
        t_max=t_max,
        coordinates="log",
    )
