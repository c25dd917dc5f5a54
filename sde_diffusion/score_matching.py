"""Explicit and sliced score matching, for small models and as a check of the denoising losses.

Both are ``E[tr(grad s) + ||s||^2 / 2]``, which differs from the unknowable ``E ||s - grad log p||^2
/ 2`` by a constant of the data alone (Hyvärinen 2005). For data noised by sigma, denoising score
matching ``E ||s + eps / sigma||^2 / 2`` differs from it by the constant ``D / (2 sigma^2)``
(Vincent 2011).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sde_diffusion.broadcast import per_sample_sum
from sde_diffusion.errors import require_count
from sde_diffusion.losses import perturbed
from sde_diffusion.parametrization import ParametrizedModel
from sde_diffusion.sde import NoiseLevel

__all__ = ["explicit_loss", "explicit_score_matching", "sliced_score_matching"]

Score = Callable[[Tensor], Tensor]


def explicit_score_matching(score: Score, x: Tensor) -> Tensor:
    """``tr(grad s(x)) + ||s(x)||^2 / 2`` per sample, (B,), with the exact trace.

    One backward pass for each of the D numbers of an event: for small events.

    Args:
        score: (B, *event) -> (B, *event), each sample's from its own state alone; its gradients
            with respect to parameters are kept. ``lambda x: score_fn(x, level).score`` for a model.
        x: (B, *event).

    Raises:
        ValueError: the score is not of x's shape.
    """
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = _checked(score(x), x)
        loss = 0.5 * per_sample_sum(value**2)
        if value.requires_grad:
            columns, size = value.reshape(len(x), -1), x[0].numel()
            for k in range(size):
                # One backward pass an entry: batched ones fail on group norms (PyTorch 2.13).
                (row,) = torch.autograd.grad(
                    columns[:, k].sum(),
                    x,
                    create_graph=differentiable,
                    retain_graph=differentiable or k < size - 1,
                )
                loss = loss + row.reshape(len(x), -1)[:, k]
    return loss if differentiable else loss.detach()


def explicit_loss(
    model: ParametrizedModel,
    x0: Tensor,
    label: Tensor | None,
    level: NoiseLevel,
    noise: Tensor,
) -> Tensor:
    """``sigma^2 (tr(grad s) + ||s||^2 / 2) / D`` at x_t, (B,): a training loss for small models.

    In expectation it is half the simple loss less the constant 1/2, without a regression on the
    noise; the noise only makes x_t.
    """
    x = perturbed(x0, level, noise)
    loss = explicit_score_matching(lambda state: model(state, level, label).score, x)
    return (level.sigma**2).to(loss.dtype) * loss / x0[0].numel()


def sliced_score_matching(
    score: Score,
    x: Tensor,
    generator: torch.Generator,
    projections: int = 1,
    *,
    variance_reduced: bool = True,
) -> Tensor:
    """``v^T grad s(x) v + ||s(x)||^2 / 2`` per sample, (B,), averaged over projections v.

    Song et al. 2019, arXiv:1905.07088, eq. 8: an unbiased estimate of `explicit_score_matching`
    for two backward passes a projection. Entries of v are -1 or 1 with equal probability, so the
    trace of a diagonal Jacobian is exact.

    Args:
        score: as in `explicit_score_matching`.
        x: (B, *event).
        generator: of the projections.
        projections: number of v for each sample.
        variance_reduced: False: ``(v^T s)^2 / 2`` in place of ``||s||^2 / 2`` (their eq. 7).

    Raises:
        ValueError: projections below 1, or a score that is not of x's shape.
    """
    require_count("projections", projections)
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = _checked(score(x), x)
        total = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        for k in range(projections):
            signs = torch.randint(2, x.shape, generator=generator, device=generator.device)
            v = (2 * signs - 1).to(x)
            along = per_sample_sum(v * value)
            if value.requires_grad:
                last = k == projections - 1 and not differentiable
                (pulled,) = torch.autograd.grad(
                    along.sum(), x, create_graph=differentiable, retain_graph=not last
                )
                total = total + per_sample_sum(v * pulled)
            if not variance_reduced:
                total = total + 0.5 * along**2
        loss = total / projections
        if variance_reduced:
            loss = loss + 0.5 * per_sample_sum(value**2)
    return loss if differentiable else loss.detach()


def _checked(value: Tensor, x: Tensor) -> Tensor:
    if value.shape != x.shape:
        raise ValueError(f"score must return x's shape {tuple(x.shape)}, got {tuple(value.shape)}")
    return value
