"""The worked examples: kernels against independent formulas, reverses against known laws."""

import numpy as np
import pytest
import torch
from scipy import special, stats

from sde_diffusion import GaussianMixture, ItoSDE
from sde_diffusion.ito import (
    CriticallyDampedLangevin,
    GammaMixture,
    GeometricBrownianMotion,
    LogNormal,
    SquareRootProcess,
    gradient_of,
    ito_losses,
    normals_from,
)
from sde_diffusion.ito.square_root import bessel_ratio
from solvers import ito, sample_ito
from tests.problems import assert_close_to_monte_carlo

LANGEVIN = CriticallyDampedLangevin(beta=3.0, mass=0.3, gamma=0.05)
MIXTURE = GaussianMixture(
    torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.0, 1.5]]),
    torch.tensor([[[0.1, 0.05], [0.05, 0.1]], [[0.05, 0.0], [0.0, 0.1]], [[0.2, 0.0], [0.0, 0.1]]]),
    weights=torch.tensor([0.5, 0.3, 0.2]),
    labels=torch.tensor([0, 1, 1]),
)
EXACT = LANGEVIN.exact(MIXTURE)


def time(t):
    return torch.tensor(t, dtype=torch.float64)


def same_mean(found, exact):
    """Means of two samples, ``(n, k)`` and ``(m, k)``, agree within their standard errors."""
    stderr = (found.var(0) / len(found) + exact.var(0) / len(exact)).sqrt()
    assert_close_to_monte_carlo(found.mean(0), exact.mean(0), stderr)


# --- critically damped Langevin diffusion --------------------------------------------------------


def van_loan(t):
    """Mean map and covariance of the SDE's own drift and diffusion, by one matrix exponential of
    the block matrix ``[[-A, Q], [0, A^T]]`` (Van Loan 1978), in extended precision by scaling."""
    sde = LANGEVIN.sde()
    origin = torch.zeros(1, 2, 1, dtype=torch.float64)
    a = torch.autograd.functional.jacobian(lambda u: sde.drift(u, time(0.5)), origin)
    a = a.reshape(2, 2)
    g = sde.diffusion(origin, time(0.5)).reshape(2)
    block = torch.zeros(4, 4, dtype=torch.float64)
    block[:2, :2], block[:2, 2:], block[2:, 2:] = -a, torch.diag(g**2), a.T
    power = torch.linalg.matrix_exp(block * t)
    mean = power[2:, 2:].T
    return mean, mean @ power[:2, 2:]


@pytest.mark.parametrize("t", [1e-3, 0.05, 0.4, 1.0])
def test_langevin_kernel_is_that_of_its_drift_and_diffusion(t):
    matrix, noise = van_loan(t)
    one = torch.ones(1, dtype=torch.float64)
    for start in (0, 1):
        given = (one, 0.0) if start == 0 else (0 * one, one)
        found = torch.cat(LANGEVIN.mean(*given, time(t)))
        assert torch.allclose(found, matrix[:, start], rtol=1e-12, atol=1e-12)
    for position, gamma in ((0.0, 0.0), (0.0, 0.05), (0.7, 0.05)):
        first = torch.diag(torch.tensor([position, gamma * LANGEVIN.mass], dtype=torch.float64))
        exact = matrix @ first @ matrix.T + noise
        found = LANGEVIN.covariance(time(t), position, gamma)
        # The block exponential keeps 1e-16 of its largest entry, near 10 t; var(x) ~ t^3 is small.
        assert torch.allclose(torch.stack(found), exact[[0, 0, 1], [0, 1, 1]], rtol=1e-7)


def test_langevin_ends_at_its_prior():
    # What is left at the end is of the order of u exp(-u), u = beta t / sqrt(M).
    far = CriticallyDampedLangevin(beta=20.0)
    covariance = torch.stack(far.covariance(time(1.0), 1.0, 0.04))
    assert torch.allclose(covariance, time([1.0, 0.0, far.mass]), atol=1e-12)
    prior = far.sde().prior
    state = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    law = torch.distributions.Normal(0, time([[1.0, 1.0], [0.5, 0.5]]))
    assert torch.allclose(prior.log_prob(state), law.log_prob(state).sum((1, 2)))


@pytest.mark.parametrize("name", ["state", "hybrid"])
def test_langevin_transitions_have_the_score_of_what_they_draw(name):
    generator = torch.Generator().manual_seed(3)
    transition = LANGEVIN.sde().transition if name == "state" else LANGEVIN.hybrid()
    x0 = torch.full((4000, 1), 0.7, dtype=torch.float64)
    start = torch.stack([x0, 0.4 * torch.ones_like(x0)], 1) if name == "state" else x0
    z = torch.randn(4000, 2, 1, generator=generator, dtype=torch.float64)
    t = torch.full((4000,), 0.2, dtype=torch.float64)
    drawn = transition.sample(start, t, lambda slot: z)[:, :, 0]
    matrix, noise = van_loan(0.2)
    if name == "hybrid":
        noise = noise + matrix @ torch.diag(time([0.0, 0.05 * 0.3])) @ matrix.T
    mean = matrix @ time([0.7, 0.4 if name == "state" else 0.0])
    law = torch.distributions.MultivariateNormal(mean, noise)
    # Mean of the log-density of one's own samples is minus the entropy, variance D/2.
    found = law.log_prob(drawn)
    assert_close_to_monte_carlo(found.mean(), -law.entropy(), (1 / 4000) ** 0.5)
    assert_close_to_monte_carlo(drawn.mean(0), mean, (noise.diagonal() / 4000).sqrt())
    exact = -torch.linalg.solve(noise, (drawn - mean).T).T
    assert torch.allclose(transition.score(drawn[:, :, None], start, t)[:, :, 0], exact, rtol=1e-7)


@pytest.mark.parametrize("t", [0.01, 0.3, 1.0])
def test_langevin_mixture_is_the_mixture_of_its_kernels(t):
    state = EXACT.sample(6, 0, t)
    matrix, noise = van_loan(t)
    blocks, means = [], []
    for mean, covariance in zip(MIXTURE.means, MIXTURE._full_covariances(), strict=True):
        first = torch.zeros(4, 4, dtype=torch.float64)
        first[:2, :2], first[2:, 2:] = covariance, 0.05 * 0.3 * torch.eye(2)
        wide = torch.kron(matrix.contiguous(), torch.eye(2, dtype=torch.float64))
        blocks.append(wide @ first @ wide.T + torch.kron(noise, torch.eye(2).double()))
        means.append(wide @ torch.cat([mean, 0 * mean]))
    law = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(MIXTURE.weights),
        torch.distributions.MultivariateNormal(torch.stack(means), torch.stack(blocks)),
    )
    exact = law.log_prob(state.reshape(6, 4))
    assert torch.allclose(EXACT.log_prob(state, time(t)), exact, rtol=1e-9)
    by_autograd = gradient_of(EXACT.log_prob)(state, time(t))
    assert torch.allclose(EXACT.score(state, time(t)), by_autograd, rtol=1e-8, atol=1e-8)
    times = torch.full((6,), t, dtype=torch.float64)
    assert torch.allclose(EXACT.score(state, times), by_autograd, rtol=1e-8, atol=1e-8)
    total = sum(EXACT.log_posterior(label)(state, time(t)).exp() for label in (0, 1))
    assert torch.allclose(total, torch.ones(6).double())


def law_of(states, posterior):
    """What two laws of states are compared by: means, second moments, log-density, class."""
    flat = states.flatten(1)
    products = (flat[:, :, None] * flat[:, None, :]).flatten(1)[
        :, [0, 1, 2, 3, 5, 6, 7, 10, 11, 15]
    ]
    log_prob = EXACT.log_prob(states, time(LANGEVIN.t_min))
    label = posterior(states, time(LANGEVIN.t_min)).exp()
    return torch.cat([flat, products, log_prob[:, None], label[:, None]], 1)


@pytest.mark.parametrize("name", ["reverse", "flow", "guided"])
def test_langevin_reverse_restores_the_mixture(name):
    # 1,000 paths from the exact law at the end. Euler-Maruyama's own bias at 400 steps is about one
    # standard error in the velocity's variance and the log-density, less in the rest (measured with
    # 40,000 paths: at 200 steps twice that).
    sde, n = LANGEVIN.sde(), 1000
    label = 1 if name == "guided" else None
    guidance = gradient_of(EXACT.log_posterior(1)) if name == "guided" else None
    equation = sde.reverse(EXACT.score, guidance)
    solver, steps = ito.EulerMaruyama(), 400
    if name == "flow":
        equation, solver, steps = sde.flow(EXACT.score), ito.RungeKutta("heun"), 60
    run = sample_ito(
        equation,
        solver,
        x=EXACT.sample(n, 5, LANGEVIN.t_max, label),
        steps=steps,
        grid="quadratic",
        seed=1,
    )
    posterior = EXACT.log_posterior(1)
    exact = EXACT.sample(20000, 9, LANGEVIN.t_min, label)
    same_mean(law_of(run.x, posterior), law_of(exact, posterior))
    if name == "guided":
        assert run.network_passes == 2 * run.nfe
        # Without the guidance half of the samples are of the other class.
        assert posterior(run.x, time(LANGEVIN.t_min)).exp().mean() > 0.98


@pytest.mark.slow
def test_a_network_learns_the_velocity_score():
    # Hybrid score matching, then the reverse SDE on what was learned. In W1, against 4,000 exact
    # samples: others are 0.01 to 0.04 away, the exact score's 0.01, a single Gaussian of the same
    # moments 0.38; what these 3,000 training steps reach is 0.09.
    target = GaussianMixture(torch.tensor([[-1.2], [0.9]]), torch.tensor([0.04, 0.12]))
    langevin = CriticallyDampedLangevin()
    hybrid, generator = langevin.hybrid(), torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = torch.nn.Sequential(
            torch.nn.Linear(8, 128),
            torch.nn.SiLU(),
            torch.nn.Linear(128, 128),
            torch.nn.SiLU(),
            torch.nn.Linear(128, 1),
        )

    def velocity_score(state, t):
        t = t.to(state.dtype).reshape(-1, 1).expand(len(state), 1)
        waves = [wave(k * t) for k in (1.5, 3.0) for wave in (torch.sin, torch.cos)]
        # The velocity in units of its own standard deviation, which is small at first.
        spread = langevin.covariance(t, 0.5, langevin.gamma).vv.sqrt().to(state.dtype)
        x, v = state.unbind(1)
        eps = network(torch.cat([x, v / spread, t, t.sqrt(), *waves], 1))
        return -eps / hybrid.velocity_scale(t).to(eps)

    optimiser = torch.optim.Adam(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 3000)
    data = target.sample(20_000, 1)[0]
    for _ in range(3000):
        x0 = data[torch.randint(len(data), (512,), generator=generator)]
        t = langevin.t_min + (1 - langevin.t_min) * torch.rand(512, generator=generator) ** 2
        normal = normals_from(generator, torch.empty(512, 2, 1))
        loss = ito_losses.hybrid_score_matching(velocity_score, hybrid, x0, t, normal).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    run = sample_ito(
        langevin.sde().reverse(langevin.velocity_score(velocity_score)),
        ito.EulerMaruyama(),
        shape=(4000, 2, 1),
        steps=300,
        grid="quadratic",
    )
    exact = target.sample(4000, 5)[0][:, 0]
    distance = (run.x[:, 0, 0].sort().values - exact.sort().values).abs().mean()
    assert distance < 0.15


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
