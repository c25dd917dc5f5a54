"""Worked examples on the half-line: kernels against independent formulas, reverses against known
laws; and what is refused."""

import numpy as np
import pytest
import torch
from scipy import special, stats

from sde_diffusion import ItoSDE
from sde_diffusion.ito import (
    CriticallyDampedLangevin,
    GammaMixture,
    GeometricBrownianMotion,
    LogNormal,
    SquareRootProcess,
    gradient_of,
)
from sde_diffusion.ito.square_root import bessel_ratio
from solvers import ito, sample_ito
from tests.ito_laws import EXACT, same_mean, time
from tests.problems import assert_close_to_monte_carlo

# --- geometric Brownian motion -------------------------------------------------------------------


def test_log_normal_against_torch():
    law = LogNormal(0.3, 0.5)
    x = torch.linspace(0.1, 4, 9, dtype=torch.float64)[:, None]
    exact = torch.distributions.LogNormal(0.3, 0.5**0.5)
    assert torch.allclose(law.log_prob(x), exact.log_prob(x)[:, 0])
    assert torch.allclose(law.score(x), gradient_of(lambda x, t: law.log_prob(x))(x, time(0.0)))


def test_geometric_transition_is_log_normal():
    process = GeometricBrownianMotion(0.3, 0.6)
    transition, t = process.sde().transition, time([0.2, 0.9])
    x0, x = time([[0.5], [2.0]]), time([[0.7], [1.0]])
    law = torch.distributions.LogNormal(
        x0.log() + (0.3 - 0.18) * t[:, None], 0.6 * t[:, None] ** 0.5
    )
    exact = gradient_of(lambda x, t: law.log_prob(x)[:, 0])(x, t)
    assert torch.allclose(transition.score(x, x0, t), exact)
    z = time([[1.0], [-2.0]])
    assert torch.allclose(transition.sample(x0, t, lambda slot: z), (law.loc + law.scale * z).exp())


@pytest.mark.parametrize("coordinates", ["log", "state"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_geometric_reverse_restores_the_log_normal(coordinates, deterministic):
    process = GeometricBrownianMotion(0.3, 0.8, t_min=0.01)
    data = LogNormal(0.2, 0.3)
    sde, n = process.sde(), 4000
    end, start = process.marginal(data, 0.01), process.marginal(data, 1.0)
    generator = torch.Generator().manual_seed(4)
    x = start.sample(lambda slot: torch.randn(n, 1, generator=generator, dtype=torch.float64))

    def score(x, t):
        return process.marginal(data, t).score(x)

    equation = sde.flow(score) if deterministic else sde.reverse(score)
    solver = ito.RungeKutta("rk4") if deterministic else ito.Milstein()
    y = sample_ito(equation, solver, x=x, steps=200, coordinates=coordinates, seed=3).x.log()
    assert_close_to_monte_carlo(y.mean(), end.mean, (end.variance / n) ** 0.5)
    assert_close_to_monte_carlo(y.var(), end.variance, end.variance * (2 / n) ** 0.5)


# --- the square-root process ---------------------------------------------------------------------

PROCESS = SquareRootProcess(rate=5.0, level=1.2, degrees=4)
GAMMAS = GammaMixture(PROCESS, time([0.06, 1.4]), time([0.4, 0.6]))


def test_bessel_ratio_against_scipy():
    z = np.concatenate([np.geomspace(1e-6, 1e6, 200)])
    for order in (0.0, 0.5, 1.0, 3.0):
        exact = special.ive(order + 1, z) / special.ive(order, z)
        assert bessel_ratio(order, torch.from_numpy(z)).numpy() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("t", [0.01, 0.3])
def test_square_root_kernel_against_scipy(t):
    # x_t = c times a non-central chi-square: scipy's density, differentiated, and its moments.
    transition, x0, n = PROCESS.sde().transition, 0.8, 4000
    c = float(PROCESS.spread(time(t)))
    law = stats.ncx2(PROCESS.degrees, x0 * np.exp(-PROCESS.rate * t) / c, scale=c)
    x = np.array([0.5, 0.9, 1.4]) * law.mean()
    h = 1e-5
    exact = (law.logpdf(x * (1 + h)) - law.logpdf(x * (1 - h))) / (2 * h * x)
    start = torch.full((3, 1), x0, dtype=torch.float64)
    found = transition.score(torch.from_numpy(x)[:, None], start, torch.full((3,), t).double())
    assert found[:, 0].numpy() == pytest.approx(exact, rel=1e-5, abs=1e-5)
    generator = torch.Generator().manual_seed(0)
    drawn = transition.sample(
        torch.full((n, 1), x0, dtype=torch.float64),
        torch.full((n,), t, dtype=torch.float64),
        lambda slot: torch.randn(n, 1, generator=generator, dtype=torch.float64),
    )
    assert stats.kstest(drawn[:, 0].numpy(), law.cdf).pvalue > 1e-3


def test_gamma_marginals_solve_the_fokker_planck_equation():
    sde = PROCESS.sde()
    x = torch.linspace(0.1, 4, 7, dtype=torch.float64)[:, None].requires_grad_()
    t = time(0.2).requires_grad_()
    density = GAMMAS.log_prob(x, t).exp()

    def slope(values, of):
        return torch.autograd.grad(values.sum(), of, create_graph=True)[0]

    at = t.detach()
    flux = sde.drift(x, at)[:, 0] * density
    spread = 0.5 * sde.diffusion(x, at)[:, 0] ** 2 * density
    change = -slope(flux, x) + slope(slope(spread, x)[:, 0], x)
    by_time = torch.stack(
        [torch.autograd.grad(one, t, retain_graph=True)[0] for one in density.unbind()]
    )
    assert torch.allclose(change[:, 0], by_time, rtol=1e-9, atol=1e-12)
    assert torch.allclose(GAMMAS.score(x, at), gradient_of(GAMMAS.log_prob)(x.detach(), at))


def law_of_positive(x):
    return torch.cat([x, x**2, x.sqrt(), (x < 0.3).double(), (x < 0.1).double()], 1)


@pytest.mark.parametrize("name", ["reverse", "milstein", "srk", "flow", "guided"])
def test_square_root_reverse_restores_the_gamma_mixture(name):
    # 4,000 paths from the stationary prior. What is left of the data at the end and Euler's own
    # bias are at most 1.4 standard errors together, in P(x < 0.3) (measured with 40,000 paths).
    sde, n = PROCESS.sde(), 4000
    label = 1 if name == "guided" else None
    guidance = gradient_of(GAMMAS.log_posterior(1)) if name == "guided" else None
    equation = sde.reverse(GAMMAS.score, guidance)
    solver = {"milstein": ito.Milstein(), "srk": ito.Torchsde("srk")}.get(name, ito.EulerMaruyama())
    steps = 200
    if name == "flow":
        equation, solver, steps = sde.flow(GAMMAS.score), ito.RungeKutta("heun"), 60
    run = sample_ito(
        equation, solver, shape=(n, 1), steps=steps, grid="quadratic", seed=2, dtype=torch.float64
    )
    exact = GAMMAS.sample(100_000, 8, sde.t_min, label)
    assert bool((run.x > 0).all())
    same_mean(law_of_positive(run.x), law_of_positive(exact))


def test_without_the_divergence_the_law_is_another():
    # The trap of the reverse equation: G G^T score alone leaves a bias of many standard errors.
    sde, n = PROCESS.sde(), 4000
    wrong = ItoSDE(
        sde.drift,
        sde.diffusion,
        divergence=lambda x, t: torch.zeros_like(x),
        t_min=sde.t_min,
        prior=sde.prior,
        coordinates="reflected",
    )
    run = sample_ito(
        wrong.reverse(GAMMAS.score),
        ito.EulerMaruyama(),
        shape=(n, 1),
        steps=200,
        grid="quadratic",
        seed=2,
        dtype=torch.float64,
    )
    exact = GAMMAS.sample(100_000, 8, sde.t_min)
    stderr = (exact.var() / n).sqrt()
    assert (run.x.mean() - exact.mean()).abs() > 5 * stderr


def test_autograd_divergence_gives_the_same_samples():
    sde = PROCESS.sde()
    plain = ItoSDE(
        sde.drift, sde.diffusion, t_min=sde.t_min, prior=sde.prior, coordinates="reflected"
    )
    runs = [
        sample_ito(
            one.reverse(GAMMAS.score),
            ito.EulerMaruyama(),
            shape=(20, 1),
            steps=20,
            dtype=torch.float64,
        ).x
        for one in (sde, plain)
    ]
    assert torch.allclose(*runs, rtol=1e-9)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: CriticallyDampedLangevin(mass=0.0), "mass must be"),
        (lambda: CriticallyDampedLangevin(gamma=-1.0), "gamma must be at least 0"),
        (lambda: GeometricBrownianMotion(volatility=-1.0), "volatility must be"),
        (lambda: SquareRootProcess(degrees=1), "degrees must be at least 2"),
        (lambda: GammaMixture(PROCESS, time([-1.0])), "scales must be"),
        (lambda: GAMMAS.log_posterior(2), "label must be at most 1"),
        (lambda: EXACT.score(torch.zeros(3, 4), time(0.5)), "state must have shape"),
    ],
)
def test_examples_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()
