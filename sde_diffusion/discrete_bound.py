"""The variational bound of a discrete DDPM chain, term by term, and as a training loss.

For the chain ``q(x_i | x_{i-1}) = N(sqrt(1 - beta_i) x_{i-1}, beta_i I)``, i = 1 .. N, and the
model ``p(x_{i-1} | x_i)`` with the posterior's mean at the estimated x0 and a fixed variance,

    -log p(x_0) <= L_N + sum_{i=2}^N L_{i-1} + L_0

(Ho et al. 2020, arXiv:2006.11239, eq. 5; Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 4-7):
``L_N`` compares the chain's end with the prior, ``L_{i-1}`` the posterior ``q(x_{i-1} | x_i, x_0)``
with the model, and ``L_0`` is the log-probability of the data's own bin under ``p(x_0 | x_1)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from sde_diffusion.broadcast import expand, per_sample_sum
from sde_diffusion.errors import require_count, require_finite, unknown_name
from sde_diffusion.loop import generator_for
from sde_diffusion.losses import mean_square, perturbed, stratified
from sde_diffusion.parametrization import (
    Label,
    Model,
    ParametrizedModel,
    bind,
    table_index,
)
from sde_diffusion.prediction import Prediction, ScoreFn, select
from sde_diffusion.sde import SDE, NoiseLevel
from sde_diffusion.tabulated import TabulatedVPSDE

__all__ = [
    "ChainTimes",
    "VLBLoss",
    "VariationalBound",
    "decoder_nll",
    "require_chain",
    "vlb",
]

VARIANCES = ("small", "large")
_OPEN = 1e10  # deviations beyond any tail; infinity would have a gradient of NaN


def require_chain(sde: SDE, what: str) -> TabulatedVPSDE:
    """``sde``, if it is a discrete chain.

    Raises:
        ValueError: it is not; ``what`` needed it.
    """
    if not isinstance(sde, TabulatedVPSDE):
        raise ValueError(
            f"{what} needs a discrete chain, got {type(sde).__name__}; give the SDE as "
            "TabulatedVPSDE.from_betas(betas)"
        )
    return sde


@dataclass(frozen=True)
class ChainTimes:
    """Times drawn uniformly from a chain's own, ``(i + 1) / N``, within its [t_min, t_max].

    A batch is spread evenly over the chain (one draw in each of n equal parts of it), in order.
    """

    chain: TabulatedVPSDE

    def __call__(self, n: int, sde: SDE, generator: torch.Generator) -> Tensor:
        """n times, (n,) float32; ``sde`` is the chain."""
        times = self.chain.times
        rounding = 1e-9
        inside = (times >= self.chain.t_min - rounding) & (times <= self.chain.t_max + rounding)
        times = times[inside].to(generator.device)
        index = (len(times) * stratified(n, generator)).long().clamp_max(len(times) - 1)
        return times[index].float()


@dataclass(frozen=True)
class _StepTerms:
    """The terms of the steps i = 1 .. N (counted from 0 here), L_0 and L_1 .. L_{N-1}, in nats.

    Attributes:
        weight: ``beta_i^2 / (2 variance_i alpha_i (1 - abar_i))``, of ``||eps - eps_theta||^2`` in
            L_{i-1} (Ho et al. 2020, eq. 12), (N,) float64.
        mismatch: the rest of L_{i-1} for each dimension, 0 where the model's variance is the
            posterior's.
        decoder_std: of the model's last step; ``sqrt(beta-tilde_2)`` under both choices of the
            variance, since beta-tilde_1 is 0 (as in Ho et al.'s code).
        bins: of the decoder.
    """

    weight: Tensor
    mismatch: Tensor
    decoder_std: Tensor
    bins: int

    @classmethod
    def of(cls, chain: TabulatedVPSDE, variance: str, bins: int) -> _StepTerms:
        """For the model's variance ``beta-tilde_i`` ("small") or ``beta_i`` ("large")."""
        if variance not in VARIANCES:
            raise unknown_name("variance", variance, VARIANCES)
        beta = torch.tensor(chain.betas, dtype=torch.float64)
        left = -torch.expm1(torch.log1p(-beta).cumsum(0))  # 1 - abar_i
        tilde = beta.clone()
        tilde[1:] = beta[1:] * left[:-1] / left[1:]
        first = tilde[min(1, len(beta) - 1)].clone()
        tilde[0] = first
        chosen = tilde if variance == "small" else torch.cat([first[None], beta[1:]])
        ratio = tilde / chosen
        weight = beta**2 / (2 * chosen * (1 - beta) * left)
        return cls(weight, 0.5 * (ratio - 1 - ratio.log()), first.sqrt(), bins)

    def __call__(self, prediction: Prediction, x0: Tensor, noise: Tensor, step: Tensor) -> Tensor:
        """The terms of steps (B,), counted from 0, for a prediction from their ``x_i``: (B,)
        float64."""
        weight, mismatch = self.weight.to(x0.device)[step], self.mismatch.to(x0.device)[step]
        error = per_sample_sum((prediction.eps - noise) ** 2).double()
        kl = weight * error + x0[0].numel() * mismatch
        # Where the posterior has no variance its mean is x0 itself.
        decoder = decoder_nll(x0, prediction.x0, self.decoder_std.to(x0.device), self.bins)
        return torch.where(step == 0, decoder, kl)


@dataclass(frozen=True)
class VLBLoss:
    """``simple ||eps_theta - eps||^2 / D + weight N L_i / D`` at one step i per sample, (B,).

    With steps drawn uniformly (`ChainTimes`) ``N L_i / D`` is, in expectation, the bound without
    its constant L_N in nats per dimension. ``simple = 1`` with a small weight is the hybrid loss of
    Nichol & Dhariwal 2021 (eq. 16), here with fixed variances.

    Attributes:
        chain: the discrete chain; levels are at its own times.
        variance: of the model: "small" or "large".
        bins: brightness levels of the data, as in `decoder_nll`.
    """

    chain: TabulatedVPSDE
    variance: str = "small"
    bins: int = 256
    simple: float = 0.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        require_count("bins", self.bins, least=2)
        require_finite("weight", self.weight, above=0.0)
        self.terms_of  # noqa: B018  (an unknown variance is found out now)

    @cached_property
    def terms_of(self) -> _StepTerms:
        return _StepTerms.of(self.chain, self.variance, self.bins)

    def __call__(
        self,
        model: ParametrizedModel,
        x0: Tensor,
        label: Tensor | None,
        level: NoiseLevel,
        noise: Tensor,
    ) -> Tensor:
        prediction = model(perturbed(x0, level, noise), level, label)
        steps = len(self.chain.betas)
        step = table_index(steps)(level)
        bound = self.terms_of(prediction, x0, noise, step) * (steps / x0[0].numel())
        simple = mean_square(prediction.eps - noise)
        return self.simple * simple + self.weight * bound.to(simple.dtype)


def decoder_nll(x0: Tensor, mean: Tensor, std: Tensor, bins: int = 256) -> Tensor:
    """``-log P(x_0)`` under ``N(mean, std^2)`` over ``bins`` equal bins in [-1, 1], summed over the
    event: (B,) nats.

    Bins are centred at ``-1, -1 + 2 / (bins - 1), .., 1``; the two at the ends are open outwards
    (Ho et al. 2020, eq. 13).

    Args:
        x0: data in [-1, 1], (B, *event), at the centres of bins.
        mean: of the decoder, (B, *event).
        std: of the decoder, 0-d or (B,).
        bins: brightness levels of the data, at least 2.
    """
    half = 1.0 / (bins - 1)
    # In float64: a bin far from the mean has a probability that float32 differences lose.
    x0, mean, std = x0.double(), mean.double(), expand(std.double(), x0)
    lower = torch.where(x0 < -1 + half, -_OPEN, (x0 - half - mean) / std)
    upper = torch.where(x0 > 1 - half, _OPEN, (x0 + half - mean) / std)
    # On the side of 0 where the tails are small: P(a < z < b) = P(-b < z < -a).
    flip = lower + upper > 0
    low, high = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
    log_high, log_low = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    gap = (log_low - log_high).clamp_max(-1e-12)
    return -per_sample_sum(log_high + torch.log(-torch.expm1(gap)))


@dataclass(frozen=True)
class VariationalBound:
    """The bound's terms for each sample, in nats, summed over the event's dimensions.

    Attributes:
        decoder: L_0, (B,).
        kl: L_1 .. L_{N-1}, (B, N - 1).
        prior: L_N, (B,); exact.
        noise_variance: of each sample's total, from its draws of noise, (B,); None for one draw.
        dimensions: of one sample.
    """

    decoder: Tensor
    kl: Tensor
    prior: Tensor
    noise_variance: Tensor | None
    dimensions: int

    @property
    def total(self) -> Tensor:
        """Upper bound on ``-log p(x_0)``, (B,) nats."""
        return self.decoder + self.kl.sum(1) + self.prior

    @property
    def bits_per_dim(self) -> Tensor:
        """`total` in bits per dimension, (B,). The data is discrete, so there is no offset."""
        return self.total / (self.dimensions * math.log(2))

    @property
    def terms(self) -> Tensor:
        """Means over the samples of L_0, L_1, .., L_N, (N + 1,) nats."""
        return torch.cat([self.decoder[:, None], self.kl, self.prior[:, None]], 1).mean(0)

    def stderr(self, population: bool = True) -> float:
        """Standard error of ``total.mean()`` in nats; NaN where there is nothing to tell it from.

        Args:
            population: of the data's mean, from the spread over samples; else of the mean over just
                these samples, from the spread over draws of noise.
        """
        if population:
            return float(self.total.std() / math.sqrt(len(self.total)))
        if self.noise_variance is None:
            return math.nan
        return float(self.noise_variance.sum().sqrt() / len(self.noise_variance))

    def report(self) -> dict[str, float]:
        """The figures by name, JSON-able: nats and bits per dimension of the sum and its parts."""
        scale = 1 / (self.dimensions * math.log(2))
        parts = {
            "L_0": self.decoder.mean(),
            "L_1..L_{N-1}": self.kl.sum(1).mean(),
            "L_N": self.prior.mean(),
            "total": self.total.mean(),
        }
        nats = {f"{name} (nats)": float(value) for name, value in parts.items()}
        bits = {f"{name} (bits/dim)": float(value) * scale for name, value in parts.items()}
        return {
            **nats,
            **bits,
            "stderr (nats)": self.stderr(),
            "stderr (bits/dim)": self.stderr() * scale,
        }


@torch.no_grad()
def vlb(
    score_fn: ScoreFn | Model,
    sde: TabulatedVPSDE,
    x0: Tensor,
    *,
    label: Label = None,
    variance: str = "small",
    bins: int = 256,
    clip: bool = False,
    draws: int = 1,
    seed: int = 0,
    chunk: int = 1024,
) -> VariationalBound:
    """Every term of a chain's variational bound, by Monte Carlo over the noise.

    Each term of each sample is the mean over ``draws`` of the noise, which is a function of the
    seed and of the sample's place in x0 alone: it does not depend on ``chunk``, and the first rows
    of x0 keep their values if others are added.

    Args:
        score_fn: a model, or a score function; N evaluations for each sample and draw.
        sde: the chain.
        x0: data in [-1, 1] at the centres of its bins, (B, *event).
        label: classes for a conditional model: an int, (B,), or None for the null label.
        variance: the model's: "small" (beta-tilde) or "large" (beta).
        bins: brightness levels of the data, as in `decoder_nll`.
        clip: clip the estimate of x0 to [-1, 1], where the data is, as published figures do; it can
            only lower the KLs.
        chunk: states evaluated at a time.

    Raises:
        ValueError: not a chain; data outside [-1, 1] or empty; numbers out of range; an unknown
            variance; a label that does not fit.
    """
    chain = require_chain(sde, "vlb")
    _check_data(x0)
    for name, value, least in (("bins", bins, 2), ("draws", draws, 1), ("chunk", chunk, 1)):
        require_count(name, value, least=least)
    require_count("seed", seed, least=0)
    bound = cast(ScoreFn, score_fn) if label is None else bind(score_fn, label)
    terms_of = _StepTerms.of(chain, variance, bins)
    steps = len(chain.betas)
    sums = torch.zeros(len(x0), steps, dtype=torch.float64)
    totals = torch.zeros(draws, len(x0), dtype=torch.float64)
    for draw in range(draws):
        for rows in torch.arange(len(x0)).split(max(1, chunk // steps)):
            noise = torch.cat([_noise(x0, int(row), steps, draw, seed) for row in rows])
            pairs = torch.cartesian_prod(rows, torch.arange(steps))
            parts = []
            for which, z in zip(pairs.split(chunk), noise.split(chunk), strict=True):
                row, step = which[:, 0], which[:, 1].to(x0.device)
                clean, level = x0[row.to(x0.device)], chain.at(chain.times.to(x0.device)[step])
                prediction = select(bound, row)(perturbed(clean, level, z), level)
                if clip:
                    inside = prediction.x0.clamp(-1, 1)
                    prediction = Prediction.from_x0(prediction.x, level, inside)
                parts.append(terms_of(prediction, clean, z, step))
            terms = torch.cat(parts).reshape(len(rows), steps).cpu()
            sums[rows] += terms
            totals[draw, rows] = terms.sum(1)
    means = sums / draws
    end = chain.at(float(chain.times[-1]))
    alpha, sigma, dimensions = float(end.alpha), float(end.sigma), x0[0].numel()
    square = per_sample_sum(x0.double() ** 2).cpu()
    prior = 0.5 * (alpha**2 * square + dimensions * (sigma**2 - 1 - 2 * math.log(sigma)))
    spread = totals.var(0) / draws if draws > 1 else None
    return VariationalBound(means[:, 0], means[:, 1:], prior, spread, dimensions)


def _check_data(x0: Tensor) -> None:
    if x0.ndim < 1 or not x0.numel():
        raise ValueError(f"x0 must hold samples, (B, *event), got shape {tuple(x0.shape)}")
    largest = float(x0.abs().max())
    if not largest <= 1 + 1e-6:
        raise ValueError(
            f"x0 must lie in [-1, 1], got a value of size {largest:g}; scale the data as for "
            "training"
        )


def _noise(x0: Tensor, row: int, steps: int, draw: int, seed: int) -> Tensor:
    """Noise of one sample at every step, (steps, *event)."""
    generator = generator_for(seed, draw, row)
    return torch.randn(steps, *x0.shape[1:], generator=generator).to(x0)
