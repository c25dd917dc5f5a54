"""EDM's churned Heun: deterministic limit, orders, the churned level, exact law, errors."""

from __future__ import annotations

import math

import pytest
import torch

from solvers import ProbabilityFlow, RecordedNoise, grids, sample
from solvers.base import make_steps
from solvers.methods.edm_heun import EDMHeun
from tests.problems import (
    SDES,
    GaussianProblem,
    IsotropicScore,
    affine_run,
    fitted_order,
    uniform_grid,
    warped_grid,
)


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_without_churn_it_is_heun_and_draws_nothing(name: str, steps: int) -> None:
    sde = SDES[name]
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = x * sde.prior_std()
    silent = RecordedNoise({})  # raises when asked
    end = sample(IsotropicScore(), sde, EDMHeun(), x=x, steps=steps, noise=silent)
    heun = sample(IsotropicScore(), sde, ProbabilityFlow("heun"), x=x, steps=steps)
    torch.testing.assert_close(end.x, heun.x, rtol=1e-12, atol=1e-12)
    assert end.nfe == 2 * steps
    assert not EDMHeun().stochastic


@pytest.mark.parametrize("name", ["vp", "ve", "subvp"])
@pytest.mark.parametrize("grid", ["time", "log_snr", "warped"])
def test_weak_order_and_limit(name: str, grid: str) -> None:
    """From the exact marginal every step keeps the law but for Heun's error: order 2, to the
    data's law, by exact moments."""
    sde = SDES[name]
    problem = GaussianProblem(sde)
    make = {"time": grids.time, "log_snr": uniform_grid, "warped": warped_grid}[grid]
    start, exact = (problem.marginal(float(t)) for t in (sde.t_max, sde.t_min))
    steps = (64, 128, 256)
    errors = [
        affine_run(problem.score_fn, sde, EDMHeun(10.0), make(sde, n), 2)
        .moments(start)
        .distance(exact)
        for n in steps
    ]
    assert fitted_order(steps, errors) > 1.75
    assert errors[-1] < 4e-3


def test_one_step_is_the_papers_algorithm() -> None:
    """Karras et al. 2022, alg. 2, written out on EDM's own SDE, where x = y and sigma = s = t."""
    sde = SDES["edm"]
    times = [80.0, 20.0, 3.0, 0.5]
    generator = torch.Generator().manual_seed(4)
    x = 80 * torch.randn(5, 2, generator=generator, dtype=torch.float64)
    draws = [torch.randn(5, 2, generator=generator, dtype=torch.float64) for _ in range(3)]
    score_fn = IsotropicScore()
    solver = EDMHeun(s_churn=0.9, s_tmin=2.0, s_tmax=40.0, s_noise=1.003)
    end = sample(score_fn, sde, solver, x=x, grid=times, noise=RecordedNoise(draws)).x
    for t, u, z in zip(times[:-1], times[1:], draws, strict=True):
        gamma = min(0.9 / 3, math.sqrt(2) - 1) if 2.0 <= t <= 40.0 else 0.0
        raised = t * (1 + gamma)
        x = x + math.sqrt(raised**2 - t**2) * 1.003 * z
        slope = (x - score_fn(x, sde.at(raised)).x0) / raised
        euler = x + (u - raised) * slope
        x = x + (u - raised) * 0.5 * (slope + (euler - score_fn(euler, sde.at(u)).x0) / u)
    torch.testing.assert_close(end, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SDES)
def test_the_churned_level(name: str) -> None:
    """gamma has its bound sqrt(2) - 1, counts the run's steps, and never passes t_max."""
    sde = SDES[name]
    x = torch.zeros(1, 1, dtype=torch.float64)
    for churn in (3.0, 1e6):
        steps = make_steps(sde, EDMHeun(churn), uniform_grid(sde, 12), x)
        for step in steps:
            gamma = min(churn / 12, math.sqrt(2) - 1)
            (level,) = step.stages
            top = float(sde.at(float(sde.t_max)).sigma_over_alpha)
            wanted = min((1 + gamma) * float(step.start.sigma_over_alpha), top)
            assert float(level.sigma_over_alpha) == pytest.approx(wanted, rel=1e-9)
            assert float(level.t) <= float(sde.t_max) * (1 + 1e-12)
        assert torch.equal(steps[0].stages[0].t, steps[0].start.t)
    steps = make_steps(sde, EDMHeun(3.0, s_tmin=0.1, s_tmax=1.0), uniform_grid(sde, 12), x)
    for step in steps:
        inside = 0.1 <= float(step.start.sigma_over_alpha) <= 1.0
        assert (float(step.stages[0].t) > float(step.start.t)) == inside


@pytest.mark.parametrize("name", SDES)
def test_few_steps_and_split(name: str) -> None:
    sde, solver = SDES[name], EDMHeun(40.0)
    for steps in (1, 2, 9):
        whole = sample(IsotropicScore(), sde, solver, shape=(5, 1, 2, 3), steps=steps)
        assert whole.nfe == 2 * steps
        assert whole.x.dtype == torch.float32
        assert whole.x.isfinite().all()
        part = sample(
            IsotropicScore(), sde, solver, shape=(2, 1, 2, 3), sample_ids=[3, 4], steps=steps
        )
        assert torch.equal(whole.x[3:], part.x)


def test_settings() -> None:
    for setting in ({"s_churn": -1.0}, {"s_tmin": -0.1}, {"s_noise": -1.0}, {"s_churn": math.nan}):
        with pytest.raises(ValueError, match=next(iter(setting))):
            EDMHeun(**setting)
    with pytest.raises(ValueError, match="s_tmax must be at least s_tmin"):
        EDMHeun(s_tmin=2.0, s_tmax=1.0)
