"""Likelihoods of data on discrete levels, and of classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sde_diffusion.errors import require_count, require_finite
from sde_diffusion.parametrization import Model, bind
from sde_diffusion.prediction import ScoreFn
from sde_diffusion.sde import SDE
from sde_diffusion.units import bits_per_dim, within_range
from solvers.likelihood import Likelihood, log_likelihood, sample_numbers
from solvers.noise import CounterNoise

_DRAWS = 1 << 20  # draws of one sample that ids keep apart
_UNIFORM = 3  # slot of the counter noise


@dataclass(frozen=True)
class Dequantised:
    """Likelihoods averaged over uniform noise in each level's bin. ``(B,)`` each, but as said.

    Attributes:
        bits_per_dim: an upper bound, in expectation, on the bits per dimension of the raw levels.
        log_prob: nats, the mean over the draws.
        stderr: of ``bits_per_dim``, over the draws (their probes are drawn anew, so it holds both);
            NaN for a single draw.
        values: ``(B, draws)``: ``log_prob`` of each draw, nats.
        draws: each draw's ``Likelihood``.
    """

    bits_per_dim: Tensor
    log_prob: Tensor
    stderr: Tensor
    values: Tensor
    draws: tuple[Likelihood, ...]


def dequantised_likelihood(
    score_fn: ScoreFn,
    sde: SDE,
    x: Tensor,
    *,
    width: float,
    draws: int = 1,
    seed: int = 0,
    sample_ids: Sequence[int] | Tensor | None = None,
    clip: bool = False,
    **options: Any,
) -> Dequantised:
    """Bits per dimension of data on discrete levels.

    Args:
        x: ``(B, *event)`` in the model's [-1, 1], at the centres of its bins.
        width: of a bin there, as ``sde_diffusion.units.bin_width`` gives it.
        draws: of uniform noise ``(U - 1/2) width``, by ``seed`` and ``sample_ids``.
        clip: bring what lies outside [-1, 1] to its ends, instead of refusing it.
        options: as for ``log_likelihood``.
    Raises:
        ValueError: data outside [-1, 1] without ``clip``, numbers out of range.
    """
    require_count("draws", draws, most=_DRAWS)
    require_finite("width", width, above=0.0)
    x = within_range(x, clip=clip)
    ids = sample_numbers(sample_ids, len(x))
    ids = torch.arange(len(x)) if ids is None else ids
    found = []
    for draw in range(draws):
        moved = dequantise(x, width, draw, seed=seed, sample_ids=ids)
        own = ids * _DRAWS + draw
        found.append(log_likelihood(score_fn, sde, moved, seed=seed, sample_ids=own, **options))
    values = torch.stack([each.log_prob for each in found], 1)
    mean = values.mean(1)
    size = math.prod(x.shape[1:])
    spread = values.std(1) / math.sqrt(draws) if draws > 1 else torch.full_like(mean, math.nan)
    return Dequantised(
        bits_per_dim(mean, x.shape[1:], width),
        mean,
        spread / (size * math.log(2)),
        values,
        tuple(found),
    )


def dequantise(
    x: Tensor, width: float, draw: int, *, seed: int, sample_ids: Tensor | None = None
) -> Tensor:
    """``x + (U - 1/2) width`` with the uniform noise of a draw, by ``seed`` and ``sample_ids``."""
    normal = CounterNoise(seed, sample_ids).normal(x.double(), draw, _UNIFORM)
    return x + ((torch.special.ndtr(normal) - 0.5) * width).to(x.dtype)


@dataclass(frozen=True)
class ClassPosterior:
    """What a class-conditional model says of the classes of data.

    Attributes:
        log_prob: ``(B, C)``: ``log p(x | y)``, nats.
        log_posterior: ``(B, C)``: ``log p(y | x)`` by Bayes' rule.
        label: ``(B,)``: the most probable class.
        nfe: evaluations per sample, over all classes.
    """

    log_prob: Tensor
    log_posterior: Tensor
    label: Tensor
    nfe: float


def class_posterior(
    model: Model,
    sde: SDE,
    x: Tensor,
    *,
    num_classes: int | None = None,
    weights: Sequence[float] | Tensor | None = None,
    **options: Any,
) -> ClassPosterior:
    """``p(y | x)`` of a class-conditional model by Bayes' rule: a generative classifier.

    Every class sees the same probes, whose errors then largely cancel between classes.

    Args:
        model: called ``(x, level, label)``; an exact target's ``target.model(sde)`` too.
        num_classes: C; the model's own by default.
        weights: ``(C,)`` prior probabilities of the classes, above 0; equal by default.
        options: as for ``log_likelihood``.
    Raises:
        ValueError: a model without classes, weights that do not fit.
    """
    count = getattr(model, "num_classes", None) if num_classes is None else num_classes
    if not count:
        raise ValueError(
            "num_classes is missing: the model does not say how many classes it has; give their "
            "number, or a class-conditional model"
        )
    count = require_count("num_classes", count)
    prior = torch.ones(count) if weights is None else torch.as_tensor(weights)
    prior = prior.double()
    if prior.shape != (count,) or not bool((prior.isfinite() & (prior > 0)).all()):
        raise ValueError(f"weights must be {count} positive numbers, got {prior.tolist()}")
    settings = {"diagnostics": False, **options}
    found = [
        log_likelihood(bind(model, label), sde, x, **settings) for label in range(count)
    ]  # fmt: skip
    log_prob = torch.stack([each.log_prob for each in found], 1)
    joint = log_prob + prior.log().to(log_prob)
    posterior = torch.log_softmax(joint, 1)
    return ClassPosterior(
        log_prob, posterior, posterior.argmax(1), float(sum(each.nfe for each in found))
    )
