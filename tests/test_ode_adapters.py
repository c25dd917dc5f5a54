"""ODE adapters against closed forms: exact maps, tolerances, orders, the grid's own steps."""

import math
from itertools import pairwise

import pytest
import torch

from sde_diffusion import VESDE, VPSDE, CosineVPSDE, SubVPSDE
from sde_diffusion.named_targets import gaussian, ring
from solvers import ProbabilityFlow, ScipyODE, TorchdiffeqODE, sample
from tests.adapters import ACCURATE, DDPM, FIXED, IDS, LOOSE, SDES, Counter, exact_flow, name, start


@pytest.mark.parametrize("sde", SDES, ids=IDS)
@pytest.mark.parametrize("solver", ACCURATE, ids=name)
def test_reaches_the_exact_flow(solver, sde):
    # Tolerances bound the error of a step; some dozens of steps, and the flow contracts: within 30
    # tolerances at the end.
    x = start(sde, 2)
    solution = sample(gaussian().score_fn(sde), sde, solver, x=x)
    assert (solution.x - exact_flow(gaussian(), sde, x)).abs().max() < 30 * solver.rtol


@pytest.mark.parametrize("solver", LOOSE, ids=name)
def test_low_order_and_implicit_methods_reach_the_exact_flow(solver):
    # fehlberg2 takes 1/512 of the distance to Euler's method for its error: its own is 400 times
    # the tolerance.
    factor = 1000 if solver.method == "fehlberg2" else 30
    x = start(VPSDE(), 2)
    solution = sample(gaussian().score_fn(VPSDE()), VPSDE(), solver, x=x)
    assert (solution.x - exact_flow(gaussian(), VPSDE(), x)).abs().max() < factor * solver.rtol


@pytest.mark.parametrize("sde", [CosineVPSDE(), DDPM], ids=["CosineVPSDE", "TabulatedVPSDE"])
@pytest.mark.parametrize("solver", [TorchdiffeqODE(), ScipyODE()], ids=name)
def test_reaches_the_exact_flow_on_the_other_sdes(solver, sde):
    x = start(sde, 2)
    solution = sample(gaussian().score_fn(sde), sde, solver, x=x)
    assert (solution.x - exact_flow(gaussian(), sde, x)).abs().max() < 30 * solver.rtol


@pytest.mark.parametrize("solver_type", [TorchdiffeqODE, ScipyODE])
def test_error_follows_the_tolerance(solver_type):
    sde = VPSDE()
    x = start(sde, 4)
    errors = []
    for tolerance in (1e-4, 1e-6, 1e-8):
        solver = solver_type(rtol=tolerance, atol=tolerance)
        solution = sample(gaussian().score_fn(sde), sde, solver, x=x)
        errors.append((solution.x - exact_flow(gaussian(), sde, x)).abs().max().item())
    # A hundredth of the tolerance: at least a twentieth of the error.
    assert all(fine < coarse / 20 for coarse, fine in pairwise(errors))


@pytest.mark.parametrize("sde", SDES, ids=IDS)
@pytest.mark.parametrize("norm", ["sample", "batch"])
def test_agrees_with_the_native_solver_on_a_mixture(sde, norm):
    # rk4 at 800 steps is within 1e-7 of the limit here; the adapters' tolerance is 1e-7.
    score_fn = ring().score_fn(sde)
    x = start(sde, 3)
    native = sample(score_fn, sde, ProbabilityFlow("rk4"), x=x, steps=800, grid="log_snr").x
    for solver_type in (TorchdiffeqODE, ScipyODE):
        solution = sample(score_fn, sde, solver_type(rtol=1e-7, atol=1e-7, norm=norm), x=x)
        assert (solution.x - native).abs().max() < 1e-5


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("sde", [VPSDE(), VESDE(), SubVPSDE()], ids=["VP", "VE", "subVP"])
def test_fixed_methods_take_the_grids_steps_and_have_their_order(method, sde):
    order, stages = FIXED[method]
    solver = TorchdiffeqODE(method)
    assert solver.order == order
    x = start(sde, 8)
    exact = exact_flow(gaussian(), sde, x)
    for grid in ("log_snr", "karras"):
        errors = []
        for steps in (64, 128):
            counter = Counter(gaussian().score_fn(sde))
            solution = sample(counter, sde, solver, x=x, steps=steps, grid=grid)
            assert solution.nfe == counter.calls == steps * stages
            assert solution.nfe_per_sample is None
            errors.append((solution.x - exact).square().mean().sqrt().item())
        assert math.log2(errors[0] / errors[1]) > order - 0.25


def test_fixed_euler_is_the_formula():
    sde = VPSDE()
    times = torch.tensor([1.0, 0.6, 0.35, 0.1], dtype=torch.float64)
    score_fn = ring().score_fn(sde)
    x = start(sde, 5)
    solution = sample(score_fn, sde, TorchdiffeqODE("euler"), x=x, grid=times)
    for now, then in pairwise(times):
        level, after = sde.at(now), sde.at(then)
        step = after.half_log_snr - level.half_log_snr
        slope = -level.sigma_over_alpha * score_fn(x, level).eps
        x = after.alpha * (x / level.alpha + step * slope)
    torch.testing.assert_close(solution.x, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", [TorchdiffeqODE(), TorchdiffeqODE("rk4"), ScipyODE()], ids=name)
def test_evaluates_within_the_grid_and_at_its_start(solver):
    sde = VPSDE()
    counter = Counter(ring().score_fn(sde))
    times = torch.tensor([0.9, 0.5, 0.01], dtype=torch.float64)
    sample(counter, sde, solver, x=start(sde, 2), grid=times)
    assert counter.times[0] == 0.9
    assert max(counter.times) == 0.9
    assert min(counter.times) >= 0.01


@pytest.mark.parametrize("solver", [TorchdiffeqODE(), ScipyODE(), TorchdiffeqODE("rk4")], ids=name)
def test_float32_states(solver):
    sde = VPSDE()
    x = start(sde, 3)
    narrow = sample(gaussian().score_fn(sde), sde, solver, x=x.float(), steps=100, grid="log_snr")
    assert narrow.x.dtype == torch.float32
    # The tolerance of 1e-5, some dozens of steps, and a score with float32's rounding.
    assert (narrow.x - exact_flow(gaussian(), sde, x)).abs().max() < 3e-4
