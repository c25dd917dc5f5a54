"""Samplers as a user would write them, in the manner of k-diffusion, and some that misbehave."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch
from torch import Tensor

from sde_diffusion.sde import SDE
from solvers import Step


def euler(model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None) -> Tensor:
    """Euler's method on the flow."""
    ones = x.new_ones(len(x))
    for sigma, after in itertools.pairwise(sigmas):
        slope = (x - model(x, sigma * ones, **(extra_args or {}))) / sigma
        x = x + slope * (after - sigma)
    return x


def heun(model: Any, x: Tensor, sigmas: Tensor, **kwargs: Any) -> Tensor:
    for sigma, after in itertools.pairwise(sigmas):
        slope = (x - model(x, sigma)) / sigma
        euler = x + slope * (after - sigma)
        x = x + 0.5 * (slope + (euler - model(euler, after)) / after) * (after - sigma)
    return x


heun.order = 2  # type: ignore[attr-defined]


def dpmpp_2m(model: Any, x: Tensor, sigmas: Tensor, weight: str = "published") -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2), with the clock -log sigma.

    The slope of x0 in the clock, by the last difference, is weighed by ``integral``, ``int_0^h
    e^(l - h) l dl``, or by what the algorithm as published puts for it, ``h/2 (1 - e^(-h))``.
    """
    before: Any = None
    for sigma, after in itertools.pairwise(sigmas):
        denoised, h = model(x, sigma), (sigma / after).log()
        x = after / sigma * x - torch.expm1(-h) * denoised
        if before is not None and after > 0:
            last_denoised, last_h = before
            moment = h + torch.expm1(-h) if weight == "integral" else -0.5 * h * torch.expm1(-h)
            x = x + moment * (denoised - last_denoised) / last_h
        before = denoised, h
    return x


dpmpp_2m.order = 2  # type: ignore[attr-defined]


def _ancestral(model: Any, x: Tensor, sigmas: Tensor, eta: float, noise: Any) -> Tensor:
    for sigma, after in itertools.pairwise(sigmas):
        up = eta * after * (1 - (after / sigma) ** 2).clamp_min(0).sqrt()
        down = (after**2 - up**2).sqrt()
        denoised = model(x, sigma)
        x = denoised + (x - denoised) * down / sigma + up * noise(sigma, after)
    return x


def ancestral(
    model: Any, x: Tensor, sigmas: Tensor, eta: float = 1, noise_sampler: Any = None
) -> Tensor:
    return _ancestral(model, x, sigmas, eta, noise_sampler)


def with_randn_like(model: Any, x: Tensor, sigmas: Tensor, eta: float = 1.0) -> Tensor:
    return _ancestral(model, x, sigmas, eta, lambda *_: torch.randn_like(x))


def with_generator(model: Any, x: Tensor, sigmas: Tensor, eta: float = 1.0) -> Tensor:
    return _ancestral(model, x, sigmas, eta, lambda *_: torch.empty_like(x).normal_())


def own_terms(
    score_fn: Any, sde: SDE, x: Tensor, times: Tensor, noise: Any, stir: bool = False
) -> Tensor:
    """DDIM in this package's own terms."""
    levels = [sde.at(t) for t in times]
    for index, (start, end) in enumerate(itertools.pairwise(levels)):
        found = score_fn(x, start)
        eps = noise(x, Step(index, start, end)) if stir else found.eps
        x = end.alpha * found.x0 + end.sigma * eps
    return x


def raises(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    raise KeyError("no such thing")


def gives_nan(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    return euler(model, x, sigmas) * torch.nan


def hangs(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    while True:
        time.sleep(0.01)


def gives_another_shape(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    return euler(model, x, sigmas)[:, :1]


def images_only(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return euler(model, x, sigmas).reshape(b, c, h, w)


def of_another_form(model: Any, x: Tensor) -> Tensor:
    return x


number = 3


def asks_around(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    """Each sample at a level of its own, then all beyond both ends."""
    each = torch.linspace(0.5, 2.0, len(x), dtype=x.dtype)
    together = model(x, each)
    apart = torch.stack([model(x, sigma)[i] for i, sigma in enumerate(each)])
    torch.testing.assert_close(together, apart)
    top, bottom = sigmas[0], sigmas[-1]
    assert torch.equal(model(x, 2 * top), model(x, top))
    assert torch.equal(model(x, 0.0), model(x, bottom))
    return x


def asks_nowhere(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    return model(x, float("nan"))  # type: ignore[no-any-return]
