"""Guidance by measurements and energies: against closed forms, and one by one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sde_diffusion import (
    Downsampling,
    EpsModel,
    GaussianMixture,
    Inpainting,
    Matrix,
    NoiseLevel,
    Prediction,
    ScoreFn,
    autoguided,
    below,
    classifier_free_guided,
    classifier_guided,
    dps_guided,
    energy_guided,
    named_target,
    noised_energy_guided,
    pigdm_guided,
    thresholded,
)
from sde_diffusion.prediction import cost_of, select
from solvers import Ancestral, sample
from tests.problems import SDES, inner_times
from tests.restored import KNOWN, NORMAL, STD, Y, states

# --- against closed forms ------------------------------------------------------------------------


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("noise_std", [0.0, 0.3])
def test_pigdm_is_exact_for_a_normal_prior(name: str, noise_std: float) -> None:
    sde = SDES[name]
    generator = torch.Generator().manual_seed(2)
    matrix = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    for measurement in (
        Inpainting(torch.tensor([1, 0, 1, 0]), noise_std),
        Downsampling(2, noise_std),
        Matrix(matrix, noise_std),
    ):
        y = measurement.draw(NORMAL.sample(1, 3, dtype=torch.float64)[0], 0)
        exact = NORMAL.posterior(measurement, y[0]).score_fn(sde)
        guided = pigdm_guided(NORMAL.score_fn(sde), measurement, y, data_std=STD)
        for t in inner_times(sde, 4):
            x, level = states(sde, t), sde.at(t)
            expected = exact(x, level).score
            # Without noise the posterior has no width in some directions, and at t_min the score
            # there is a difference of terms 1 / sigma^2: 1e-7 of the largest.
            difference = (guided(x, level).score - expected).detach()
            assert float(difference.abs().max()) < 1e-7 * float(expected.abs().max())


@pytest.mark.parametrize("name", ["vp", "ve", "subvp"])
def test_dps_is_the_gradient_of_the_norm_in_its_units(name: str) -> None:
    """On a normal prior x0 = m + k (x - alpha m), so that the gradient is -k A^T r / |r|."""
    sde = SDES[name]
    guided = dps_guided(NORMAL.score_fn(sde), KNOWN, Y, scale=0.7, data_std=STD)
    for t in inner_times(sde, 3):
        x, level = states(sde, t), sde.at(t)
        total = STD**2 * level.alpha**2 + level.sigma**2
        k = STD**2 * level.alpha / total
        x0 = NORMAL.means + k * (x - level.alpha * NORMAL.means)
        residual = KNOWN.adjoint(Y - KNOWN(x0))
        spread = STD**2 * level.sigma**2 / total + 0.1**2
        zeta = 0.7 * math.sqrt(2) / spread.sqrt()
        expected = zeta * k * residual / residual.norm(dim=1, keepdim=True)
        found = guided(x, level).score - NORMAL.score_fn(sde)(x, level).score
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", SDES)
def test_energies_against_closed_forms(name: str) -> None:
    """A linear energy of x0 shifts a Gaussian's mean; a quadratic one of the estimate has the
    gradient k (x0 - a) by the chain rule; one of the state adds its own gradient."""
    sde = SDES[name]
    score_fn = NORMAL.score_fn(sde)
    slope = torch.tensor([0.4, -1.0, 0.0, 0.3], dtype=torch.float64)
    linear = energy_guided(score_fn, lambda x0: (slope * x0).sum(1), scale=2.0)
    shifted = GaussianMixture(
        NORMAL.means - 2.0 * STD**2 * slope, torch.tensor([STD**2], dtype=torch.float64)
    ).score_fn(sde)
    quadratic = energy_guided(score_fn, lambda x0: 0.5 * (x0 - slope).square().sum(1), scale=3.0)
    of_state = noised_energy_guided(
        score_fn, lambda x, level: 0.5 * (x - slope).square().sum(1), scale=torch.tensor(3.0)
    )
    for t in inner_times(sde, 3):
        x, level = states(sde, t), sde.at(t)
        score = score_fn(x, level).score
        torch.testing.assert_close(
            linear(x, level).score, shifted(x, level).score, rtol=1e-9, atol=1e-9
        )
        k = STD**2 * level.alpha / (STD**2 * level.alpha**2 + level.sigma**2)
        x0 = NORMAL.means + k * (x - level.alpha * NORMAL.means)
        # At t_min x0 is a difference of terms 1 / sigma apart: 1e-9 of the score's size.
        torch.testing.assert_close(
            quadratic(x, level).score, score - 3.0 * k * (x0 - slope), rtol=1e-8, atol=1e-8
        )
        torch.testing.assert_close(
            of_state(x, level).score, score - 3.0 * (x - slope), rtol=1e-9, atol=1e-9
        )


def test_a_quadratic_energy_of_the_state_samples_the_product() -> None:
    """E = log p(x_t) - log p(x_t | y), the exact posterior's: what comes out is the posterior."""
    sde = SDES["vp"]
    target = named_target("ring")
    posterior = target.posterior(torch.tensor([[1.0, 0.0]]), torch.tensor([1.0]), noise_std=0.3)

    def energy(x: Tensor, level: NoiseLevel) -> Tensor:
        return target.log_prob_at(x, level) - posterior.log_prob_at(x, level)

    guided = noised_energy_guided(target.score_fn(sde), energy)
    x = states(sde, 0.4, dimension=2)
    torch.testing.assert_close(
        guided(x, sde.at(0.4)).score, posterior.score_fn(sde)(x, sde.at(0.4)).score
    )


# --- every method, per sample --------------------------------------------------------------------


def guided_by(method: str, sde: Any, y: Tensor, scale: Any = 1.0) -> ScoreFn:
    score_fn = named_target("gmm16").score_fn(sde)
    half = Inpainting(torch.arange(16) < 8, noise_std=0.1)
    if method == "dps":
        return dps_guided(score_fn, half, y, scale)
    if method == "pigdm":
        return pigdm_guided(score_fn, half, y, scale)
    if method == "energy":
        return energy_guided(score_fn, lambda x0: x0.square().sum(1), scale)
    if method == "noised energy":
        return noised_energy_guided(score_fn, lambda x, level: x.square().sum(1), scale)
    if method == "autoguidance":
        return autoguided(score_fn, _Wider(sde), scale)
    if method == "classifier":
        target = named_target("gmm16")
        return classifier_guided(score_fn, target.classifier(sde), 3, scale)
    assert method == "cfg"
    return classifier_free_guided(named_target("gmm16").model(sde), 3, scale)


class _Wider:
    """A worse score: of the mixture with noise of 0.3 more."""

    def __init__(self, sde: Any) -> None:
        self.exact = named_target("gmm16").score_fn(sde)

    def __call__(self, x: Tensor, level: NoiseLevel) -> Prediction:
        wider = level._replace(sigma=(level.sigma**2 + (0.3 * level.alpha) ** 2).sqrt())
        return Prediction.from_score(x, level, self.exact(x, wider).score)


METHODS = ("dps", "pigdm", "energy", "noised energy", "autoguidance", "classifier", "cfg")


@pytest.mark.parametrize("method", METHODS)
def test_batched_equals_one_by_one_and_scales_may_be_functions(method: str) -> None:
    sde = SDES["vp"]
    x0, _ = named_target("gmm16").sample(5, 3, dtype=torch.float64)
    y = Inpainting(torch.arange(16) < 8, noise_std=0.1).draw(x0, 0)
    scales = torch.tensor([0.5, 1.0, 2.0, -1.0, 3.0], dtype=torch.float64)
    guided = guided_by(method, sde, y, scales)
    run = sample(guided, sde, Ancestral(), shape=(5, 16), steps=6, dtype=torch.float64)
    for i in range(5):
        index = torch.tensor([i])
        alone = sample(
            select(guided, index),
            sde,
            Ancestral(),
            shape=(1, 16),
            steps=6,
            sample_ids=[i],
            dtype=torch.float64,
        )
        assert (alone.x[0] == run.x[i]).all()

    x, level = states(sde, 0.3, 5, 16), sde.at(torch.full((5,), 0.3, dtype=torch.float64))
    by_function = guided_by(method, sde, y, lambda level: 2 * level.sigma)(x, level).score
    by_number = guided_by(method, sde, y, 2 * level.sigma)(x, level).score
    assert (by_function == by_number).all()
    assert (
        guided_by(method, sde, y, lambda level: 1.0)(x, level).score
        - guided_by(method, sde, y, 1.0)(x, level).score
    ).abs().max() < 1e-9
    with pytest.raises(ValueError, match="must be finite"):
        guided_by(method, sde, y, torch.tensor([math.nan]))


@pytest.mark.parametrize("method", ["dps", "pigdm", "energy"])
def test_gradients_flow_where_none_are_recorded(method: str) -> None:
    sde = SDES["ve"]
    y = torch.zeros(1, 16)
    guided, level = guided_by(method, sde, y), sde.at(0.5)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    with torch.enable_grad():
        expected = guided(x, level).score.detach()
    with torch.no_grad():
        found = guided(x, level).score
        assert not found.requires_grad
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with torch.inference_mode():
        torch.testing.assert_close(guided(x.clone(), level).score, expected, rtol=0, atol=0)
    assert found.dtype == torch.float32


def test_guidance_can_itself_be_differentiated() -> None:
    sde = SDES["vp"]
    level = sde.at(0.4)
    guided = pigdm_guided(
        named_target("ring").score_fn(sde), Matrix(torch.ones(1, 2), 0.5), torch.ones(1, 1)
    )
    x = states(sde, 0.4, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: guided(x, level).score, x, atol=1e-6)


class CountingNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.weight = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return self.weight * x


def test_costs() -> None:
    """A pass forwards and one backwards count two; what needs no gradient counts what it calls."""
    sde = SDES["vp"]
    net = CountingNet()
    model, level = EpsModel(net, sde), sde.at(0.5)
    y = torch.zeros(1, 4)
    calls = {
        dps_guided(model, KNOWN, y): (1, 2),
        pigdm_guided(model, KNOWN, y): (1, 2),
        energy_guided(model, lambda x0: x0.sum(1)): (1, 2),
        noised_energy_guided(model, lambda x, level: x.sum(1)): (1, 2),
        autoguided(model, model, 3.0): (2, 2),
        thresholded(model): (1, 1),
    }
    for guided, (forwards, cost) in calls.items():
        net.calls = 0
        prediction = guided(torch.randn(2, 4), level)
        assert isinstance(prediction, Prediction)
        assert net.calls == forwards
        assert cost_of(guided, level) == cost
        run = sample(guided, sde, Ancestral(), shape=(2, 4), steps=3)
        assert (run.nfe, run.network_passes) == (3, 3 * cost)
    assert net.weight.grad is None


def test_shortcuts() -> None:
    score_fn, other = NORMAL.score_fn(SDES["vp"]), NORMAL.score_fn(SDES["vp"])
    assert dps_guided(score_fn, KNOWN, Y, 0) is score_fn
    assert pigdm_guided(score_fn, KNOWN, Y, 0.0) is score_fn
    assert energy_guided(score_fn, torch.abs, 0) is score_fn
    assert autoguided(score_fn, other, 1) is score_fn
    assert autoguided(score_fn, other, 0) is other


def test_below_a_level() -> None:
    sde = SDES["vp"]
    score_fn = NORMAL.score_fn(sde)
    times = torch.tensor([0.9, 0.1, 0.5], dtype=torch.float64)
    x, levels = states(sde, 0.5, 3), sde.at(times)
    gated = dps_guided(score_fn, KNOWN, Y, below(1.0, torch.tensor([2.0, 3.0, 4.0])))
    always = dps_guided(score_fn, KNOWN, Y, torch.tensor([2.0, 3.0, 4.0]))
    assert (levels.sigma_over_alpha < 1).tolist() == [False, True, False]
    expected = score_fn(x, levels).score
    expected[1] = always(x, levels).score[1]
    torch.testing.assert_close(gated(x, levels).score, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="ratio"):
        below(0.0)


def test_thresholding_acts_in_x0() -> None:
    x = torch.zeros(3, 5, dtype=torch.float64)
    level = SDES["vp"].at(0.5)
    x0 = torch.tensor([[0.1, -0.5, 0.2, 0.9, 0.0], [3.0, -1.0, 2.0, 0.5, -8.0], [1, 1, 1, 1, 1]])

    def score_fn(x: Tensor, level: NoiseLevel) -> Prediction:
        return Prediction.from_x0(x, level, x0.to(x))

    found = thresholded(score_fn, quantile=0.75)(x, level).x0
    # |x0| of the second in order: 0.5, 1, 2, 3, 8; three quarters of the way: 3.
    expected = torch.tensor(
        [[0.1, -0.5, 0.2, 0.9, 0.0], [1.0, -1 / 3, 2 / 3, 0.5 / 3, -1.0], [1, 1, 1, 1, 1]]
    )
    torch.testing.assert_close(found, expected.double(), rtol=1e-6, atol=1e-7)
    assert float(thresholded(score_fn, 1.0, limit=2.0)(x, level).x0.abs().max()) == 2.0
    between = thresholded(score_fn, quantile=0.7)(x, level).x0[1]  # 2 + 0.8 of the way to 3
    assert abs(float(between[2]) - 2 / 2.8) < 1e-6
