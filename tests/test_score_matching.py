"""Explicit and sliced score matching against closed forms on Gaussians, and against DSM."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from sde_diffusion import VESDE, VPSDE, EpsModel, GaussianMixture
from sde_diffusion.losses import perturbed, simple_loss
from sde_diffusion.networks import MLP, UNet
from sde_diffusion.objectives import parametrized
from sde_diffusion.score_matching import (
    explicit_loss,
    explicit_score_matching,
    sliced_score_matching,
)
from tests.problems import assert_close_to_monte_carlo

MEAN = torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64)
FACTOR = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.5, 0.0], [-0.3, 0.2, 0.8]], dtype=torch.float64)
PRECISION = torch.linalg.inv(FACTOR @ FACTOR.T)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian_samples(n: int, seed: int = 0) -> Tensor:
    noise = torch.randn(n, 3, generator=generator(seed), dtype=torch.float64)
    return MEAN + noise @ FACTOR.T


def cubic(x: Tensor) -> Tensor:
    """A score whose Jacobian is neither constant nor symmetric."""
    rolled = x.flatten(1).roll(1, 1).reshape(x.shape)
    return -(x**3) / 4 + torch.sin(rolled) * x


@pytest.mark.parametrize("event", [(1,), (4,), (1, 2, 2)], ids=str)
def test_explicit_score_matching_has_the_exact_trace(event) -> None:
    """The trace of ``-x^3 / 4 + sin(x_prev) x`` by hand."""
    x = torch.randn(5, *event, generator=generator(), dtype=torch.float64)
    flat = x.flatten(1)
    before = flat.roll(1, 1)
    trace = (-0.75 * flat**2 + torch.sin(before)).sum(1)
    if event == (1,):  # an entry that is its own predecessor
        trace = trace + (torch.cos(flat) * flat).sum(1)
    expected = trace + 0.5 * cubic(x).square().flatten(1).sum(1)
    torch.testing.assert_close(explicit_score_matching(cubic, x), expected)


def test_its_value_at_the_true_score_of_a_gaussian_is_minus_half_the_fisher_information() -> None:
    """``E[tr(-P) + |P (x - m)|^2 / 2] = -tr(P) / 2`` with P the precision."""
    x = gaussian_samples(20_000)
    loss = explicit_score_matching(lambda x: -(x - MEAN) @ PRECISION, x).detach()
    spread = float(loss.std()) / math.sqrt(len(x))
    assert_close_to_monte_carlo(loss.mean(), -0.5 * float(PRECISION.trace()), spread)


@pytest.mark.parametrize("kind", ["explicit", "sliced", "sliced, plain"])
def test_the_gradient_vanishes_at_the_true_score_of_a_gaussian(kind: str) -> None:
    """The gradient by the parameters (A, m) of ``s = -A (x - m)``, sample by sample, so that its
    mean can be held against its standard error; away from the truth it does not vanish."""
    n = 4000
    x = gaussian_samples(n, 1)

    def gradients(matrix: Tensor, mean: Tensor) -> Tensor:
        matrices = matrix.expand(n, 3, 3).clone().requires_grad_()
        means = mean.expand(n, 3).clone().requires_grad_()

        def score(state: Tensor) -> Tensor:
            return -torch.einsum("bij,bj->bi", matrices, state - means)

        if kind == "explicit":
            loss = explicit_score_matching(score, x)
        else:
            loss = sliced_score_matching(
                score, x, generator(2), 2, variance_reduced=kind == "sliced"
            )
        parts = torch.autograd.grad(loss.sum(), [matrices, means])
        return torch.cat([parts[0].flatten(1), parts[1]], 1)

    found = gradients(PRECISION, MEAN)
    assert_close_to_monte_carlo(found.mean(0), 0.0, found.std(0) / math.sqrt(n))
    wrong = gradients(2.0 * PRECISION, MEAN)
    assert float((wrong.mean(0).abs() / (wrong.std(0) / math.sqrt(n))).max()) > 10


@pytest.mark.parametrize("variance_reduced", [True, False])
def test_sliced_is_an_unbiased_estimate_of_explicit(variance_reduced: bool) -> None:
    x = torch.randn(3, 1, 2, 2, generator=generator(1), dtype=torch.float64)
    copies = 20_000
    repeated = x.repeat_interleave(copies, 0)
    loss = sliced_score_matching(
        cubic, repeated, generator(2), variance_reduced=variance_reduced
    ).reshape(3, copies)
    expected = explicit_score_matching(cubic, x)
    assert_close_to_monte_carlo(loss.mean(1), expected, loss.std(1) / math.sqrt(copies))


def test_more_projections_vary_less() -> None:
    x = torch.randn(1, 4, generator=generator(3), dtype=torch.float64).expand(4000, 4)
    one, four = (
        float(sliced_score_matching(cubic, x, generator(4), k).detach().var()) for k in (1, 4)
    )
    assert one / four == pytest.approx(4, rel=0.3)  # 3 standard errors of a ratio of variances


def test_a_diagonal_jacobian_is_sliced_exactly() -> None:
    x = torch.randn(6, 5, generator=generator(5), dtype=torch.float64)
    sliced = sliced_score_matching(lambda x: -(x**3), x, generator())
    plain = sliced_score_matching(lambda x: -(x**3), x, generator(), variance_reduced=False)
    assert float((plain - sliced).detach().abs().min()) > 0.01
    torch.testing.assert_close(sliced, explicit_score_matching(lambda x: -(x**3), x))


def test_denoising_differs_from_explicit_score_matching_by_its_constant() -> None:
    """For any score of noised data, exact or not, ``DSM - ESM = D / (2 sigma^2)`` (Vincent 2011,
    appendix), on the same samples."""
    target = GaussianMixture(torch.tensor([[-0.8, 0.3], [0.9, -0.2]]), torch.tensor([0.1, 0.3]))
    sde = VESDE(sigma_min=0.1, sigma_max=2.0)
    level = sde.at(0.5)
    n = 20_000
    x0, _ = target.sample(n, seed=1, dtype=torch.float64)
    noise = torch.randn(n, 2, generator=generator(2), dtype=torch.float64)
    x = perturbed(x0, level, noise)
    exact = target.score_fn(sde)
    for score in (lambda x: exact(x, level).score, lambda x: -0.7 * x, cubic):
        denoising = 0.5 * (score(x) + noise / level.sigma).square().sum(1)
        difference = (denoising - explicit_score_matching(score, x)).detach()
        spread = float(difference.std()) / math.sqrt(n)
        assert_close_to_monte_carlo(difference.mean(), 1 / float(level.sigma) ** 2, spread)


@pytest.mark.parametrize("kind", ["eps", "v", "edm"])
def test_the_explicit_loss_is_the_simple_one_up_to_its_constants(kind: str) -> None:
    """``E[simple / 2 - explicit] = 1 / 2`` at every level and for any network, over samples with
    levels of their own."""
    sde = VPSDE()
    net = MLP((2,), width=8, blocks=1).double()
    nn.init.normal_(net.outlet.weight, generator=generator())
    model = parametrized(kind, net, sde)
    n = 6000
    x0 = torch.randn(n, 2, generator=generator(1), dtype=torch.float64).sign() / 2
    noise = torch.randn(n, 2, generator=generator(2), dtype=torch.float64)
    level = sde.at(torch.linspace(0.05, 1, n, dtype=torch.float64))
    with torch.no_grad():
        explicit = explicit_loss(model, x0, None, level, noise)
        difference = 0.5 * simple_loss(model, x0, None, level, noise) - explicit
    assert_close_to_monte_carlo(difference.mean(), 0.5, float(difference.std()) / math.sqrt(n))


def test_an_image_network_is_trained_by_both() -> None:
    """A U-Net's trace by the Jacobian against the mean of many slices, and finite gradients."""
    sde = VESDE()
    net = UNet((1, 4, 4), channels=(8,), blocks=1)
    for weight in net.parameters():
        nn.init.normal_(weight, std=0.3, generator=generator())
    level = sde.at(0.6)
    x = torch.randn(2, 1, 4, 4, generator=generator(1))

    def score(x: Tensor) -> Tensor:
        return EpsModel(net, sde)(x, level).score

    loss = explicit_score_matching(score, x)
    loss.sum().backward()
    assert all(bool(w.grad.isfinite().all()) for w in net.parameters() if w.grad is not None)
    many = sliced_score_matching(score, x.repeat(2000, 1, 1, 1), generator(2)).detach()
    many = many.reshape(2000, 2)
    assert_close_to_monte_carlo(many.mean(0), loss.detach(), many.std(0) / math.sqrt(2000))


def test_a_networks_gradients_agree_with_finite_differences_and_with_sliced() -> None:
    """Of both losses by one weight, through a model; sliced with every pair of signs is exact in
    two dimensions."""
    sde = VESDE()
    net = MLP((2,), width=8, blocks=1).double()
    nn.init.normal_(net.outlet.weight, generator=generator())
    model, level = EpsModel(net, sde), sde.at(0.6)
    x = torch.randn(4, 2, generator=generator(1), dtype=torch.float64)

    def score(x: Tensor) -> Tensor:
        return model(x, level).score

    def loss() -> Tensor:
        return explicit_score_matching(score, x).sum()

    weight = net.outlet.weight
    (gradient,) = torch.autograd.grad(loss(), weight)
    width = 1e-5
    with torch.no_grad():
        weight[0, 0] += width
        above = loss()
        weight[0, 0] -= 2 * width
        below = loss()
        weight[0, 0] += width
    assert float((above - below) / (2 * width)) == pytest.approx(float(gradient[0, 0]), rel=1e-6)
    many = x.repeat(5000, 1)
    sliced = sliced_score_matching(score, many, generator(2)).sum() / 5000
    (estimate,) = torch.autograd.grad(sliced, weight)
    scale = float(gradient.norm())
    assert float((estimate - gradient).norm()) < 0.05 * scale


def test_without_gradients_the_value_is_the_same_and_holds_no_graph() -> None:
    x = torch.randn(4, 3, generator=generator(), dtype=torch.float64)
    with_graph = sliced_score_matching(cubic, x, generator(1), 3)
    with torch.no_grad():
        without = sliced_score_matching(cubic, x, generator(1), 3)
        explicit = explicit_score_matching(cubic, x)
    assert not without.requires_grad
    torch.testing.assert_close(without, with_graph.detach())
    torch.testing.assert_close(explicit, explicit_score_matching(cubic, x).detach())


def test_what_does_not_fit_is_refused() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"score must return x's shape \(2, 3\), got \(2, 1\)"):
        explicit_score_matching(lambda x: x.sum(1, keepdim=True), x)
    with pytest.raises(ValueError, match="score must return x's shape"):
        sliced_score_matching(lambda x: x.sum(1), x, generator())
    with pytest.raises(ValueError, match="projections must be at least 1"):
        sliced_score_matching(lambda x: x, x, generator(), 0)
