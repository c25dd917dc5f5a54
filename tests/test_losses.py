"""Losses against their definitions, and samplers of times against their laws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from sde_diffusion import (
    EDMSDE,
    VESDE,
    VPSDE,
    EDMModel,
    EpsModel,
    GaussianMixture,
    SubVPSDE,
    X0Model,
)
from sde_diffusion.losses import (
    classifier_loss,
    denoising_loss,
    drop_labels,
    edm_loss,
    likelihood_weighting,
    log_normal_times,
    simple_loss,
    uniform_log_snr_times,
    uniform_times,
)
from sde_diffusion.prediction import Prediction

SDES = [VPSDE(), SubVPSDE(), VESDE(), EDMSDE()]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Zero(nn.Module):
    """A network that says nothing."""

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        return torch.zeros_like(x)


@pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)
@pytest.mark.parametrize("event", [(), (3,), (1, 2, 2)], ids=str)
def test_the_simple_loss_of_a_silent_network_is_the_square_of_the_noise(sde, event) -> None:
    x0, noise = (
        torch.randn(6, *event, generator=generator(1)),
        torch.randn(6, *event, generator=generator(2)),
    )
    level = sde.at(uniform_times(6, sde, generator()))
    loss = simple_loss(EpsModel(Zero(), sde), x0, None, level, noise)
    torch.testing.assert_close(loss, noise.reshape(6, -1).square().mean(1))


def test_the_weighting_multiplies_each_sample() -> None:
    sde = VPSDE()
    x0, noise = torch.randn(4, 3, generator=generator(1)), torch.randn(4, 3, generator=generator(2))
    level = sde.at(torch.tensor([0.1, 0.4, 0.7, 1.0]))
    model = EpsModel(Zero(), sde)
    weighted = denoising_loss(model, x0, None, level, noise, likelihood_weighting)
    plain = denoising_loss(model, x0, None, level, noise)
    torch.testing.assert_close(weighted, plain * level.g2 / level.sigma**2)


@pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)
def test_the_edm_loss_is_the_squared_error_of_the_network_within(sde) -> None:
    """In EDM's form, ``lambda ||D - x0||^2 = ||F - (x0 - c_skip y) / c_out||^2`` (their eq. 8)."""
    x0, noise = torch.randn(5, 3, generator=generator(1)), torch.randn(5, 3, generator=generator(2))
    level = sde.at(uniform_times(5, sde, generator(3)))
    loss = edm_loss(EDMModel(Zero(), sde, sigma_data=0.7), x0, None, level, noise)
    s = level.sigma_over_alpha[:, None].double()
    y = x0 + s * noise
    skip = 0.49 / (s**2 + 0.49)
    out = s * 0.7 / (s**2 + 0.49).sqrt()
    target = (x0 - skip * y) / out
    # Near t_min the target is a small difference over a small c_out: float32 keeps 3 digits.
    torch.testing.assert_close(loss.double(), target.square().mean(1), rtol=5e-3, atol=1e-5)


def test_the_edm_loss_wants_its_model() -> None:
    sde = VESDE()
    x0 = torch.zeros(2, 3)
    with pytest.raises(TypeError, match="needs an EDMModel"):
        edm_loss(X0Model(Zero(), sde), x0, None, sde.at(torch.tensor([0.1, 0.2])), x0)


class Exact:
    """The exact score of a target, called like a model."""

    def __init__(self, score_fn) -> None:
        self.score_fn = score_fn

    def __call__(self, x: Tensor, level, label=None) -> Prediction:
        return self.score_fn(x, level)


def test_the_exact_score_has_the_least_loss() -> None:
    """Denoising score matching has its minimum at the true score (Vincent 2011)."""
    sde = VPSDE()
    target = GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), torch.tensor([0.05, 0.1]))
    x0 = target.sample(4000, seed=0)[0].float()
    noise = torch.randn(x0.shape, generator=generator(1))
    level = sde.at(uniform_times(len(x0), sde, generator(2)))
    exact = target.score_fn(sde)

    class Shifted(Exact):
        def __call__(self, x: Tensor, level, label=None) -> Prediction:
            return Prediction.from_eps(x, level, exact(x, level).eps + 0.1)

    best = simple_loss(Exact(exact), x0, None, level, noise)
    worse = simple_loss(Shifted(exact), x0, None, level, noise)
    # E[difference] = 0.1^2; compared within three standard errors of the paired difference.
    difference = worse - best
    error = float(difference.std()) / math.sqrt(len(difference))
    assert abs(float(difference.mean()) - 0.01) < 3 * error
    assert float(difference.mean()) > 0


def test_classifier_loss_is_cross_entropy_at_the_noised_input() -> None:
    sde = VPSDE()
    x0, noise = torch.randn(3, 2, generator=generator(1)), torch.randn(3, 2, generator=generator(2))
    level = sde.at(torch.tensor([0.2, 0.5, 0.9]))
    label = torch.tensor([0, 1, 1])
    seen = sde.perturb(x0, level.t, noise)
    loss = classifier_loss(lambda x, level: x, x0, label, level, noise)
    torch.testing.assert_close(loss, -seen.log_softmax(1)[torch.arange(3), label])


def test_labels_are_dropped_with_their_probability() -> None:
    label = torch.arange(20_000) % 10
    dropped = drop_labels(label, 10, 0.15, generator())
    share = float((dropped == 10).float().mean())
    assert abs(share - 0.15) < 4 * math.sqrt(0.15 * 0.85 / 20_000)
    assert torch.equal(dropped[dropped != 10], label[dropped != 10])
    assert torch.equal(drop_labels(label, 10, 0.0, generator()), label)
    assert bool((drop_labels(label, 10, 1.0, generator()) == 10).all())


@pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)
@pytest.mark.parametrize("sampler", [uniform_times, uniform_log_snr_times, log_normal_times])
def test_times_stay_in_range_and_follow_their_generator(sampler, sde) -> None:
    times = sampler(64, sde, generator(5))
    assert times.shape == (64,)
    assert times.dtype == torch.float32
    # float32 rounding of the ends themselves
    assert float(times.min()) >= sde.t_min * (1 - 1e-6)
    assert float(times.max()) <= sde.t_max * (1 + 1e-6)
    assert torch.equal(times, sampler(64, sde, generator(5)))
    assert not torch.equal(times, sampler(64, sde, generator(6)))


def test_times_follow_their_laws() -> None:
    # Stratified: the empirical distribution is within 1/n of the law.
    n = 1000
    quantiles = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    sde = EDMSDE()
    uniform = uniform_times(n, sde, generator()).double().sort().values
    assert float(((uniform - sde.t_min) / (sde.t_max - sde.t_min) - quantiles).abs().max()) < 1e-3
    log_sigma = log_normal_times(n, sde, generator(), mean=-1.0, std=0.5).double().log()
    law = torch.special.ndtr((log_sigma.sort().values + 1.0) / 0.5)
    assert float((law - quantiles).abs().max()) < 1e-3
    log_snr = sde.at(uniform_log_snr_times(n, sde, generator())).half_log_snr.double().sort().values
    share = (log_snr - log_snr[0]) / (log_snr[-1] - log_snr[0])
    assert float((share - quantiles).abs().max()) < 2e-3


def test_log_normal_times_check_their_settings() -> None:
    with pytest.raises(ValueError, match="std > 0"):
        log_normal_times(4, VESDE(), generator(), std=0.0)
