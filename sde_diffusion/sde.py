"""The linear SDEs: what the schedule is, and everything that follows from it.

Every SDE here is ``dx = f(t) x dt + g(t) dw`` with the perturbation kernel
``p(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I)``, so that ``f = d log(alpha)/dt`` and
``g^2 = d sigma^2/dt - 2 f sigma^2`` (Song et al. 2021, arXiv:2011.13456, appendix B; Karras et al.
2022, arXiv:2206.00364, appendix B). Schedules are evaluated in float64, whatever the dtype of the
time, and rounded once at the end.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sde_diffusion.broadcast import expand, per_sample_sum
from sde_diffusion.errors import require_finite


class NoiseLevel(NamedTuple):
    """The schedule at one time. Every field is a 0-d tensor or ``(B,)``, one time per sample.

    ``x_t = alpha x_0 + sigma eps``; ``dx = f x dt + sqrt(g2) dw``;
    ``half_log_snr = log(alpha / sigma)``.
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    half_log_snr: Tensor
    f: Tensor
    g2: Tensor

    @property
    def sigma_over_alpha(self) -> Tensor:
        """The noise-to-signal ratio ``s = sigma / alpha``, the time variable of EDM."""
        return torch.exp(-self.half_log_snr)

    def map(self, function: Callable[[Tensor], Tensor]) -> NoiseLevel:
        """The level with ``function`` applied to every field."""
        return NoiseLevel(*(function(field) for field in self))

    def per_sample(self, n: int) -> NoiseLevel:
        """The level with every field of shape ``(n,)``."""
        return self.map(lambda field: field.expand(n))


class HostedLevel(NoiseLevel):
    """A level prepared before a loop, whose ratio the host knows too, so that a branch needs no
    sync."""

    host_ratio: float

    @classmethod
    def of(cls, fields: Iterable[Tensor], host_ratio: float) -> HostedLevel:
        hosted = tuple.__new__(cls, fields)  # quicker than `_make`, and one for every step
        hosted.host_ratio = host_ratio
        return hosted


def _floating(value: float | Tensor) -> Tensor:
    """``value`` as a floating tensor: Python numbers in float64, integers in the default dtype."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            return value if value.dtype in (torch.float32, torch.float64) else value.float()
        return value.to(torch.get_default_dtype())
    require_finite("time or half log-SNR", value)
    return torch.tensor(value, dtype=torch.float64)


def _wide(value: Tensor) -> Tensor:
    """``value`` in float64, where the device has it."""
    return value if value.device.type == "mps" else value.double()


class SDE(ABC):
    """A linear SDE with scalar diffusion on ``[0, t_max]``, sampled from ``t_max`` down to
    ``t_min``.

    A subclass gives ``_schedule`` and its inverse ``_time``; both receive float64 tensors.

    Attributes:
        t_min: time at which sampling ends and from which training draws; ``0 < t_min < t_max``.
        t_max: time at which the prior is taken.
        default_grid: name, in ``solvers.grids``, of the grid used when the caller names none.
    """

    t_min: float
    t_max: float
    default_grid: ClassVar[str] = "time"

    @abstractmethod
    def _schedule(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """``(alpha, sigma, half_log_snr, f, g2)`` at ``t``."""

    @abstractmethod
    def _time(self, half_log_snr: Tensor) -> Tensor:
        """The ``t`` at which ``half_log_snr`` is reached."""

    def at(self, t: float | Tensor) -> NoiseLevel:
        """The noise level at ``t``.

        Args:
            t: a number (evaluated to float64 tensors) or a tensor of any shape, 0-d or ``(B,)`` in
                use; the fields have its dtype (half precisions become float32).
        Raises:
            ValueError: a number that is not finite.
        """
        t = _floating(t)
        fields = self._schedule(_wide(t))
        return NoiseLevel(t, *(field.to(t.dtype) for field in fields))

    def time(self, half_log_snr: float | Tensor) -> Tensor:
        """Inverse of ``at(t).half_log_snr``; same shape and dtype as its argument."""
        half_log_snr = _floating(half_log_snr)
        return self._time(_wide(half_log_snr)).to(half_log_snr.dtype)

    def perturb(self, x0: Tensor, t: float | Tensor, noise: Tensor) -> Tensor:
        """``x_t = alpha x_0 + sigma noise``, with ``x0`` and ``noise`` ``(B, *event)``, t 0-d or
        ``(B,)``."""
        if noise.shape != x0.shape:
            raise ValueError(
                f"noise must have x0's shape {tuple(x0.shape)}, got {tuple(noise.shape)}"
            )
        level = self.at(t)
        return expand(level.alpha, x0) * x0 + expand(level.sigma, x0) * noise

    def prior_std(self) -> Tensor:
        """Standard deviation of the prior ``N(0, std^2 I)`` at ``t_max``: a 0-d float64 tensor."""
        return torch.ones((), dtype=torch.float64)

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """Log-density of the prior in nats: ``(B, *event) -> (B,)``."""
        std = self.prior_std().item()
        dimensions = x[0].numel() if len(x) else 0
        constant = dimensions * (math.log(std) + 0.5 * math.log(2 * math.pi))
        return -0.5 * per_sample_sum((x / std) ** 2) - constant

    def config(self) -> dict[str, Any]:
        """The SDE as JSON-able settings; ``sde_from_config`` is the inverse."""
        return {"kind": type(self).__name__, **asdict(self)}  # type: ignore[call-overload]

    def _check_times(self) -> None:
        require_finite("t_min", self.t_min, above=0.0)
        require_finite("t_max", self.t_max)
        if self.t_min >= self.t_max:
            raise ValueError(
                f"t_min must be below t_max, got t_min={self.t_min!r}, t_max={self.t_max!r}"
            )


def _check_betas(beta_min: float, beta_max: float) -> None:
    require_finite("beta_min", beta_min, above=0.0)
    require_finite("beta_max", beta_max)
    if beta_max < beta_min:
        raise ValueError(f"beta_max must be at least beta_min={beta_min!r}, got {beta_max!r}")


def _check_sigmas(sigma_min: float, sigma_max: float) -> None:
    require_finite("sigma_min", sigma_min, above=0.0)
    require_finite("sigma_max", sigma_max)
    if sigma_max <= sigma_min:
        raise ValueError(f"sigma_max must be above sigma_min={sigma_min!r}, got {sigma_max!r}")


def _linear_decay(t: Tensor, beta_min: float, beta_max: float) -> tuple[Tensor, Tensor]:
    """``(-log alpha, beta)`` of the linear-beta schedule."""
    slope = beta_max - beta_min
    return t * (t * (slope / 4) + beta_min / 2), beta_min + t * slope


def _linear_decay_time(decay: Tensor, beta_min: float, beta_max: float) -> Tensor:
    """Inverse of ``-log alpha``, in the form that loses no digits near ``t = 0``."""
    return 4 * decay / (beta_min + torch.sqrt(beta_min**2 + 4 * (beta_max - beta_min) * decay))


def vp_decay(half_log_snr: Tensor) -> Tensor:
    """``-log alpha`` as a function of ``half_log_snr`` when ``alpha^2 + sigma^2 = 1``."""
    return 0.5 * torch.nn.functional.softplus(-2 * half_log_snr, threshold=1e4)


def vp_levels(decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(alpha, sigma, half_log_snr)`` of a variance-preserving SDE from ``decay = -log alpha``."""
    variance = -torch.expm1(-2 * decay)
    return torch.exp(-decay), torch.sqrt(variance), -decay - 0.5 * torch.log(variance)


@dataclass(frozen=True)
class _LinearBeta(SDE):
    """``beta(t)`` from ``beta_min`` at 0 to ``beta_max`` at 1, linear in t."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-3
    t_max: float = 1.0

    def __post_init__(self) -> None:
        _check_betas(self.beta_min, self.beta_max)
        self._check_times()


@dataclass(frozen=True)
class VPSDE(_LinearBeta):
    """Variance preserving, ``beta(t)`` linear (Song et al. 2021, eq. 32-33; the limit of DDPM)."""

    def _schedule(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        decay, beta = _linear_decay(t, self.beta_min, self.beta_max)
        return *vp_levels(decay), -0.5 * beta, beta

    def _time(self, half_log_snr: Tensor) -> Tensor:
        return _linear_decay_time(vp_decay(half_log_snr), self.beta_min, self.beta_max)


@dataclass(frozen=True)
class CosineVPSDE(SDE):
    """Variance preserving with the cosine schedule (Nichol & Dhariwal 2021, arXiv:2102.09672, eq.
    17).

    ``alpha`` reaches 0 at t = 1, where beta is unbounded, so ``t_max`` must stay below 1; the
    default 0.9946 is where a 1,000-step chain has beta = 0.999 (Lu et al. 2022, arXiv:2206.00927,
    app. D.4).
    """

    s: float = 0.008
    t_min: float = 1e-3
    t_max: float = 0.9946

    def __post_init__(self) -> None:
        require_finite("s", self.s, above=0.0)
        self._check_times()
        if self.t_max >= 1:
            raise ValueError(
                f"t_max must be below 1, where the cosine schedule's alpha is 0, got {self.t_max!r}"
            )

    def _schedule(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        rate = 0.5 * math.pi / (1 + self.s)
        angle = rate * (t + self.s)
        decay = math.log(math.cos(rate * self.s)) - torch.log(torch.cos(angle))
        f = -rate * torch.tan(angle)
        return *vp_levels(decay), f, -2 * f

    def _time(self, half_log_snr: Tensor) -> Tensor:
        rate = 0.5 * math.pi / (1 + self.s)
        cosine = torch.exp(-vp_decay(half_log_snr)) * math.cos(rate * self.s)
        return torch.acos(cosine) / rate - self.s


@dataclass(frozen=True)
class SubVPSDE(_LinearBeta):
    """Sub-variance-preserving: VP's alpha, ``sigma = 1 - alpha^2`` (Song et al. 2021, eq.
    27-29)."""

    def _schedule(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        decay, beta = _linear_decay(t, self.beta_min, self.beta_max)
        sigma = -torch.expm1(-2 * decay)
        g2 = -beta * torch.expm1(-4 * decay)
        return torch.exp(-decay), sigma, -decay - torch.log(sigma), -0.5 * beta, g2

    def _time(self, half_log_snr: Tensor) -> Tensor:
        # alpha^2 + (sigma / alpha) alpha - 1 = 0, so alpha = exp(-asinh(sigma / (2 alpha))).
        decay = torch.asinh(0.5 * torch.exp(-half_log_snr))
        return _linear_decay_time(decay, self.beta_min, self.beta_max)


@dataclass(frozen=True)
class VESDE(SDE):
    """Variance exploding, sigma geometric in t (Song et al. 2021, eq. 30-31; the limit of SMLD).

    The exact transition from x(0) has variance ``sigma_t^2 - sigma_min^2``; as in the paper,
    sigma_t^2 is used, i.e. the data is thought of as already carrying noise of ``sigma_min``.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_min: float = 1e-5
    t_max: float = 1.0

    def __post_init__(self) -> None:
        _check_sigmas(self.sigma_min, self.sigma_max)
        self._check_times()

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def _schedule(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        half_log_snr = -math.log(self.sigma_min) - t * self._log_ratio
        sigma = torch.exp(-half_log_snr)
        zero = torch.zeros_like(t)
        return zero + 1, sigma, half_log_snr, zero, 2 * self._log_ratio * sigma**2

    def _time(self, half_log_snr: Tensor) -> Tensor:
        return (-half_log_snr - math.log(self.sigma_min)) / self._log_ratio

    def prior_std(self) -> Tensor:
        return self.at(float(self.t_max)).sigma


@dataclass(frozen=True, init=False)
class EDMSDE(SDE):
    """Variance exploding with ``sigma = t`` (Karras et al. 2022, arXiv:2206.00364, table 1)."""

    sigma_min: float
    sigma_max: float
    t_min: float
    t_max: float
    default_grid: ClassVar[str] = "karras"

    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        t_min: float | None = None,
        t_max: float | None = None,
    ) -> None:
        """Times are noise levels here: ``t_min`` and ``t_max`` default to the two sigmas."""
        _check_sigmas(sigma_min, sigma_max)
        object.__setattr__(self, "sigma_min", sigma_min)
        object.__setattr__(self, "sigma_max", sigma_max)
        object.__setattr__(self, "t_min", sigma_min if t_min is None else t_min)
        object.__setattr__(self, "t_max", sigma_max if t_max is None else t_max)
        self._check_times()

    def _schedule(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        zero = torch.zeros_like(t)
        return zero + 1, t, -torch.log(t), zero, 2 * t

    def _time(self, half_log_snr: Tensor) -> Tensor:
        return torch.exp(-half_log_snr)

    def prior_std(self) -> Tensor:
        return torch.tensor(self.t_max, dtype=torch.float64)
