"""Exponential and Adams multistep methods: orders, starts, limits, and what they cost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sde_diffusion import VPSDE, GaussianMixture, named_target
from sde_diffusion.prediction import ScoreFn
from solvers import (
    DDIM,
    DEIS,
    AdamsBashforth,
    Ancestral,
    CounterNoise,
    DPMSolverPP,
    Langevin,
    PredictorCorrector,
    ProbabilityFlow,
    Solver,
    Step,
    UniPC,
    sample,
)
from tests.problems import (
    SDES,
    GaussianProblem,
    affine_run,
    measured_order,
    uniform_grid,
    warped_grid,
)

# (solver, the order it must show, the steps at which the slope is fitted): higher orders on
# coarser grids, above the rounding of float64.
ODE_SOLVERS = [
    (DPMSolverPP(1), 1, (100, 200, 400)),
    (DPMSolverPP(2), 2, (100, 200, 400)),
    (DPMSolverPP(3), 3, (200, 400, 800)),
    (DEIS(1), 1, (100, 200, 400)),
    (DEIS(2), 2, (200, 400, 800)),
    (DEIS(3), 3, (200, 400, 800)),
    (DEIS(4), 4, (400, 800, 1600)),
    (AdamsBashforth(2), 2, (200, 400, 800)),
    (AdamsBashforth(3), 3, (400, 800, 1600)),
    (AdamsBashforth(4), 4, (400, 800, 1600)),
    (UniPC(1), 2, (200, 400, 800)),
    (UniPC(2, "bh1"), 3, (200, 400, 800)),
    (UniPC(2, "bh2"), 3, (200, 400, 800)),
    (UniPC(3), 3, (200, 400, 800)),
    (UniPC(4), 4, (200, 400, 800)),
]


@pytest.fixture(scope="module")
def ring() -> dict[str, tuple[ScoreFn, Tensor, Tensor]]:
    """Score, noises and finely solved ends (RK4 at 3,000 steps: error below 1e-11) on ring."""
    problems = {}
    for name in ("vp", "ve", "subvp"):
        sde = SDES[name]
        score_fn = named_target("ring").score_fn(sde)
        x = torch.randn(16, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        x = x * sde.prior_std()
        fine = sample(score_fn, sde, ProbabilityFlow("rk4"), x=x, steps=3000, grid="log_snr").x
        problems[name] = score_fn, x, fine
    return problems


@pytest.mark.parametrize("grid", [uniform_grid, warped_grid])
@pytest.mark.parametrize("name", ["vp", "ve", "subvp"])
@pytest.mark.parametrize("solver, order, steps", ODE_SOLVERS, ids=lambda v: str(v))
def test_order(ring, name, solver, order, steps, grid) -> None:  # type: ignore[no-untyped-def]
    score_fn, x, fine = ring[name]

    def error(n: int) -> float:
        end = sample(score_fn, SDES[name], solver, x=x, grid=grid(SDES[name], n)).x
        return float((end - fine).square().mean().sqrt())

    assert measured_order(error, steps) >= order - 0.25
    assert error(steps[-1]) < 1e-2  # and it is the right limit: 1e-2 at order 1, far less above


@pytest.mark.parametrize("solver, nfe", [(DPMSolverPP(3), 0), (DEIS(4), 1), (UniPC(4), 1)])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
def test_evaluations(solver: Solver, nfe: int, steps: int) -> None:
    """One a step; one more in a run of at least two steps at order 4."""
    sde = SDES["vp"]
    run = sample(named_target("ring").score_fn(sde), sde, solver, shape=(4, 2), steps=steps)
    assert run.nfe == steps + (nfe if steps > 1 else 0)
    assert bool(run.x.isfinite().all())


@pytest.mark.parametrize(
    "solver", [DPMSolverPP(1), DPMSolverPP(3), DEIS(1), DEIS(4), AdamsBashforth(4)]
)
def test_one_step_is_ddim(solver: Solver) -> None:
    sde = SDES["ve"]
    x = sample(named_target("ring").score_fn(sde), sde, solver, shape=(8, 2), steps=1)
    ddim = sample(named_target("ring").score_fn(sde), sde, DDIM(), shape=(8, 2), steps=1)
    # Rounding of float32 at states of size 50, times the cancellation down to size 1.
    assert torch.allclose(x.x, ddim.x, atol=1e-4)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_stochastic_order_one_is_ancestral(eta: float) -> None:
    """At eta = 1; below, both are exact for a constant x0 and differ in how they spend noise."""
    sde = SDES["vp"]
    score_fn = named_target("ring").score_fn(sde)
    settings = {"shape": (8, 2), "steps": 40, "seed": 3, "dtype": torch.float64}
    ours = sample(score_fn, sde, DPMSolverPP(1, eta), **settings).x
    ancestral = sample(score_fn, sde, Ancestral(eta), **settings).x
    assert torch.allclose(ours, ancestral, atol=1e-9) == (eta == 1.0)


@pytest.mark.parametrize("name", ["vp", "ve", "subvp", "cosine", "edm"])
@pytest.mark.parametrize("solver, order", [(DPMSolverPP(1, 1.0), 1), (DPMSolverPP(2, 1.0), 2)])
def test_weak_order(name: str, solver: Solver, order: int) -> None:
    """Exact covariance after a run on a Gaussian from its marginal, against the marginal at the
    end."""
    sde = SDES[name]
    problem = GaussianProblem(sde)
    exact = problem.marginal(sde.t_min)

    def error(n: int) -> float:
        run = affine_run(problem.score_fn, sde, solver, uniform_grid(sde, n), 2)
        return run.moments(problem.marginal(sde.t_max)).distance(exact)

    assert measured_order(error, (80, 160, 320)) >= order - 0.25


def test_third_stochastic_order_is_less_biased_than_the_second() -> None:
    """Its weak order is 2 as well, but the variance bias at 20 and 40 steps is a third or less."""
    sde = SDES["vp"]
    problem = GaussianProblem(sde)
    exact = problem.marginal(sde.t_min)
    for steps in (20, 40):
        second, third = (
            affine_run(problem.score_fn, sde, DPMSolverPP(k, 1.0), uniform_grid(sde, steps), 2)
            .moments(problem.marginal(sde.t_max))
            .distance(exact)
            for k in (2, 3)
        )
        assert third < 0.4 * second


@pytest.mark.parametrize("steps", [100, 1000])
@pytest.mark.parametrize(
    "solver", [DPMSolverPP(3), DEIS(3), DEIS(4), AdamsBashforth(4), UniPC(3), UniPC(4)]
)
def test_float32_costs_no_accuracy_at_many_steps(solver: Solver, steps: int) -> None:
    """Coefficients are float64 integrals: float32 stays within its rounding of float64.

    The bound is that many roundings of 6e-8 adding up at random at states of size 2, times 10. (A
    library whose coefficients are differences taken in float32 gets worse from 100 steps on.)
    """
    sde = SDES["vp"]
    score_fn = named_target("ring").score_fn(sde)
    single, double = (
        sample(score_fn, sde, solver, shape=(32, 2), steps=steps, grid="log_snr", dtype=dtype).x
        for dtype in (torch.float32, torch.float64)
    )
    median = (single - double).norm(dim=1).median()
    assert float(median) < 10 * 6e-8 * 2 * steps**0.5


def test_a_step_made_by_hand_is_of_order_one() -> None:
    sde = SDES["vp"]
    score_fn = named_target("ring").score_fn(sde)
    x = torch.ones(3, 2, dtype=torch.float64)
    step, noise = Step(0, sde.at(0.5), sde.at(0.4)), CounterNoise(0)
    expected = DDIM().step(score_fn, x, step, (), noise).x
    for solver in (DPMSolverPP(3), DEIS(3), AdamsBashforth(3), UniPC(3)):
        found = solver.step(score_fn, x, step, solver.init(x), noise).x
        assert torch.allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("make", [DPMSolverPP, DEIS, AdamsBashforth, UniPC])
@pytest.mark.parametrize("order", [0, 5, 1.5, True])
def test_orders_that_do_not_exist(make: type[Solver], order: object) -> None:
    with pytest.raises((ValueError, TypeError), match="order must be"):
        make(order)  # type: ignore[call-arg]


def test_other_settings() -> None:
    with pytest.raises(ValueError, match="eta must lie in"):
        DPMSolverPP(eta=1.5)
    with pytest.raises(ValueError, match=r"unknown variant 'bh3'.*bh2"):
        UniPC(variant="bh3")  # type: ignore[arg-type]


def test_split_invariance_of_the_whole_family() -> None:
    sde = SDES["vp"]
    score_fn = named_target("gmm16").score_fn(sde)
    for solver in (DPMSolverPP(3), DPMSolverPP(3, 1.0), DEIS(4), AdamsBashforth(4), UniPC(4)):
        whole = sample(score_fn, sde, solver, shape=(33, 16), steps=9, seed=4).x
        parts = [
            sample(
                score_fn, sde, solver, shape=(b - a, 16), steps=9, seed=4, sample_ids=range(a, b)
            )
            for a, b in ((0, 1), (1, 8), (8, 33))
        ]
        assert torch.equal(whole, torch.cat([part.x for part in parts]))


@pytest.mark.parametrize("first", ["predictor", "corrector"])
@pytest.mark.parametrize("predictor", [DPMSolverPP(3), DEIS(4), UniPC(3), UniPC(4)])
def test_a_corrector_in_between_is_not_undone(predictor: Solver, first: str) -> None:
    """A history must not carry the state past what a corrector did to it.

    At 400 steps the corrector rules, and its own law has the variance times 1 / (1 - snr^2) = 1.026
    (DDIM as predictor: 1.021; UniPC that overrode the corrector had 0.957). One standard error of
    the variance of 2 x 20,000 normals is 0.007.
    """
    sde = VPSDE()
    target = GaussianMixture(torch.zeros(1, 2), torch.tensor([0.01]))
    solver = PredictorCorrector(predictor, Langevin(0.16), first)  # type: ignore[arg-type]
    score_fn = target.score_fn(sde)
    x = sample(score_fn, sde, solver, shape=(20_000, 2), steps=400, grid="log_snr").x
    end = sde.at(sde.t_min)
    ratio = float(x.var() / (0.01 * end.alpha**2 + end.sigma**2))
    assert 1.0 < ratio < 1.05
