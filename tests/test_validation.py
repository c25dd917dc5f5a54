"""Loss and accuracy by time against closed forms and quadrature on Gaussian mixtures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from sde_diffusion import SDE, VPSDE, GaussianMixture, NoiseLevel
from sde_diffusion.losses import classifier_loss, simple_loss
from sde_diffusion.networks import ClassifierNet, NoisedClassifier
from sde_diffusion.objectives import Objective, even_times
from sde_diffusion.validation import Bucket, accuracy_by_time, loss_by_time
from tests.problems import SDES

POSITION, SPREAD = 0.8, 0.3


def pair() -> GaussianMixture:
    """Two classes at +-POSITION in 1-D, equally likely."""
    means = torch.tensor([[-POSITION], [POSITION]])
    return GaussianMixture(means, torch.full((2,), SPREAD**2), labels=torch.tensor([0, 1]))


def over_bucket(sde: SDE, bucket: Bucket, value: Callable[[NoiseLevel], float]) -> float:
    """Mean over a bucket's log-SNR by Gauss-Legendre with 8 nodes."""
    nodes, weights = np.polynomial.legendre.leggauss(8)
    middle = 0.5 * (bucket.half_log_snr_high + bucket.half_log_snr_low)
    half = 0.5 * (bucket.half_log_snr_high - bucket.half_log_snr_low)
    levels = [sde.at(sde.time(torch.tensor(middle + half * z, dtype=torch.float64))) for z in nodes]
    return float((weights * [value(level) for level in levels]).sum() / 2)


@pytest.mark.parametrize("name", SDES)
def test_the_exact_scores_loss_by_time_is_the_quadratures(name: str) -> None:
    """``E ||eps - eps_theta||^2 = 1 - E eps_theta^2`` for the posterior mean, by the trapezoid rule
    over the density of x_t."""
    sde, target = SDES[name], pair()
    x, _ = target.sample(1500, seed=1)
    model = target.model(sde)
    found = loss_by_time(model, simple_loss, x, None, sde, buckets=5, seed=2)

    def expected(level: NoiseLevel) -> float:
        reach = float(level.alpha) * POSITION + 8 * math.hypot(
            float(level.alpha) * SPREAD, float(level.sigma)
        )
        grid = torch.linspace(-reach, reach, 2001, dtype=torch.float64)[:, None]
        density = target.log_prob_at(grid, level).exp()
        eps = model(grid, level).eps[:, 0]
        return 1 - float(torch.trapezoid(density * eps**2, grid[:, 0]))

    for bucket in found:
        assert abs(bucket.mean - over_bucket(sde, bucket, expected)) < 5 * bucket.stderr
        assert bucket.stderr < 0.1


@pytest.mark.parametrize("name", SDES)
def test_the_exact_classifiers_accuracy_by_time_is_its_closed_form(name: str) -> None:
    """The sign of x_t: right with probability ``Phi(alpha m / sqrt(alpha^2 s^2 + sigma^2))``."""
    sde, target = SDES[name], pair()
    x, y = target.sample(3000, seed=3)
    found = accuracy_by_time(target.classifier(sde), x, y, sde, buckets=6, seed=4)

    def expected(level: NoiseLevel) -> float:
        alpha, sigma = float(level.alpha), float(level.sigma)
        return float(stats.norm.cdf(alpha * POSITION / math.hypot(alpha * SPREAD, sigma)))

    for bucket in found:
        want = over_bucket(sde, bucket, expected)
        error = math.sqrt(want * (1 - want) / len(x))
        assert abs(bucket.mean - want) < 5 * error
        assert bucket.stderr == pytest.approx(
            math.sqrt(bucket.mean * (1 - bucket.mean) / (bucket.n - 1)), rel=1e-6
        )


@pytest.mark.parametrize("name", SDES)
def test_buckets_tile_the_times_from_little_noise_to_much(name: str) -> None:
    sde = SDES[name]
    x = torch.zeros(4, 2)
    found = loss_by_time(pair_model(sde), simple_loss, x, None, sde, buckets=7)
    assert found[0].t_low == pytest.approx(sde.t_min, rel=1e-6)
    assert found[-1].t_high == pytest.approx(sde.t_max, rel=1e-6)
    for left, right in pairwise(found):
        assert left.t_high == right.t_low
        assert left.half_log_snr_low == right.half_log_snr_high
        width = left.half_log_snr_high - left.half_log_snr_low
        assert right.half_log_snr_high - right.half_log_snr_low == pytest.approx(width)
    for bucket in found:
        assert bucket.n == 4
        level = sde.at(bucket.t_low)
        assert float(level.half_log_snr) == pytest.approx(bucket.half_log_snr_high, abs=1e-6)
    json.dumps([bucket.config() for bucket in found], allow_nan=False)


def pair_model(sde: SDE) -> Callable:
    target = GaussianMixture(torch.zeros(1, 2), torch.ones(1))
    return target.model(sde)


class Recorded:
    """A loss that keeps the levels and the noise it was asked for."""

    def __init__(self) -> None:
        self.t: list[Tensor] = []
        self.noise: list[Tensor] = []

    def __call__(self, model, x0, label, level, noise) -> Tensor:
        self.t.append(level.t)
        self.noise.append(noise)
        return noise.flatten(1).square().mean(1)


def recorded(seed: int = 0, batch_size: int = 256) -> tuple[Tensor, Tensor]:
    loss = Recorded()
    x = torch.zeros(50, 1, 2, 2)
    loss_by_time(nn.Identity(), loss, x, None, VPSDE(), buckets=3, seed=seed, batch_size=batch_size)
    return torch.cat(loss.t), torch.cat(loss.noise)


def test_draws_are_fixed_by_the_seed_and_do_not_depend_on_the_batch() -> None:
    t, noise = recorded()
    for again in (recorded(), recorded(batch_size=7)):
        assert torch.equal(again[0], t)
        assert torch.equal(again[1], noise)
    other = recorded(seed=1)
    assert not torch.equal(other[0], t)
    assert not torch.equal(other[1], noise)
    # No two samples or buckets share noise, and every one of a bucket's 50 parts has its time.
    assert noise.flatten(1).unique(dim=0).shape[0] == 150
    level = VPSDE().at(t[:50].double()).half_log_snr.sort().values
    ends = [float(VPSDE().at(v).half_log_snr) for v in (1e-3, 1.0)]
    edges = torch.linspace(ends[0], ends[0] + (ends[1] - ends[0]) / 3, 51, dtype=torch.float64)
    edges = edges.flip(0)
    # Times are float32: 1e-7 of t, a part in 1e-6 of log-SNR.
    assert bool((level >= edges[:-1] - 1e-5).all())
    assert bool((level <= edges[1:] + 1e-5).all())


def test_an_objective_gives_its_loss_and_labels_go_with_their_samples() -> None:
    sde, target = VPSDE(), pair()
    x, y = target.sample(400, seed=1)
    model = target.model(sde)
    plain = loss_by_time(model, simple_loss, x, y, sde, buckets=3)
    assert (
        loss_by_time(model, Objective(simple_loss, even_times(sde)), x, y, sde, buckets=3) == plain
    )
    blind = loss_by_time(model, simple_loss, x, None, sde, buckets=3)
    wrong = loss_by_time(model, simple_loss, x, 1 - y, sde, buckets=3)
    # In the middle of the range classes help, and wrong ones harm.
    assert plain[1].mean < blind[1].mean < wrong[1].mean


def test_a_network_is_evaluated_without_gradients_in_eval_mode_and_left_as_it_was() -> None:
    net = NoisedClassifier(ClassifierNet((2,), 3, width=8))
    net.net.trunk.eval()
    seen: list[bool] = []
    net.register_forward_hook(lambda module, _, logits: seen.append(module.training))
    x, y = torch.randn(9, 2, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 3
    found = accuracy_by_time(net, x, y, VPSDE(), buckets=2)
    losses = loss_by_time(net, classifier_loss, x, y, VPSDE(), buckets=2)
    assert seen == [False] * 4
    assert net.training
    assert net.net.head.training
    assert not net.net.trunk.training
    assert len(found) == len(losses) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(0, 1)}, "x must hold at least one sample"),
        ({"y": torch.zeros(3).long()}, r"y must have one label per sample, \(2,\), got \(3,\)"),
        ({"buckets": 0}, "buckets must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message) -> None:
    given = {"x": torch.zeros(2, 1), "y": torch.zeros(2).long()} | arguments
    sde = VPSDE()
    with pytest.raises(ValueError, match=message):
        accuracy_by_time(pair().classifier(sde), given.pop("x"), given.pop("y"), sde, **given)
    with pytest.raises(ValueError, match="y must hold the classes"):
        accuracy_by_time(pair().classifier(sde), torch.zeros(2, 1), None, sde)
