"""An upper bound on -log p(x) under the reverse SDE of a score, one sample at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sde_diffusion.broadcast import expand, per_sample_sum
from sde_diffusion.errors import require_count
from sde_diffusion.prediction import ScoreFn, select
from sde_diffusion.sde import SDE, NoiseLevel
from solvers.likelihood import sample_numbers
from solvers.noise import CounterNoise

_TIMES, _NOISE = 4, 5  # slots of the counter noise


@dataclass(frozen=True)
class Bound:
    """Upper bounds on ``-log p(x)``, nats.

    Attributes:
        bound: ``(B,)``.
        stderr: ``(B,)``, over the draws; NaN for a single one.
        values: ``(B, draws)``.
        nfe: evaluations per sample.
    """

    bound: Tensor
    stderr: Tensor
    values: Tensor
    nfe: int


def likelihood_bound(
    score_fn: ScoreFn,
    sde: SDE,
    x: Tensor,
    *,
    draws: int = 64,
    seed: int = 0,
    sample_ids: Sequence[int] | Tensor | None = None,
    chunk: int = 1024,
) -> Bound:
    """The likelihood-weighted score-matching bound for the law of the reverse SDE at ``t_min``.

    ``-log p(x) <= E[-log prior(x_T)] + 1/2 int E[g^2 (|s|^2 + 2 s . z / sigma') - 2 div f] dt``
    over the forward SDE from ``x`` at ``t_min``, with the kernel's noise z and deviation sigma'
    (Song, Durkan, Murray & Ermon 2021, arXiv:2101.09258, theorem 3 with its constant worked out
    for ``x`` as the start). As ``g^2 dt = 2 sigma^2 |d lambda|``, the integral is that of ``|eps|^2
    - 2 (sigma / sigma') eps . z`` over lambda = half_log_snr, whose draws are stratified; z comes
    with its opposite, so that the variance stays finite where sigma' vanishes, and with the |z|^2
    that a unit Gaussian's score would give, less its mean, as control variate. With the exact score
    the bound is the value itself but for the prior. It bounds the law of the reverse SDE, not that
    of the ODE: with an inexact score these are two laws.

    Args:
        x: ``(B, *event)``, data at ``t_min``.
        draws: of (time, noise) per sample, by ``seed`` and ``sample_ids``; two evaluations each.
        chunk: states evaluated at a time.
    """
    require_count("draws", draws)
    require_count("chunk", chunk)
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 1:
        raise TypeError(f"x must be a floating tensor of shape (B, *event), got {x!r:.80}")
    noise = CounterNoise(seed, sample_numbers(sample_ids, len(x)))
    together = max(1, chunk // (2 * max(1, len(x))))
    values = torch.cat(
        [
            _values(score_fn, sde, x, noise, part, draws, chunk)
            for part in torch.arange(draws).split(together)
        ],
        1,
    )
    stderr = torch.full_like(values[:, 0], math.nan)
    if draws > 1:
        # Draws are stratified in time: their noise is what neighbours differ by.
        pairs = values[:, : draws - draws % 2].reshape(len(values), -1, 2)
        stderr = ((pairs[..., 0] - pairs[..., 1]) ** 2).mean(1).div(2 * draws).sqrt()
    return Bound(values.mean(1), stderr, values, 2 * draws)


def _values(
    score_fn: ScoreFn,
    sde: SDE,
    x: Tensor,
    noise: CounterNoise,
    which: Tensor,
    draws: int,
    chunk: int,
) -> Tensor:
    """The bound by each of some draws, ``(B, len(which))`` float64."""
    first, last = (sde.at(float(t)).map(lambda f: f.to(x.device)) for t in (sde.t_min, sde.t_max))
    wide, count = x.double(), len(which)
    places = which.to(x.device)[:, None].expand(count, len(x))
    uniform = torch.special.ndtr(noise.normal_at(wide.new_empty(len(x)), places, _TIMES))
    place = ((places + uniform) / draws).flatten()
    low, high = last.half_log_snr, first.half_log_snr
    level = sde.at(sde.time(torch.lerp(high, low, place)))
    z = noise.normal_at(wide, places, _NOISE).flatten(0, 1)
    ratio = level.alpha / first.alpha
    # sigma'^2 = sigma^2 - ratio^2 sigma_0^2, in the form that does not cancel near t_min.
    share = torch.sqrt(-torch.expm1(2 * (level.half_log_snr - high)))
    spread = level.sigma * share
    indices = torch.arange(len(x), device=x.device).repeat(count)
    start = expand(ratio, z) * wide[indices]
    total = torch.zeros(len(z), dtype=torch.float64, device=x.device)
    for sign in (1.0, -1.0):
        state = (start + sign * expand(spread, z) * z).to(x.dtype)
        eps = _evaluated(score_fn, state, level, indices, chunk).double()
        total += 0.5 * per_sample_sum(eps**2)
        total -= per_sample_sum(eps * z) * sign / share
    size = math.prod(x.shape[1:])
    part = level.sigma**2 / (level.alpha**2 + level.sigma**2)
    total += part * (2 - part) * (per_sample_sum(z**2) - size)
    shrunk = last.alpha / first.alpha
    deviation = last.sigma * torch.sqrt(-torch.expm1(2 * (low - high)))
    end = -sde.prior_log_prob(shrunk * wide)
    # E[-log prior] of a Gaussian of that deviation around it, exactly.
    end = end + 0.5 * size * (deviation / sde.prior_std().to(deviation)) ** 2
    end = end - size * torch.log(shrunk)
    return ((high - low) * total.reshape(count, len(x)) + end).mT.contiguous()


def _evaluated(
    score_fn: ScoreFn, x: Tensor, level: NoiseLevel, indices: Tensor, chunk: int
) -> Tensor:
    """``eps`` at states of the samples ``indices``, some at a time."""
    parts = []
    with torch.no_grad():
        for rows in torch.arange(len(x), device=x.device).split(chunk):
            own = level.map(lambda field, rows=rows: field[rows])  # type: ignore[misc]
            parts.append(select(score_fn, indices[rows])(x[rows], own).eps)
    return torch.cat(parts)
