"""Singlestep DPM-Solver++: order, limit, exactness for a polynomial x0, cost, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sde_diffusion import NoiseLevel, Prediction
from solvers import DDIM, ProbabilityFlow, Step, sample
from solvers.exponential import constant_rate, interpolation_weights
from solvers.methods.dpm_solver_singlestep import DPMSolverSinglestep
from solvers.noise import CounterNoise
from tests.problems import SDES, IsotropicScore, fitted_order, uniform_grid
from tests.test_orders import GRIDS, problem

CASES = [
    *((name, grid) for name in ("vp", "ve", "subvp") for grid in ("log_snr", "warped", "random")),
    ("vp", "time"),
    ("subvp", "time"),
]


@pytest.mark.parametrize("name,grid", CASES)
@pytest.mark.parametrize("target", ["ring", "gaussian"])
@pytest.mark.parametrize("order", [2, 3])
def test_order_and_limit(order: int, target: str, name: str, grid: str) -> None:
    sde, solver = SDES[name], DPMSolverSinglestep(order)
    score_fn, x, exact = problem(target, name)
    # Uniform times leave VP's last steps long in log-SNR: order 3 shows on finer grids only.
    steps = (512, 1024, 2048) if (order, name, grid) == (3, "vp", "time") else (128, 256, 512)
    ends = [sample(score_fn, sde, solver, x=x, grid=GRIDS[grid](sde, n)).x for n in steps]
    errors = [float((end - exact).square().mean().sqrt()) for end in ends]
    assert fitted_order(steps, errors) > solver.order - 0.25
    assert errors[-1] < {2: 2e-4, 3: 4e-6}[order]
    limit = ends[-1] + (ends[-1] - ends[-2]) / (2**order - 1)
    assert float((limit - exact).square().mean().sqrt()) < 0.35 * errors[-1]


@pytest.mark.parametrize("terms", [1, 2, 3, 4])
@pytest.mark.parametrize("h", [1e-4, 1e-2, 1.0, 12.0])
@pytest.mark.parametrize("rate", [1.0, 2.0, 150.0])
def test_weights_integrate_polynomials(rate: float, h: float, terms: int) -> None:
    """``r int_0^h exp(-r (h - v)) (v/h)^j dv = r h j! phi_(j+1)(-r h)``, from the defining series
    or, for large arguments, the recurrence, which cancels only for small ones."""
    wide = {"dtype": torch.float64}
    start, end = torch.tensor(0.7, **wide), torch.tensor(0.7 + h, **wide)
    h = float(end - start)
    nodes = [start - h * k * (1 + 0.3 * k) for k in range(terms)]
    weights = interpolation_weights(nodes, start, end, constant_rate(rate, end))
    z = rate * h
    for j in range(terms):
        if z < 1:
            value, term = 0.0, 1.0 / (j + 1)  # j! phi_(j+1)(-z) = sum (-z)^k j! / (k + j + 1)!
            for k in range(40):
                value += term
                term *= -z / (k + j + 2)
        else:
            value = -torch.expm1(torch.tensor(-z, **wide)).item() / z
            for i in range(1, j + 1):
                value = (1 - i * value) / z
        found = sum(w * ((n - start) / h) ** j for w, n in zip(weights, nodes, strict=True))
        assert float(found) == pytest.approx(z * value, rel=1e-11)


@pytest.mark.parametrize("name", ["vp", "ve", "subvp", "cosine", "edm"])
@pytest.mark.parametrize("order", [2, 3])
def test_exact_for_a_linear_x0(order: int, name: str) -> None:
    """Where x0 is a polynomial of degree below the order in half_log_snr, one step is exact, from
    any state: the solution is the integral itself."""
    sde = SDES[name]

    def score_fn(x: Tensor, level: NoiseLevel) -> Prediction:
        v = level.half_log_snr
        x0 = sum(0.3 * v**j for j in range(order))
        return Prediction.from_x0(x, level, torch.ones_like(x) * x0)

    x = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    times = [sde.t_max, sde.t_min]
    one = sample(score_fn, sde, DPMSolverSinglestep(order), x=x, grid=times).x
    many = sample(score_fn, sde, DPMSolverSinglestep(order), x=x, grid=uniform_grid(sde, 40)).x
    torch.testing.assert_close(one, many, rtol=1e-10, atol=1e-10)
    fine = sample(score_fn, sde, ProbabilityFlow("rk4"), x=x, grid=uniform_grid(sde, 400)).x
    torch.testing.assert_close(one, fine, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("order", [2, 3])
def test_few_steps_any_shape_and_split(order: int, name: str) -> None:
    sde, solver = SDES[name], DPMSolverSinglestep(order)
    for steps in (1, 2, 3):
        for shape in ((5,), (5, 2), (5, 1, 3, 3)):
            whole = sample(IsotropicScore(), sde, solver, shape=shape, steps=steps)
            assert whole.x.dtype == torch.float32
            assert whole.nfe == order * steps
            assert whole.x.isfinite().all()
            part = sample(
                IsotropicScore(), sde, solver, shape=(2, *shape[1:]), sample_ids=[3, 4], steps=steps
            )
            assert torch.equal(whole.x[3:], part.x)


def test_float32_does_not_cost_accuracy() -> None:
    """At 200 steps of either precision from one state: the difference is float32's rounding."""
    sde = SDES["vp"]
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    for order in (2, 3):
        solver = DPMSolverSinglestep(order)
        grid = uniform_grid(sde, 200)
        narrow = sample(IsotropicScore(), sde, solver, x=x, grid=grid).x
        wide = sample(IsotropicScore(), sde, solver, x=x.double(), grid=grid).x
        assert float((narrow - wide).abs().max()) < 1e-5


def test_steps_by_hand_and_per_sample() -> None:
    """0-d and per-sample levels give what a run gives."""
    sde, solver = SDES["vp"], DPMSolverSinglestep(3)
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    run = sample(IsotropicScore(), sde, solver, x=x, grid=[0.8, 0.3]).x
    start, end = sde.at(0.8), sde.at(0.3)
    for size in (None, 3):
        ends = [level if size is None else level.per_sample(size) for level in (start, end)]
        step = Step(0, *ends, solver.stages(sde, *ends))
        one = solver.step(IsotropicScore(), x, step, (), CounterNoise(0)).x
        torch.testing.assert_close(one, run, rtol=1e-13, atol=1e-13)


def test_settings() -> None:
    for order in (0, 1, 4):
        with pytest.raises(ValueError, match="order must be"):
            DPMSolverSinglestep(order)
    with pytest.raises(TypeError, match="order must be a whole number"):
        DPMSolverSinglestep(2.0)  # type: ignore[arg-type]
    assert not DPMSolverSinglestep(2).stochastic
    assert DDIM().order == 1  # which the message for order 1 names
