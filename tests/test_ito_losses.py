"""Score matching for general SDEs: where the exact score is in the span of a few features the loss
is quadratic, its minimum is found by one linear solve, and the exact score is known to be there
within a standard error."""

import pytest
import torch

from sde_diffusion import GaussianMixture
from sde_diffusion.ito import (
    CriticallyDampedLangevin,
    DensityTransition,
    GeometricBrownianMotion,
    LogNormal,
    SquareRootProcess,
    ito_losses,
    normals_from,
)
from sde_diffusion.ito.square_root import GammaMixture
from tests.problems import assert_close_to_monte_carlo

N = 20_000


def minimum(loss, count):
    """Where a quadratic loss ``theta -> (B,)`` is least, and the standard error of each entry.

    Differences of a quadratic over steps of 1 are its derivatives.
    """
    with torch.no_grad():
        basis, rows = torch.eye(count, dtype=torch.float64), range(count)
        origin = loss(0 * basis[0])
        up, down = ([loss(sign * one) for one in basis] for sign in (1, -1))
        slopes = 0.5 * (torch.stack(up) - torch.stack(down))  # (count, B)
        curvature = torch.stack(
            [
                torch.stack([loss(basis[i] + basis[j]) - up[i] - up[j] + origin for j in rows])
                for i in rows
            ]
        )
        hessian = curvature.mean(2)
        theta = -torch.linalg.solve(hessian, slopes.mean(1))
        at = slopes + (curvature * theta[:, None]).sum(1)
        inverse = torch.linalg.inv(hessian)
        return theta, (inverse @ at.cov() @ inverse / N).diagonal().sqrt()


def spanned(theta, features):
    """The score ``sum_i theta_i features_i(x)``."""
    return lambda x, t: sum(weight * one(x) for weight, one in zip(theta, features, strict=True))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


SQUARE_ROOT = SquareRootProcess()
GEOMETRIC = GeometricBrownianMotion(0.2, 0.6)
DATA = LogNormal(0.1, 0.25)
TIMES = torch.full((N,), 0.3, dtype=torch.float64)


def gamma_problem():
    """Gamma data: the score is ``(delta/2 - 1)/x - 1/b_t``."""
    data = GammaMixture(SQUARE_ROOT, torch.tensor([0.4]))
    scale = float(SQUARE_ROOT.scale_at(data.scales, TIMES[0]))
    features = (lambda x: 1 / x, torch.ones_like)
    exact = torch.tensor([0.5 * SQUARE_ROOT.degrees - 1, -1 / scale]).double()
    return SQUARE_ROOT.sde(), data.sample(N, 1), features, exact


def log_normal_problem():
    """Log-normal data: the score is ``(m/v - 1)/x - log(x)/(v x)``."""
    law = GEOMETRIC.marginal(DATA, 0.3)
    x0 = DATA.sample(lambda slot: torch.randn(N, 1, generator=generator(1), dtype=torch.float64))
    features = (lambda x: 1 / x, lambda x: x.log() / x)
    exact = torch.tensor([law.mean / law.variance - 1, -1 / law.variance]).double()
    return GEOMETRIC.sde(), x0, features, exact


@pytest.mark.parametrize("problem", [gamma_problem, log_normal_problem])
@pytest.mark.parametrize("weighted", [False, True])
def test_denoising_with_a_closed_transition_finds_the_score(problem, weighted):
    sde, x0, features, exact = problem()
    metric = ito_losses.diffusion_metric(sde) if weighted else ito_losses.squared_length
    z = [torch.randn(N, 1, generator=generator(k), dtype=torch.float64) for k in range(4)]

    def loss(theta):
        return ito_losses.denoising_score_matching(
            spanned(theta, features), sde.transition, x0, TIMES, lambda slot: z[slot], metric
        )

    theta, stderr = minimum(loss, 2)
    assert_close_to_monte_carlo(theta, exact, stderr)
    assert bool((stderr < 0.1 * exact.abs()).all())  # or the test would accept anything


def test_denoising_by_autograd_is_denoising_in_closed_form():
    sde, x0, features, exact = log_normal_problem()

    def log_prob(x, x0, t):
        return GEOMETRIC.marginal(LogNormal(x0.log(), 0.0), t[:, None]).log_prob(x)

    transitions = (sde.transition, DensityTransition(sde.transition.sample, log_prob))
    losses = [
        ito_losses.denoising_score_matching(
            spanned(exact, features), one, x0, TIMES, normals_from(generator(5), x0)
        )
        for one in transitions
    ]
    assert torch.allclose(*losses, rtol=1e-9)


def test_matching_on_simulated_samples_finds_the_score():
    sde, x0, features, exact = log_normal_problem()

    def loss(theta):
        return ito_losses.simulated_score_matching(
            spanned(theta, features), sde, x0, TIMES, generator(2), steps=60
        )

    theta, stderr = minimum(loss, 2)
    # Euler-Maruyama in 60 steps to t = 0.3 leaves a bias of some per cent of the score.
    assert_close_to_monte_carlo(theta, exact, stderr + 0.01 * exact.abs())
    assert bool((stderr < 0.15 * exact.abs()).all())


def test_hybrid_matching_finds_the_velocity_score():
    langevin = CriticallyDampedLangevin(gamma=0.1)
    target = GaussianMixture(torch.tensor([[0.4]]), torch.tensor([0.3]))
    x0 = target.sample(N, 3, dtype=torch.float64)[0]
    features = (lambda u: u[:, 0], lambda u: u[:, 1], lambda u: torch.ones_like(u[:, 0]))
    z = torch.randn(N, 2, 1, generator=generator(4), dtype=torch.float64)

    def loss(theta):
        return ito_losses.hybrid_score_matching(
            spanned(theta, features), langevin.hybrid(), x0, TIMES, lambda slot: z
        )

    theta, stderr = minimum(loss, 3)
    exact = langevin.exact(target)
    basis = torch.tensor([[[0.0], [0.0]], [[1.0], [0.0]], [[0.0], [1.0]]], dtype=torch.float64)
    constant, x, v = exact.score(basis, TIMES[0])[:, 1, 0]
    expected = torch.stack([x - constant, v - constant, constant])
    assert_close_to_monte_carlo(theta, expected, stderr)
    # The target eps_v has unit variance, so that a score of zero has a loss of 1.
    assert loss(0 * theta).mean().item() == pytest.approx(1.0, abs=0.05)


def test_hybrid_matching_is_denoising_with_the_velocity_alone():
    langevin = CriticallyDampedLangevin()
    x0 = torch.randn(64, 2, generator=generator(), dtype=torch.float64)
    t = torch.linspace(0.05, 1, 64, dtype=torch.float64)
    z = torch.randn(64, 2, 2, generator=generator(1), dtype=torch.float64)
    network = lambda u, t: -u[:, 1]  # noqa: E731
    hybrid = ito_losses.hybrid_score_matching(network, langevin.hybrid(), x0, t, lambda slot: z)
    general = ito_losses.denoising_score_matching(
        langevin.velocity_score(network),
        langevin.hybrid(),
        x0,
        t,
        lambda slot: z,
        ito_losses.diffusion_metric(langevin.sde()),
    )
    size = 2 * langevin.friction * langevin.beta
    assert torch.allclose(general, size * hybrid / langevin.hybrid().velocity_scale(t) ** 2)


def test_losses_have_one_value_per_sample_and_reach_the_network():
    langevin = CriticallyDampedLangevin()
    network = torch.nn.Conv1d(2, 1, 1)
    x0 = torch.randn(5, 7, generator=generator())
    t = torch.linspace(0.1, 1, 5)
    score = langevin.velocity_score(lambda u, t: network(u)[:, 0])
    like = torch.empty(5, 2, 7)
    loss = ito_losses.denoising_score_matching(
        score, langevin.hybrid(), x0, t, normals_from(generator(), like)
    )
    assert loss.shape == (5,)
    loss.mean().backward()
    assert network.weight.grad.abs().sum() > 0
    state = langevin.start(x0, normals_from(generator(), x0))
    matched = ito_losses.simulated_score_matching(
        score, langevin.sde(), state, t, generator(), steps=3, projections=2
    )
    assert matched.shape == (5,)
