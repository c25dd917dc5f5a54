"""A discrete DDPM chain as a continuous SDE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from sde_diffusion.sde import SDE, vp_decay, vp_levels

_BISECTIONS = 54  # halves the unit interval down to a float64 ulp


@dataclass(frozen=True)
class TabulatedVPSDE(SDE):
    """The continuous twin of a DDPM chain ``beta_0 .. beta_{N-1}``, exact at ``t = (i + 1) / N``.

    ``log alpha`` (half the log of the chain's cumulative product of ``1 - beta``) is interpolated
    in t by the monotone cubic of Fritsch & Carlson 1980, from ``(0, 0)`` on, so that f and g^2 are
    continuous and positive noise is added everywhere. Any continuous solver samples a discretely
    trained network this way.

    Args:
        betas: the chain's noise variances, each in (0, 1), first step first.
        t_min: end of sampling; the chain's first time ``1 / N`` by default (given as 0).
        t_max: start of sampling.
    """

    betas: tuple[float, ...] = field(repr=False)
    t_min: float = 0.0
    t_max: float = 1.0
    default_grid: ClassVar[str] = "table"

    def __post_init__(self) -> None:
        if not self.betas:
            raise ValueError("betas is empty: a chain has at least one step")
        for index, beta in enumerate(self.betas):
            if not 0 < beta < 1:
                raise ValueError(f"betas[{index}] must lie strictly between 0 and 1, got {beta!r}")
        if self.t_min == 0.0:
            object.__setattr__(self, "t_min", min(1 / len(self.betas), 0.5 * self.t_max))
        self._check_times()
        if self.t_max > 1:
            raise ValueError(f"t_max must be at most 1, the end of the table, got {self.t_max!r}")

    @classmethod
    def from_betas(
        cls, betas: Sequence[float] | Tensor, t_min: float = 0.0, t_max: float = 1.0
    ) -> TabulatedVPSDE:
        """From any one-dimensional sequence, tensor or array of betas."""
        values = torch.as_tensor(betas, dtype=torch.float64)
        if values.ndim != 1:
            raise ValueError(f"betas must be one-dimensional, got shape {tuple(values.shape)}")
        return cls(tuple(values.tolist()), t_min, t_max)

    @cached_property
    def times(self) -> Tensor:
        """The chain's own times ``(i + 1) / N``, increasing, ``(N,)`` float64."""
        n = len(self.betas)
        return torch.arange(1, n + 1, dtype=torch.float64) / n

    @cached_property
    def _knots(self) -> tuple[Tensor, Tensor]:
        """Decay ``-log alpha`` and its slope in units of one table interval, at ``t = 0, 1/N, ..,
        1``."""
        betas = torch.tensor(self.betas, dtype=torch.float64)
        decay = torch.cat([betas.new_zeros(1), -0.5 * torch.log1p(-betas).cumsum(0)])
        secant = decay.diff()
        inner = 2 * secant[:-1] * secant[1:] / (secant[:-1] + secant[1:])
        if len(secant) == 1:
            return decay, secant.expand(2).clone()
        ends = torch.stack([1.5 * secant[0] - 0.5 * secant[1], 1.5 * secant[-1] - 0.5 * secant[-2]])
        # One-sided slopes, kept where the interpolant is monotone: between 0 and 3 secants.
        limit = 3 * torch.stack([secant[0], secant[-1]])
        ends = torch.minimum(ends.clamp_min(0), limit)
        return decay, torch.cat([ends[:1], inner, ends[1:]])

    def _pieces(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        decay, slope = (knots.to(index.device) for knots in self._knots)
        return decay[index], decay[index + 1], slope[index], slope[index + 1]

    def _schedule(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        n = len(self.betas)
        index = (t * n).floor().long().clamp(0, n - 1)
        u = (t * n - index).clamp(0, 1)
        pieces = self._pieces(index)
        f = -_hermite_slope(u, *pieces) * n
        return *vp_levels(_hermite(u, *pieces)), f, -2 * f

    def _time(self, half_log_snr: Tensor) -> Tensor:
        target = vp_decay(half_log_snr)
        n = len(self.betas)
        decay = self._knots[0].to(target.device)
        index = (torch.searchsorted(decay, target.contiguous(), right=True) - 1).clamp(0, n - 1)
        pieces = self._pieces(index)
        low, high = torch.zeros_like(target), torch.ones_like(target)
        for _ in range(_BISECTIONS):
            middle = 0.5 * (low + high)
            below = _hermite(middle, *pieces) < target
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (index + 0.5 * (low + high)) / n


def _hermite(
    u: Tensor, left: Tensor, right: Tensor, slope_left: Tensor, slope_right: Tensor
) -> Tensor:
    """Cubic Hermite interpolant on the unit interval."""
    rise = right - left
    bend = slope_left + slope_right - 2 * rise
    return left + u * (slope_left + u * (3 * rise - 2 * slope_left - slope_right + u * bend))


def _hermite_slope(
    u: Tensor, left: Tensor, right: Tensor, slope_left: Tensor, slope_right: Tensor
) -> Tensor:
    rise = right - left
    bend = slope_left + slope_right - 2 * rise
    return slope_left + u * (2 * (3 * rise - 2 * slope_left - slope_right) + 3 * u * bend)
