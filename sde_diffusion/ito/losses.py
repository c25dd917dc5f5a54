"""Score matching for general SDEs: closed-form transitions, or simulated ones.

A loss gives one value per sample, ``(B,)``. A ``metric`` says how large an error of the score is:
``(x, t, error) -> (B,)``, by default its squared length; ``diffusion_metric(sde)`` is ``|G^T
error|^2``, under which the loss bounds the negative log-likelihood as g^2 weighting does for a
linear SDE (Song et al. 2021, arXiv:2101.09258, theorem 1), and which asks nothing where G is 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sde_diffusion.broadcast import expand, per_sample_sum
from sde_diffusion.ito.fields import Normals, Score, transposed
from sde_diffusion.ito.langevin import HybridTransition
from sde_diffusion.ito.laws import Transition
from sde_diffusion.ito.sde import ItoSDE
from sde_diffusion.ito.simulation import simulated
from sde_diffusion.score_matching import sliced_score_matching

__all__ = [
    "denoising_score_matching",
    "diffusion_metric",
    "hybrid_score_matching",
    "simulated_score_matching",
]

Metric = Callable[[Tensor, Tensor, Tensor], Tensor]


def squared_length(x: Tensor, t: Tensor, error: Tensor) -> Tensor:
    """``|error|^2`` per sample."""
    return per_sample_sum(error.square())


def diffusion_metric(sde: ItoSDE) -> Metric:
    """``|G^T error|^2`` per sample."""

    def metric(x: Tensor, t: Tensor, error: Tensor) -> Tensor:
        return per_sample_sum(transposed(sde.kind, sde.diffusion(x, t), error).square())

    return metric


def denoising_score_matching(
    score: Score,
    transition: Transition,
    x0: Tensor,
    t: Tensor,
    normal: Normals,
    metric: Metric = squared_length,
) -> Tensor:
    """``|s(x_t, t) - grad log p(x_t | x_0)|^2`` per sample (Vincent 2011), ``(B,)``.

    Args:
        score: ``(x, t) -> `` of x's shape.
        transition: closed form, or ``DensityTransition``, whose score is by autograd.
        x0: data, as the transition takes it.
        t: ``(B,)``.
        normal: standard normals of ``x_t``'s shape by slot: ``normals_from(generator, like)``.
    """
    with torch.no_grad():
        x = transition.sample(x0, t, normal).to(x0.dtype)
        target = transition.score(x, x0, t)
    return metric(x, t, score(x, t) - target)


def hybrid_score_matching(
    velocity_score: Score, transition: HybridTransition, x0: Tensor, t: Tensor, normal: Normals
) -> Tensor:
    """``|eps_v + s_v / ell|^2`` per sample: hybrid score matching of critically damped Langevin
    diffusion, in the form whose target has unit variance (Dockhorn et al. 2022, eq. 8).

    Args:
        velocity_score: ``(state, t) -> (B, *event)``, the score of the velocity alone.
        transition: ``langevin.hybrid()``.
        x0: positions ``(B, *event)``.
        normal: standard normals of a state's shape, ``(B, 2, *event)``.
    """
    with torch.no_grad():
        state = transition.sample(x0, t, normal).to(x0.dtype)
        target = transition.score(state, x0, t)[:, 1]
    error = velocity_score(state, t) - target
    scale = expand(transition.velocity_scale(t).to(error.dtype), error)
    return per_sample_sum((scale * error).square())


def simulated_score_matching(
    score: Score,
    sde: ItoSDE,
    x0: Tensor,
    t: Tensor,
    generator: torch.Generator,
    steps: int = 100,
    projections: int = 1,
) -> Tensor:
    """Score matching without a transition, ``(B,)``: x_t is simulated, and sliced score matching
    needs nothing but samples (Song et al. 2019, arXiv:1905.07088, eq. 8).

    Args:
        x0: data ``(B, *event)``.
        t: ``(B,)``.
        steps: of Euler-Maruyama from 0 to t; the bias falls as 1/steps.
        projections: random directions per sample.
    """
    x, _ = simulated(sde, x0, t, steps, generator)
    return sliced_score_matching(lambda x: score(x, t), x, generator, projections)
