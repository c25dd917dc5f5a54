"""Samplers against the textbook updates of DDPM, DDIM, SMLD, score_sde and EDM, on their own
tables.

The textbook side is written on the discrete tables alone (betas, their products, sigmas), in
float64, with the same noise. The noise estimate is not linear and differs from level to level, so
that an evaluation at the wrong state or level shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from sde_diffusion import EDMSDE, VESDE, NoiseLevel, Prediction, TabulatedVPSDE
from solvers import (
    DDIM,
    Ancestral,
    ProbabilityFlow,
    RecordedNoise,
    ReverseDiffusion,
    Solver,
    sample,
)

BATCH = (5, 3)


def eps_at(x: Tensor, sigma: float | Tensor) -> Tensor:
    """A noise estimate that is not linear, and whose slope of at most ``1.2 / (1 + sigma)`` lets
    no step stretch rounding by much."""
    sigma = float(sigma)
    y = x / (1 + sigma)
    return torch.tanh(0.8 * y + 0.1) + 0.2 * torch.sin(2 * y + math.log(sigma))


def score_fn(x: Tensor, level: NoiseLevel) -> Prediction:
    return Prediction.from_eps(x, level, eps_at(x, level.sigma))


def draws(steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return list(torch.randn(steps, *BATCH, generator=generator, dtype=torch.float64))


def start() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, generator=generator, dtype=torch.float64)


def assert_equal_to_rounding(found: Tensor, expected: Tensor, steps: int) -> None:
    """Four roundings of 1e-16 a step, and twenty for the schedule, of the state's size: the
    textbook's own form differs from itself by as much when its terms are summed in another order.
    A quarter of 1e-12 at 1000 steps; a wrong index or factor changes the result by 1e-4 or more.
    """
    scale = expected.abs().max().clamp_min(1)
    assert (found - expected).abs().max() < 4e-16 * (steps + 20) * scale


class Table:
    """A DDPM chain by its own symbols; index i counts from 0 as in the code of Ho et al."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.betas = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64)
        self.alphas = 1 - self.betas
        self.products = self.alphas.cumprod(0)

    @property
    def sde(self) -> TabulatedVPSDE:
        return TabulatedVPSDE.from_betas(self.betas)

    def eps(self, x: Tensor, i: int) -> Tensor:
        return eps_at(x, torch.sqrt(1 - self.products[i]))

    def previous_product(self, i: int) -> Tensor:
        return self.products[i - 1] if i else torch.ones((), dtype=torch.float64)


def ddpm(table: Table, x: Tensor, noise: list[Tensor], variance: str) -> Tensor:
    """Ho et al. 2020, algorithm 2: down to i = 0, where no noise is added."""
    for k, i in enumerate(reversed(range(table.steps))):
        beta, alpha, product = table.betas[i], table.alphas[i], table.products[i]
        mean = (x - beta / torch.sqrt(1 - product) * table.eps(x, i)) / torch.sqrt(alpha)
        small = (1 - table.previous_product(i)) / (1 - product) * beta
        x = mean
        if i > 0:
            x = mean + torch.sqrt(small if variance == "small" else beta) * noise[k]
    return x


@pytest.mark.parametrize("steps", [50, 1000])
@pytest.mark.parametrize("variance", ["small", "large"])
def test_ancestral_is_ddpm(variance: str, steps: int) -> None:
    table, noise = Table(steps), draws(steps - 1)
    solution = sample(
        score_fn,
        table.sde,
        Ancestral(variance=variance),  # type: ignore[arg-type]
        x=start(),
        steps=steps - 1,
        noise=RecordedNoise(noise),
        denoise=True,
    )
    assert_equal_to_rounding(solution.x, ddpm(table, start(), noise, variance), steps)
    assert solution.nfe == steps


@pytest.mark.parametrize("steps,thinned", [(50, 7), (1000, 20), (1000, 50)])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_is_the_papers_on_a_thinned_table(eta: float, steps: int, thinned: int) -> None:
    """Song, Meng & Ermon 2021, eq. 12 and 16, on a subsequence tau of the table."""
    table, noise = Table(steps), draws(thinned)
    solution = sample(
        score_fn, table.sde, DDIM(eta), x=start(), steps=thinned, noise=RecordedNoise(noise)
    )
    tau = [round(steps * float(t)) - 1 for t in solution.times]
    assert tau[0] == steps - 1
    assert tau[-1] == 0
    x = start()
    for k in range(thinned):
        now, then = table.products[tau[k]], table.products[tau[k + 1]]
        sigma = eta * torch.sqrt((1 - then) / (1 - now)) * torch.sqrt(1 - now / then)
        eps = table.eps(x, tau[k])
        x0 = (x - torch.sqrt(1 - now) * eps) / torch.sqrt(now)
        x = torch.sqrt(then) * x0 + torch.sqrt(1 - then - sigma**2) * eps + sigma * noise[k]
    assert_equal_to_rounding(solution.x, x, thinned)


@pytest.mark.parametrize("steps", [50, 1000])
def test_reverse_diffusion_is_score_sdes_vp_predictor(steps: int) -> None:
    """Song et al. 2021, algorithm 3: ``(2 - sqrt(1 - beta)) x + beta s + sqrt(beta) z``."""
    table, noise = Table(steps), draws(steps - 1)
    solution = sample(
        score_fn,
        table.sde,
        ReverseDiffusion(),
        x=start(),
        steps=steps - 1,
        noise=RecordedNoise(noise),
    )
    x = start()
    for k, i in enumerate(reversed(range(1, steps))):
        beta = table.betas[i]
        score = -table.eps(x, i) / torch.sqrt(1 - table.products[i])
        x = (2 - torch.sqrt(1 - beta)) * x + beta * score + torch.sqrt(beta) * noise[k]
    assert_equal_to_rounding(solution.x, x, steps)


def smld_predictor(x: Tensor, sigma: Tensor, below: Tensor, eps: Tensor, z: Tensor) -> Tensor:
    """Song et al. 2021, algorithm 2."""
    variance = sigma**2 - below**2
    return x + variance * (-eps / sigma) + torch.sqrt(variance) * z


def smld_ancestral(x: Tensor, sigma: Tensor, below: Tensor, eps: Tensor, z: Tensor) -> Tensor:
    """Song et al. 2021, eq. 47."""
    variance = sigma**2 - below**2
    spread = torch.sqrt(below**2 * variance / sigma**2)
    return x + variance * (-eps / sigma) + spread * z


@pytest.mark.parametrize(
    "solver,update",
    [(ReverseDiffusion(), smld_predictor), (Ancestral(), smld_ancestral)],
)
def test_smld_on_a_geometric_ladder(solver: Solver, update: Callable[..., Tensor]) -> None:
    """sigma_i = sigma_max (sigma_min / sigma_max)^(i / (N - 1)), and t uniform on [0, 1]."""
    levels = 60
    sigmas = 50.0 * (0.01 / 50.0) ** torch.linspace(0, 1, levels, dtype=torch.float64)
    # t_min stands for 0, which is no time of an SDE here; the last sigma is that at t_min.
    sde = VESDE(sigma_min=0.01, sigma_max=50.0, t_min=1e-15)
    noise = draws(levels - 1)
    x = 50.0 * start()
    solution = sample(score_fn, sde, solver, x=x, steps=levels - 1, noise=RecordedNoise(noise))
    for k in range(levels - 1):
        eps = eps_at(x, sigmas[k])
        x = update(x, sigmas[k], sigmas[k + 1], eps, noise[k])
    # Rounding of states near 200, 3e-14 in each of some ten operations in 59 steps.
    assert (solution.x - x).abs().max() < 1e-11


@pytest.mark.parametrize("steps", [2, 18, 40])
def test_heun_is_edms(steps: int) -> None:
    """Karras et al. 2022, algorithm 1 without churn, its last Euler step to 0 being our denoise."""
    sde = EDMSDE()
    low, high = 0.002 ** (1 / 7), 80.0 ** (1 / 7)
    ramp = torch.arange(steps + 1, dtype=torch.float64) / steps
    times = [*(high + ramp * (low - high)) ** 7, torch.zeros((), dtype=torch.float64)]

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return x - sigma * eps_at(x, sigma)

    x = 80.0 * start()
    solution = sample(score_fn, sde, ProbabilityFlow("heun"), x=x, steps=steps, denoise=True)
    for t, t_next in pairwise(times):
        slope = (x - denoiser(x, t)) / t
        x_next = x + (t_next - t) * slope
        if t_next > 0:
            slope_next = (x_next - denoiser(x_next, t_next)) / t_next
            x_next = x + (t_next - t) * (0.5 * slope + 0.5 * slope_next)
        x = x_next
    # Rounding of states near 200: 3e-14 each, over at most 41 steps that contract none of it.
    assert (solution.x - x).abs().max() < 1e-11
    assert solution.nfe == 2 * steps + 1
