"""Critically damped Langevin diffusion: its kernel, transitions, reverse and losses against
independent formulas."""

import pytest
import torch

from sde_diffusion import GaussianMixture
from sde_diffusion.ito import CriticallyDampedLangevin, gradient_of, ito_losses, normals_from
from solvers import ito, sample_ito
from tests.ito_laws import EXACT, LANGEVIN, MIXTURE, same_mean, time
from tests.problems import assert_close_to_monte_carlo


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
