"""Denoising score matching in the model's own form, its weightings, and samplers of times.

A loss is a function ``(model, x0, label, level, noise) -> (B,)``: one value per sample, so that a
caller may average, bucket or reweight them. Times are drawn by ``(n, sde, generator) -> (n,)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sde_diffusion.broadcast import expand
from sde_diffusion.parametrization import EDMModel, ParametrizedModel
from sde_diffusion.sde import SDE, NoiseLevel

__all__ = [
    "Loss",
    "TimeSampler",
    "Weighting",
    "classifier_loss",
    "denoising_loss",
    "drop_labels",
    "edm_loss",
    "likelihood_weighting",
    "log_normal_times",
    "mean_square",
    "perturbed",
    "simple_loss",
    "stratified",
    "uniform_log_snr_times",
    "uniform_times",
]

Loss = Callable[[ParametrizedModel, Tensor, Tensor | None, NoiseLevel, Tensor], Tensor]
TimeSampler = Callable[[int, SDE, torch.Generator], Tensor]
Weighting = Callable[[NoiseLevel], Tensor]


def perturbed(x0: Tensor, level: NoiseLevel, noise: Tensor) -> Tensor:
    """``x_t = alpha x_0 + sigma noise`` at a level that is already known; shapes (B, *event)."""
    return expand(level.alpha, x0) * x0 + expand(level.sigma, x0) * noise


def mean_square(error: Tensor) -> Tensor:
    """Mean over the event of the squared error: ``(B, *event) -> (B,)``."""
    return error.square() if error.ndim == 1 else error.flatten(1).square().mean(1)


def denoising_loss(
    model: ParametrizedModel,
    x0: Tensor,
    label: Tensor | None,
    level: NoiseLevel,
    noise: Tensor,
    weighting: Weighting | None = None,
) -> Tensor:
    """``w(t) ||eps_theta(x_t, t) - eps||^2 / D`` per sample: denoising score matching (Vincent
    2011).

    Args:
        model: called (x, level, label) -> Prediction.
        x0: clean samples (B, *event).
        label: (B,) class labels, the null label among them, or None.
        level: noise levels with fields (B,).
        noise: standard normal, the shape of x0.
        weighting: ``w(level)``, (B,); None is w = 1, the simple loss. A weight ``lambda(t)`` on the
            squared error of the score is ``w = lambda / sigma^2`` here.
    """
    prediction = model(perturbed(x0, level, noise), level, label)
    loss = mean_square(prediction.eps - noise)
    return loss if weighting is None else weighting(level).to(loss.dtype) * loss


def simple_loss(
    model: ParametrizedModel,
    x0: Tensor,
    label: Tensor | None,
    level: NoiseLevel,
    noise: Tensor,
) -> Tensor:
    """The simple loss ``||eps_theta - eps||^2 / D`` per sample, (B,) (Ho et al. 2020, eq. 14)."""
    return denoising_loss(model, x0, label, level, noise)


def likelihood_weighting(level: NoiseLevel) -> Tensor:
    """``g^2 / sigma^2`` on the squared error of eps, i.e. ``lambda = g^2`` on that of the score.

    Then the loss bounds the negative log-likelihood (Song et al. 2021, "Maximum likelihood training
    of score-based diffusion models", theorem 1).
    """
    return level.g2 / level.sigma**2


def edm_loss(
    model: ParametrizedModel,
    x0: Tensor,
    label: Tensor | None,
    level: NoiseLevel,
    noise: Tensor,
) -> Tensor:
    """``(s^2 + s_d^2) / (s s_d)^2 ||x0_theta - x_0||^2 / D`` per sample, (B,), with s = sigma /
    alpha.

    s_d is the model's sigma_data. The weight makes the loss of an untrained EDM-preconditioned
    network about 1 at every level (Karras et al. 2022, table 1).

    Raises:
        TypeError: the model is not EDM-preconditioned.
    """
    if not isinstance(model, EDMModel):
        raise TypeError(f"edm_loss needs an EDMModel, got {type(model).__name__}; use simple_loss")
    prediction = model(perturbed(x0, level, noise), level, label)
    ratio = level.sigma_over_alpha
    weight = (ratio**2 + model.sigma_data**2) / (ratio * model.sigma_data) ** 2
    loss = mean_square(prediction.x0 - x0)
    return weight.to(loss.dtype) * loss


def classifier_loss(
    classifier: nn.Module, x0: Tensor, label: Tensor, level: NoiseLevel, noise: Tensor
) -> Tensor:
    """Cross-entropy of ``p(y | x_t)`` on noised samples, (B,) (Song et al. 2021, appendix I)."""
    logits = classifier(perturbed(x0, level, noise), level)
    return nn.functional.cross_entropy(logits, label, reduction="none")


def drop_labels(
    label: Tensor, null_label: int, probability: float, generator: torch.Generator
) -> Tensor:
    """Replace each label by the null label with `probability` (Ho and Salimans 2022, alg. 1)."""
    drop = torch.rand(label.shape, generator=generator, device=generator.device) < probability
    return torch.where(drop.to(label.device), torch.full_like(label, null_label), label)


def stratified(n: int, generator: torch.Generator) -> Tensor:
    """n numbers in (0, 1), in order, each uniform over its own of n equal strata."""
    offset = torch.rand(n, generator=generator, device=generator.device, dtype=torch.float64)
    strata = torch.arange(n, device=generator.device, dtype=torch.float64)
    return (strata + offset) / n


def uniform_times(n: int, sde: SDE, generator: torch.Generator) -> Tensor:
    """n times uniform on [t_min, t_max], (n,) float32, one in each of n equal parts of it.

    The strata lower the variance of a batch's mean loss; they are in order, so pair them with
    samples that are not.
    """
    return (sde.t_min + (sde.t_max - sde.t_min) * stratified(n, generator)).float()


def uniform_log_snr_times(n: int, sde: SDE, generator: torch.Generator) -> Tensor:
    """n times at which half_log_snr is uniform over the SDE's range, (n,) float32, stratified.

    On VE this is `uniform_times`; on EDM, where t is sigma itself, uniform times would nearly all
    be noise.
    """
    top, bottom = sde.at(sde.t_min).half_log_snr, sde.at(sde.t_max).half_log_snr
    levels = top + (bottom - top) * stratified(n, generator)
    return sde.time(levels).clamp(sde.t_min, sde.t_max).float()


def log_normal_times(
    n: int,
    sde: SDE,
    generator: torch.Generator,
    *,
    mean: float = -1.2,
    std: float = 1.2,
) -> Tensor:
    """Times at which ``log(sigma / alpha) ~ N(mean, std^2)``, (n,) float32, kept in [t_min, t_max].

    The proposal of Karras et al. 2022, table 1, stratified like `uniform_times`.
    """
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise ValueError(
            f"log_normal_times needs finite mean and std > 0, got mean={mean}, std={std}"
        )
    log_ratio = mean + std * torch.special.ndtri(stratified(n, generator).clamp(1e-9, 1 - 1e-9))
    return sde.time(-log_ratio).clamp(sde.t_min, sde.t_max).float()
