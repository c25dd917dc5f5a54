"""A chain's variational bound against closed forms, quadrature, and the continuous bound."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor, nn

from sde_diffusion import (
    VPSDE,
    EpsModel,
    GaussianMixture,
    NoiseLevel,
    Prediction,
    TabulatedVPSDE,
)
from sde_diffusion.discrete_bound import ChainTimes, VLBLoss, decoder_nll, vlb
from sde_diffusion.losses import simple_loss
from sde_diffusion.objectives import named_objective
from tests.problems import SHORT_BETAS, assert_close_to_monte_carlo

CHAIN = TabulatedVPSDE.from_betas(SHORT_BETAS)
SPREAD = 0.4


def gaussian_score(x: Tensor, level: NoiseLevel) -> Prediction:
    """Exact for data ~ N(0, SPREAD^2 I), any event."""
    shape = level.sigma.shape + (1,) * (x.ndim - level.sigma.ndim)
    total = (level.alpha * SPREAD) ** 2 + level.sigma**2
    return Prediction.from_eps(x, level, (level.sigma / total).reshape(shape).to(x) * x)


def gaussian_kl(m0, v0, m1, v1):
    return 0.5 * (np.log(v1 / v0) - 1 + (v0 + (m0 - m1) ** 2) / v1)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_every_kl_of_a_gaussian_is_its_closed_form(variance: str) -> None:
    """In the chain's own letters (Ho et al. 2020, eq. 6-7), the expectation over the noise by
    Gauss-Hermite quadrature: the integrand is a square, for which 8 nodes are exact."""
    x0 = torch.tensor([[0.7], [-0.2]])
    draws = 1500
    bound = vlb(gaussian_score, CHAIN, x0, variance=variance, draws=draws, seed=1, chunk=50_000)
    beta = SHORT_BETAS.numpy()
    abar = np.cumprod(1 - beta)
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    weights = weights / weights.sum()
    for row, value in enumerate(x0[:, 0].double().numpy()):
        end = gaussian_kl(np.sqrt(abar[-1]) * value, 1 - abar[-1], 0.0, 1.0)
        assert float(bound.prior[row]) == pytest.approx(end, rel=1e-6)
        for i in range(1, len(beta)):
            x = np.sqrt(abar[i]) * value + np.sqrt(1 - abar[i]) * nodes
            found = np.sqrt(abar[i]) * SPREAD**2 / (abar[i] * SPREAD**2 + 1 - abar[i]) * x
            keep = np.sqrt(1 - beta[i]) * (1 - abar[i - 1]) / (1 - abar[i])
            pull = np.sqrt(abar[i - 1]) * beta[i] / (1 - abar[i])
            tilde = beta[i] * (1 - abar[i - 1]) / (1 - abar[i])
            model_variance = tilde if variance == "small" else beta[i]
            kl = gaussian_kl(
                keep * x + pull * value, tilde, keep * x + pull * found, model_variance
            )
            mean = (weights * kl).sum()
            spread = math.sqrt((weights * kl**2).sum() - mean**2)
            assert_close_to_monte_carlo(
                bound.kl[row, i - 1], mean, spread / math.sqrt(draws) + 1e-6 * mean
            )


def test_the_standard_error_over_draws_is_that_of_the_total() -> None:
    """Its square over 40 seeds is the variance that the 40 totals show (chi-squared, 39 degrees:
    within a factor 2 but for one in 10,000)."""
    x0 = torch.tensor([[0.3, -0.5]])
    runs = [vlb(gaussian_score, CHAIN, x0, draws=20, seed=seed) for seed in range(40)]
    shown = torch.stack([run.total for run in runs]).var().item()
    told = np.mean([run.stderr(population=False) ** 2 for run in runs])
    assert 0.5 < told / shown < 2.0


@pytest.mark.parametrize("bins", [2, 17, 256])
def test_the_decoder_is_the_mass_of_the_bin(bins: int) -> None:
    """Against integrals of the density by scipy, the ends open; and all bins make one."""
    centres = torch.linspace(-1, 1, bins)
    half = 1 / (bins - 1)
    for mean, std in ((0.1, 0.3), (-0.97, 0.02), (1.3, 0.5)):
        nll = decoder_nll(centres[:, None], torch.full((bins, 1), mean), torch.tensor(std), bins)
        assert float((-nll).exp().sum()) == pytest.approx(1, abs=1e-6)
        nearest = int((centres - mean).abs().argmin())
        for k in {0, nearest, bins - 1}:
            low = -math.inf if k == 0 else float(centres[k]) - half
            high = math.inf if k == bins - 1 else float(centres[k]) + half
            reach = 30 * std  # beyond it the density is below 1e-190
            low, high = max(low, mean - reach), min(high, mean + reach)
            if low >= high:
                continue  # the tails have a test of their own
            mass, _ = integrate.quad(
                stats.norm(mean, std).pdf,
                low,
                high,
                points=[mean] if low < mean < high else None,
                epsabs=0,
                epsrel=1e-10,
                limit=200,
            )
            # Centres are float32: 6e-8 of a bin's place, on a density that changes by e^(z^2/2).
            assert float(nll[k]) == pytest.approx(-math.log(mass), rel=1e-4, abs=1e-6)


def test_a_bin_far_in_the_tail_keeps_its_digits_and_its_gradient() -> None:
    """200 standard deviations off: against the tail's asymptotic series, and a finite gradient."""
    x0 = torch.tensor([[-1.0], [0.5], [1.0]], dtype=torch.float64)
    mean = torch.tensor([[1.0], [-0.5], [-1.0]], dtype=torch.float64, requires_grad=True)
    nll = decoder_nll(x0, mean, torch.tensor(0.01), 256)
    z = (torch.tensor([2.0, 1.0, 2.0], dtype=torch.float64) - 1 / 255) / 0.01
    tail = 0.5 * z**2 + z.log() + 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(nll.detach(), tail, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(nll.sum(), mean)
    torch.testing.assert_close(
        gradient[:, 0], z * torch.tensor([1, -1, -1]) / 0.01, rtol=1e-3, atol=0
    )


def chain_of(sde: VPSDE, steps: int) -> TabulatedVPSDE:
    """The discrete chain with the SDE's own alpha at i / N."""
    times = torch.arange(steps + 1, dtype=torch.float64) / steps
    log_abar = 2 * sde.at(times.clamp_min(1e-300)).alpha.log()
    return TabulatedVPSDE.from_betas(-torch.expm1(log_abar.diff()))


def test_the_bound_of_the_exact_score_lies_above_the_entropy_and_near_it() -> None:
    """Data on four of eight brightness levels with unequal probabilities: its entropy is the best
    that any model reaches. The exact score's bound stays above it and, with the posterior's own
    variance, closes in with more steps."""
    values = torch.tensor([[-1.0], [-3 / 7], [1 / 7], [1.0]])
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    target = GaussianMixture(values, torch.zeros(4), weights)
    entropy = float(-(weights * weights.log()).sum())
    gaps = {}
    for steps in (50, 400):
        chain = chain_of(VPSDE(), steps)
        for variance in ("small", "large"):
            bound = vlb(
                target.score_fn(chain),
                chain,
                values,
                variance=variance,
                bins=8,
                draws=200,
                seed=2,
                chunk=50_000,
            )
            spread = float((weights**2 * bound.noise_variance).sum().sqrt())
            gaps[steps, variance] = float((weights * bound.total).sum()) - entropy
            assert gaps[steps, variance] > -3 * spread
    assert gaps[400, "small"] < 0.35 * gaps[50, "small"]
    assert gaps[400, "small"] < 0.1


def test_a_finer_chain_approaches_the_likelihood_weighted_integral() -> None:
    """Sum of KLs over [0.2, 1] against ``1/2 int g^2 E||s_theta - s||^2 dt`` (Song et al. 2021,
    theorem 1) by quadrature; the error falls as 1/N: by a half when N doubles."""
    sde, value = VPSDE(), 0.7

    def error(level: NoiseLevel) -> Tensor:
        """E ||eps - eps_theta||^2 at x0 = value, exact."""
        total = (level.alpha * SPREAD) ** 2 + level.sigma**2
        return (level.alpha * SPREAD) ** 4 / total**2 + (level.sigma * level.alpha * value) ** 2 / (
            total**2
        )

    t = torch.linspace(0.2, 1, 20001, dtype=torch.float64)
    level = sde.at(t)
    continuous = float(torch.trapezoid(0.5 * level.g2 / level.sigma**2 * error(level), t))
    objective = named_objective("likelihood", EpsModel(nn.Identity(), sde), sde)
    whole = torch.linspace(sde.t_min, 1, 200_001, dtype=torch.float64)
    at = sde.at(whole)
    integral = float(torch.trapezoid(0.5 * at.g2 / at.sigma**2 * error(at), whole))

    class Exact(nn.Module):
        def forward(self, x: Tensor, level: NoiseLevel, label: None) -> Prediction:
            return gaussian_score(x, level)

    n = 200_000
    noise = torch.randn(n, 1, generator=torch.Generator().manual_seed(3))
    drawn = sde.at(objective.times(n, sde, torch.Generator().manual_seed(4)))
    losses = objective.loss(Exact(), torch.full((n, 1), value), None, drawn, noise)
    estimate = 0.5 * (1 - sde.t_min) * losses.mean()
    assert_close_to_monte_carlo(
        estimate, integral, 0.5 * float(losses.std()) / math.sqrt(n)
    )  # (t_max - t_min) D / 2 of the objective's mean, as its docstring says

    misses = []
    for steps in (50, 100, 200):
        chain = chain_of(sde, steps)
        first = steps // 5
        one = vlb(gaussian_score, chain, torch.tensor([[value]]), draws=1)
        assert one.kl.shape == (1, steps - 1)
        beta = torch.tensor(chain.betas, dtype=torch.float64)
        abar = (1 - beta).cumprod(0)
        tilde = beta[1:] * (1 - abar[:-1]) / (1 - abar[1:])
        weight = beta[1:] ** 2 / (2 * tilde * (1 - beta[1:]) * (1 - abar[1:]))
        exact = weight * error(chain.at(chain.times[1:]))
        misses.append(float(exact[first - 1 :].sum()) - continuous)
    assert misses[0] / misses[1] == pytest.approx(2, rel=0.1)
    assert misses[1] / misses[2] == pytest.approx(2, rel=0.1)
    assert abs(misses[2]) < 0.02 * continuous


def test_results_do_not_depend_on_chunks_or_on_other_samples() -> None:
    x0 = torch.linspace(-1, 1, 24).reshape(6, 1, 2, 2)
    whole = vlb(gaussian_score, CHAIN, x0, draws=2, seed=5)
    for chunk in (1, 7, 45):
        assert torch.equal(
            vlb(gaussian_score, CHAIN, x0, draws=2, seed=5, chunk=chunk).kl, whole.kl
        )
    first = vlb(gaussian_score, CHAIN, x0[:2], draws=2, seed=5)
    assert torch.equal(first.total, whole.total[:2])
    assert not torch.equal(vlb(gaussian_score, CHAIN, x0, draws=2, seed=6).kl, whole.kl)


def test_clipping_lowers_a_bad_models_terms_and_leaves_a_good_ones() -> None:
    x0 = torch.tensor([[1.0, -1.0], [0.2, 0.1]])

    def overshooting(x: Tensor, level: NoiseLevel) -> Prediction:
        return Prediction.from_x0(x, level, 1.5 * gaussian_score(x, level).x0)

    plain, clipped = (vlb(overshooting, CHAIN, x0, clip=clip, draws=20) for clip in (False, True))
    assert bool((clipped.kl <= plain.kl + 1e-6).all())  # float32 rounding of eps from x0
    assert float(clipped.kl.sum()) < 0.99 * float(plain.kl.sum())

    def modest(x: Tensor, level: NoiseLevel) -> Prediction:
        return Prediction.from_x0(x, level, gaussian_score(x, level).x0.clamp(-0.5, 0.5))

    plain, clipped = (vlb(modest, CHAIN, x0, clip=clip) for clip in (False, True))
    torch.testing.assert_close(clipped.total, plain.total, rtol=1e-5, atol=0)


def test_labels_go_with_their_samples() -> None:
    """A conditional bound is each class's own."""
    target = GaussianMixture(
        torch.tensor([[-0.5], [0.5]]), torch.tensor([0.02, 0.02]), labels=torch.tensor([0, 1])
    )
    x0, y = torch.tensor([[-0.4], [0.6], [0.5]]), torch.tensor([0, 1, 1])
    model = target.model(CHAIN)
    both = vlb(model, CHAIN, x0, label=y, seed=1, chunk=7)
    for k in (0, 1):
        alone = vlb(target.score_fn(CHAIN, label=k), CHAIN, x0, seed=1)
        torch.testing.assert_close(both.total[y == k], alone.total[y == k])
    null = vlb(model, CHAIN, x0, seed=1)
    assert float(null.total.mean()) > float(both.total.mean())


def test_the_report_adds_up() -> None:
    bound = vlb(gaussian_score, CHAIN, torch.linspace(-1, 1, 12).reshape(4, 3))
    report = bound.report()
    parts = [report[f"{name} (nats)"] for name in ("L_0", "L_1..L_{N-1}", "L_N")]
    assert sum(parts) == pytest.approx(report["total (nats)"])
    assert report["total (bits/dim)"] == pytest.approx(float(bound.bits_per_dim.mean()))
    assert float(bound.terms.sum()) == pytest.approx(report["total (nats)"])
    assert report["total (bits/dim)"] == pytest.approx(report["total (nats)"] / 3 / math.log(2))


@pytest.mark.parametrize("variance", ["small", "large"])
def test_the_training_loss_is_the_bound_without_its_constant_in_expectation(variance: str) -> None:
    x0 = torch.tensor([[0.6, -1.0]])
    expected = vlb(gaussian_score, CHAIN, x0, variance=variance, bins=16, draws=500, chunk=20_000)

    class Exact(nn.Module):
        def forward(self, x: Tensor, level: NoiseLevel, label: None) -> Prediction:
            return gaussian_score(x, level)

    n = 40_000
    objective = named_objective(
        "vlb", EpsModel(nn.Identity(), CHAIN), CHAIN, variance=variance, bins=16
    )
    # Times one at a time would be independent; stratified they vary less, so the error is an
    # upper bound.
    level = CHAIN.at(objective.times(n, CHAIN, torch.Generator().manual_seed(7)))
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(8))
    loss = objective.loss(Exact(), x0.expand(n, 2), None, level, noise)
    spread = math.hypot(float(loss.std()) / math.sqrt(n), expected.stderr(population=False) / 2)
    assert_close_to_monte_carlo(
        loss.double().mean(), (expected.decoder + expected.kl.sum(1)).mean() / 2, spread
    )
    hybrid = VLBLoss(CHAIN, variance, 16, simple=1.0, weight=0.25)
    both = hybrid(Exact(), x0.expand(n, 2), None, level, noise)
    plain = simple_loss(Exact(), x0.expand(n, 2), None, level, noise)
    torch.testing.assert_close(both, plain + 0.25 * loss)


def test_the_loss_has_finite_gradients_at_every_step() -> None:
    chain = TabulatedVPSDE.from_betas(torch.linspace(1e-4, 0.02, 1000))
    net = nn.Linear(2, 2)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net

        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            return self.inner(x)

    nn.init.normal_(net.weight, std=3.0, generator=torch.Generator().manual_seed(0))
    model = EpsModel(Net(), chain)
    loss = named_objective("vlb", model, chain)
    level = chain.at(ChainTimes(chain)(1000, chain, torch.Generator().manual_seed(1)))
    assert level.t.unique().numel() == 1000
    noise = torch.randn(1000, 2, generator=torch.Generator().manual_seed(2))
    x0 = torch.tensor([[-1.0, 1.0]]).expand(1000, 2)
    loss.loss(model, x0, None, level, noise).mean().backward()
    assert bool(net.weight.grad.isfinite().all())
    assert float(net.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sde": VPSDE()}, "vlb needs a discrete chain, got VPSDE"),
        ({"x0": torch.full((2, 1), 2.0)}, r"x0 must lie in \[-1, 1\], got a value of size 2"),
        ({"x0": torch.full((2, 1), math.nan)}, r"x0 must lie in \[-1, 1\]"),
        ({"x0": torch.zeros(0, 1)}, "x0 must hold samples"),
        ({"variance": "smal"}, "unknown variance 'smal'. Did you mean 'small'"),
        ({"bins": 1}, "bins must be at least 2"),
        ({"draws": 0}, "draws must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message) -> None:
    given = {"sde": CHAIN, "x0": torch.zeros(2, 1)} | arguments
    with pytest.raises(ValueError, match=message):
        vlb(gaussian_score, given.pop("sde"), given.pop("x0"), **given)
