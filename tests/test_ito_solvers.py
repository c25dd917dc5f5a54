"""Orders of the general solvers, on motions shared by all step sizes and against closed forms."""

import itertools
import math

import pytest
import torch

from sde_diffusion import ItoSDE
from sde_diffusion.ito import (
    GammaMixture,
    GeometricBrownianMotion,
    LogNormal,
    SquareRootProcess,
    correlated_geometric,
)
from solvers import RecordedNoise, ito, sample_ito
from solvers.base import Step
from solvers.ito.base import Clock
from solvers.noise import AREA
from tests.problems import fitted_order

FINE = 256
STEPS = (16, 32, 64)


class Motions:
    """Brownian paths with their areas, drawn finely, and what they are on coarser grids."""

    def __init__(self, paths, motions, seed=0):
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(2, FINE, paths, motions, generator=generator, dtype=torch.float64)
        width = 1 / FINE
        self.increments = z[0] * width**0.5
        self.integrals = width * (0.5 * self.increments + z[1] * (width / 12) ** 0.5)
        self.end = self.increments.sum(0)

    def on(self, steps):
        """As normalised draws for a uniform grid of ``steps``."""
        count, h = FINE // steps, 1 / steps
        grouped = self.increments.unflatten(0, (steps, count))
        before = grouped.cumsum(1) - grouped
        integral = (before / FINE + self.integrals.unflatten(0, (steps, count))).sum(1)
        increment = grouped.sum(1)
        area = integral / h - 0.5 * increment
        draws = {(k, 0): increment[k] / h**0.5 for k in range(steps)}
        draws |= {(k, AREA): area[k] / (h / 12) ** 0.5 for k in range(steps)}
        return RecordedNoise(draws)


RATE = torch.tensor([0.1, -0.2], dtype=torch.float64)
SHARED = torch.tensor([[0.8, 0.3], [-0.4, 0.6]], dtype=torch.float64)


def problem(kind):
    """``(sde, motions, exact end)`` of geometric motions in two dimensions, by kind of noise."""
    x = torch.tensor([[1.0, 0.7]], dtype=torch.float64)
    if kind == "diagonal":
        process = GeometricBrownianMotion(0.1, 0.9)
        return process.sde(), 2, lambda w: process.solution(x, 1.0, w)
    matrix = SHARED if kind == "general" else SHARED[:, :1]
    exact = lambda w: x * torch.exp(RATE - 0.5 * (matrix**2).sum(1) + w @ matrix.T)  # noqa: E731
    if kind == "general":
        return correlated_geometric(RATE, matrix), 2, exact
    return ItoSDE(lambda x, t: RATE * x, lambda x, t: matrix[:, 0] * x, kind="scalar"), 1, exact


@pytest.mark.parametrize(
    "solver, kind, order",
    [
        *((ito.EulerMaruyama(), kind, 0.5) for kind in ("diagonal", "scalar", "general")),
        *((ito.Milstein(), kind, 1.0) for kind in ("diagonal", "scalar", "general")),
        (ito.Torchsde("euler"), "general", 0.5),
        (ito.Torchsde("milstein"), "diagonal", 1.0),
        (ito.Torchsde("milstein"), "scalar", 1.0),
        (ito.Torchsde("srk"), "diagonal", 1.5),
        (ito.Torchsde("srk"), "scalar", 1.5),
        # Stratonovich's methods, to the Ito solution: order 1 where the noise commutes.
        (ito.Torchsde("heun"), "general", 1.0),
        (ito.Torchsde("midpoint"), "diagonal", 1.0),
    ],
)
def test_strong_order_on_multiplicative_noise(solver, kind, order):
    sde, motions, exact = problem(kind)
    paths = Motions(1500, motions)
    x = torch.tensor([[1.0, 0.7]], dtype=torch.float64).expand(1500, 2)

    def error(steps):
        run = sample_ito(sde, solver, x=x, steps=steps, noise=paths.on(steps), coordinates="state")
        return float((run.x - exact(paths.end)).square().mean().sqrt())

    errors = [error(n) for n in STEPS]
    # All steps share the paths, so that the slope's own noise is a few hundredths.
    assert fitted_order(STEPS, errors) == pytest.approx(order, abs=0.25)
    assert errors[-1] < {0.5: 0.2, 1.0: 0.05, 1.5: 0.01}[order]


@pytest.mark.parametrize("solver", [ito.Milstein(), ito.Torchsde("milstein")])
def test_one_motion_that_turns_the_state(solver):
    # G(x) = J x with J a quarter turn, whose Jacobian is not symmetric: dx = J x dw has the
    # solution exp(J w + t/2) x_0, for J^2 = -I.
    sde = ItoSDE(
        lambda x, t: torch.zeros_like(x),
        lambda x, t: torch.stack([-x[:, 1], x[:, 0]], 1),
        kind="scalar",
    )
    paths = Motions(1500, 1)
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(1500, 2)
    exact = math.exp(0.5) * torch.cat([paths.end.cos(), paths.end.sin()], 1)

    def error(steps):
        run = sample_ito(sde, solver, x=x, steps=steps, noise=paths.on(steps))
        return float((run.x - exact).square().mean().sqrt())

    assert fitted_order(STEPS, [error(n) for n in STEPS]) == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("kind", ["diagonal", "scalar", "general"])
def test_in_logarithms_geometric_motion_is_solved_exactly(kind):
    # It is Brownian motion with drift there, and Euler-Maruyama is exact at any number of steps.
    sde, motions, exact = problem(kind)
    paths = Motions(50, motions)
    x = torch.tensor([[1.0, 0.7]], dtype=torch.float64).expand(50, 2)
    run = sample_ito(sde, ito.EulerMaruyama(), x=x, steps=2, noise=paths.on(2), coordinates="log")
    assert torch.allclose(run.x, exact(paths.end), rtol=1e-12)


def test_isotropic_noise_that_depends_on_the_state():
    # One element: commutative, and geometric motion again. Two: not, and Milstein says so.
    sde = ItoSDE(
        lambda x, t: 0.1 * x, lambda x, t: 0.9 * x.norm(dim=1), kind="isotropic", t_max=1.0
    )
    paths = Motions(1500, 1)
    x = torch.ones(1500, 1, dtype=torch.float64)
    exact = GeometricBrownianMotion(0.1, 0.9).solution(x, 1.0, paths.end)

    def error(steps, solver, coordinates):
        run = sample_ito(
            sde, solver, x=x, steps=steps, noise=paths.on(steps), coordinates=coordinates
        )
        return float((run.x - exact).square().mean().sqrt())

    errors = [error(n, ito.Milstein(), "state") for n in STEPS]
    assert fitted_order(STEPS, errors) == pytest.approx(1, abs=0.25)
    assert error(2, ito.EulerMaruyama(), "log") < 1e-12
    with pytest.raises(ValueError, match="commutative"):
        sample_ito(sde, ito.Milstein(), x=torch.rand(3, 2).double(), steps=2)


@pytest.mark.parametrize("solver", [ito.EulerMaruyama(), ito.Milstein()])
def test_weak_order_without_sampling(solver):
    # Every path over n steps with the three-point Gauss-Hermite rule, which has a normal's moments
    # up to the fifth: the mean and second moment come out as for normal increments.
    nodes, weights = (-(3**0.5), 0.0, 3**0.5), (1 / 6, 2 / 3, 1 / 6)
    rate, volatility = 0.4, 0.5
    sde = GeometricBrownianMotion(rate, volatility).sde()
    exact = torch.tensor([rate, 2 * rate + volatility**2]).double().exp()

    def errors(steps):
        paths = torch.tensor(list(itertools.product(range(3), repeat=steps)))
        z = torch.tensor(nodes, dtype=torch.float64)[paths]
        weight = torch.tensor(weights, dtype=torch.float64)[paths].prod(1)
        x = sample_ito(
            sde,
            solver,
            x=torch.ones(len(z), 1, dtype=torch.float64),
            steps=steps,
            noise=RecordedNoise([z[:, k : k + 1] for k in range(steps)]),
            coordinates="state",
        ).x[:, 0]
        h = 1 / steps
        mean, second = (weight * x).sum(), (weight * x**2).sum()
        growth = (1 + rate * h) ** 2 + volatility**2 * h
        if isinstance(solver, ito.Milstein):
            growth += 0.5 * volatility**4 * h**2
        assert mean.item() == pytest.approx((1 + rate * h) ** steps, rel=1e-12)
        assert second.item() == pytest.approx(growth**steps, rel=1e-12)
        return (torch.stack([mean, second]) - exact).abs()

    steps = (2, 4, 8)
    table = [errors(n) for n in steps]
    for i in (0, 1):
        assert fitted_order(steps, [float(row[i]) for row in table]) == pytest.approx(1, abs=0.25)


DATA = LogNormal(0.2, 0.3)
PROCESS = GeometricBrownianMotion(0.3, 0.8, t_min=0.01)


def geometric_score(x, t):
    return PROCESS.marginal(DATA, t).score(x)


def exact_flow(x, start, end):
    before, after = PROCESS.marginal(DATA, start), PROCESS.marginal(DATA, end)
    ratio = math.sqrt(after.variance / before.variance)
    return torch.exp(after.mean + ratio * (x.log() - before.mean))


@pytest.mark.parametrize("method, order", [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_flow_order_with_multiplicative_noise(method, order):
    x = torch.linspace(0.2, 6, 9, dtype=torch.float64)[:, None]
    sde = PROCESS.sde()
    steps = (20, 40, 80)

    def error(n):
        times = 1 - 0.99 * torch.linspace(0, 1, n + 1, dtype=torch.float64) ** 1.3
        run = sample_ito(
            sde.flow(geometric_score), ito.RungeKutta(method), x=x, grid=times, coordinates="state"
        )
        assert run.nfe == n * len(
            {"euler": "1", "midpoint": "12", "heun": "12"}.get(method, "1234")
        )
        return float((run.x - exact_flow(x, 1.0, 0.01)).abs().max())

    errors = [error(n) for n in steps]
    assert fitted_order(steps, errors) > order - 0.25
    assert errors[-1] < 0.05 / 8 ** (order - 1)


def test_adaptive_flow_reaches_the_exact_map():
    x = torch.linspace(0.2, 6, 4, dtype=torch.float64)[:, None]
    run = sample_ito(
        PROCESS.sde().flow(geometric_score), ito.Torchdiffeq(rtol=1e-8, atol=1e-8), x=x
    )
    assert torch.allclose(run.x, exact_flow(x, 1.0, 0.01), rtol=3e-7)
    assert run.nfe_per_sample.shape == (4,)
    assert run.nfe == pytest.approx(run.nfe_per_sample.double().mean().item())


def test_brownian_path_is_one_path_on_every_grid():
    sde = PROCESS.sde()
    for equation in (sde.forward(), sde.reverse(geometric_score)):
        path = ito.brownian_path(equation, 3)
        clock = Clock(equation.end, equation.start)
        times = torch.linspace(equation.start, equation.end, 6, dtype=torch.float64)
        levels = [clock.at(t) for t in times]
        x = torch.zeros(5, 2, dtype=torch.float64)

        def increment(i, j, levels=levels, path=path, times=times, x=x):
            width = (times[i] - times[j]).abs().sqrt()
            return width * path(x, Step(0, levels[i], levels[j]))

        parts = sum(increment(i, i + 1) for i in range(5))
        assert torch.allclose(parts, increment(0, 5), atol=1e-9)


MIXTURE = GammaMixture(SquareRootProcess(), torch.tensor([0.05, 1.5]))
SDE = MIXTURE.process.sde()


@pytest.mark.parametrize(
    "equation, solver",
    [
        (SDE.reverse(MIXTURE.score), ito.EulerMaruyama()),
        (SDE.reverse(MIXTURE.score), ito.Milstein()),
        (SDE.reverse(MIXTURE.score), ito.Torchsde("srk")),
        (SDE.flow(MIXTURE.score), ito.RungeKutta()),
        (SDE.flow(MIXTURE.score), ito.Torchdiffeq()),
        (correlated_geometric(RATE, SHARED).forward(), ito.Milstein()),
        (correlated_geometric(RATE, SHARED).forward(), ito.Torchsde("heun")),
    ],
)
def test_a_sample_does_not_depend_on_its_batch(equation, solver):
    width = 2 if equation.kind == "general" else 1
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(7, width, generator=generator, dtype=torch.float64) + 0.2

    def run(indices):
        return sample_ito(
            equation, solver, x=x[indices], steps=8, seed=4, sample_ids=torch.tensor(indices)
        ).x

    whole = run(list(range(7)))
    assert torch.equal(whole[[5, 2]], run([5, 2]))
    assert torch.equal(whole[[6]], run([6]))


def test_prior_of_a_part_is_the_part_of_the_prior():
    whole = sample_ito(
        SDE.reverse(MIXTURE.score), ito.EulerMaruyama(), shape=(6, 1), steps=4, seed=2
    )
    part = sample_ito(
        SDE.reverse(MIXTURE.score),
        ito.EulerMaruyama(),
        shape=(2, 1),
        steps=4,
        seed=2,
        sample_ids=[4, 1],
    )
    assert torch.equal(whole.x[[4, 1]], part.x)


def test_evaluations_are_counted_at_the_call():
    calls = []

    def score(x, t):
        calls.append(float(t))
        return MIXTURE.score(x, t)

    for equation, solver in (
        (SDE.reverse(score), ito.EulerMaruyama()),
        (SDE.reverse(score), ito.Torchsde("srk")),
        (SDE.flow(score), ito.RungeKutta("heun")),
    ):
        calls.clear()
        run = sample_ito(equation, solver, shape=(3, 1), steps=6)
        assert (
            run.nfe == len(calls) == {"srk": 24, "heun": 12}.get(getattr(solver, "method", ""), 6)
        )


def test_gradients_of_a_run():
    strength = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)

    def end(strength):
        equation = SDE.flow(lambda x, t: strength * MIXTURE.score(x, t))
        x = torch.full((2, 1), 0.8, dtype=torch.float64)
        return sample_ito(equation, ito.RungeKutta(), x=x, steps=5, gradients=True).x.sum()

    (slope,) = torch.autograd.grad(end(strength), strength)
    h = 1e-5
    with torch.no_grad():
        difference = (end(strength + h) - end(strength - h)) / (2 * h)
    assert slope.item() == pytest.approx(difference.item(), rel=1e-6)
