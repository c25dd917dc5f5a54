"""Metrics against closed forms. Monte-Carlo tolerances are a multiple of the standard error."""

from __future__ import annotations

import math

import numpy as np
import ot
import pytest
import torch
from scipy import stats
from torch import Tensor

from experiments import metrics
from experiments.estimates import Estimate, estimate
from tests.largest import Largest


def normal(n: int, *event: int, seed: int = 0, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return shift + scale * torch.randn(n, *event, generator=generator)


def test_energy_of_shifted_normals_is_the_closed_form() -> None:
    # E|N(m, 2)| = sqrt(2) (2 phi(m / sqrt 2)) + m (2 Phi(m / sqrt 2) - 1); E|X - X'| = 2 / sqrt(pi)
    shift = 1.5
    r = shift / math.sqrt(2)
    cross = math.sqrt(2) * 2 * stats.norm.pdf(r) + shift * (2 * stats.norm.cdf(r) - 1)
    expected = 2 * cross - 4 / math.sqrt(math.pi)

    def one(seed: int) -> float:
        x, y = normal(1000, seed=seed, shift=shift), normal(1000, seed=1000 + seed)
        return metrics.energy_distance(x, y, unbiased=True)

    found = estimate(map(one, range(20)))
    assert found.stderr is not None
    assert 0 < found.stderr < 0.05
    assert abs(found.value - expected) < 4 * found.stderr


def test_energy_of_two_point_sets_by_hand() -> None:
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [3.0]])
    # pairs x-y: 0, 3, 1, 2 (mean 1.5); within x: 1; within y: 3
    assert metrics.energy_distance(x, y) == pytest.approx(3.0 - 0.5 - 1.5, abs=1e-12)
    assert metrics.energy_distance(x, y, unbiased=True) == pytest.approx(-1.0, abs=1e-12)


def test_energy_is_scipys_squared() -> None:
    x, y = normal(300, seed=1), normal(200, seed=2, shift=0.4)
    expected = stats.energy_distance(x.numpy(), y.numpy()) ** 2
    # SciPy integrates the difference of distribution functions; both are exact for the point sets.
    assert metrics.energy_distance(x, y) == pytest.approx(expected, rel=1e-6)


def test_energy_is_zero_between_a_set_and_itself_and_unbiased_around_zero() -> None:
    x = normal(50, 3)
    assert metrics.energy_distance(x, x) == pytest.approx(0.0, abs=1e-12)
    floor = estimate(
        metrics.energy_distance(
            normal(200, 2, seed=s), normal(200, 2, seed=9000 + s), unbiased=True
        )
        for s in range(60)
    )
    assert floor.stderr is not None
    assert abs(floor.value) < 4 * floor.stderr


@pytest.mark.parametrize("unbiased", [False, True])
def test_chunked_equals_unchunked(monkeypatch: pytest.MonkeyPatch, unbiased: bool) -> None:
    x, y = normal(101, 5, seed=3), normal(77, 5, seed=4, shift=0.2)
    whole = metrics.energy_distance(x, y, unbiased=unbiased)
    monkeypatch.setattr(metrics, "BLOCK", 16)
    # Sums of some 1e4 float64 numbers in another order.
    assert metrics.energy_distance(x, y, unbiased=unbiased) == pytest.approx(whole, abs=1e-11)


@pytest.mark.parametrize("unbiased", [False, True])
def test_energy_in_one_dimension_by_sorting_is_that_of_all_pairs(unbiased: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 1, generator=generator, dtype=torch.float64).round(decimals=1)  # with ties
    y = 1e6 + 2 * torch.randn(211, 1, generator=generator, dtype=torch.float64).round(decimals=1)
    for a, b in ((x, x + 0.3), (x, y), (y, x)):
        found = metrics.energy_distance(a, b, unbiased=unbiased)
        flat = torch.zeros(len(a), 1).double(), torch.zeros(len(b), 1).double()
        plane = metrics.energy_distance(
            torch.cat([a, flat[0]], 1), torch.cat([b, flat[1]], 1), unbiased=unbiased
        )
        # Distances in the plane by products, about the square root of an ulp of 1e12 apart.
        assert found == pytest.approx(plane, rel=1e-7, abs=1e-6 if b is not y else 1e-2)


def test_energy_takes_a_tile_at_a_time_and_any_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6000, 2, generator=generator)
    y = torch.randn(5000, 2, generator=generator)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(metrics.energy_distance(x, y))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]
    with Largest() as largest:
        metrics.energy_distance(x[:3000], y[:3000])  # too few for threads, which it would not see
    assert largest.numbers <= metrics.BLOCK**2


def test_sliced_of_unequal_sizes_repeats_samples_to_equal_ones() -> None:
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    y = torch.randn(60, 3, generator=torch.Generator().manual_seed(1))
    equal = metrics.sliced_w2(x.repeat(3, 1), y.repeat(2, 1), seed=5)
    assert metrics.sliced_w2(x, y, seed=5) == pytest.approx(equal, rel=1e-12)


@pytest.mark.parametrize("event", [(2,), (1, 3, 3)])
def test_wasserstein_of_a_shifted_set_is_the_shift(event: tuple[int, ...]) -> None:
    x = normal(300, *event)
    shift = torch.full(event, 0.7)
    size = math.prod(event)
    # The shift is the optimal plan whatever the points are.
    assert metrics.w2(x, x + shift) == pytest.approx(0.7 * math.sqrt(size), rel=1e-6)
    directions = metrics._directions(size, 64, seed=0)
    by_hand = math.sqrt(float(np.mean((0.7 * directions.sum(axis=0)) ** 2)))
    assert metrics.sliced_w2(x, x + shift, projections=directions) == pytest.approx(by_hand, 1e-6)


def test_wasserstein_of_scaled_normals() -> None:
    # W2 between N(0, 1) and N(0, 4) on a line is 1; the quantile error at n = 4000 is below 0.1.
    x, y = normal(4000, seed=5), normal(4000, seed=6, scale=2.0)
    assert metrics.sliced_w2(x, y) == pytest.approx(1.0, abs=0.1)
    assert metrics.w2(x, y, samples=400) == pytest.approx(1.0, abs=0.3)


def test_wasserstein_limits_its_samples() -> None:
    x, y = normal(60, 2, seed=1), normal(60, 2, seed=2)
    assert metrics.w2(x, y, samples=20) == metrics.w2(x[:20], y[:20])
    assert metrics.w2(x, y, samples=None) == pytest.approx(
        math.sqrt(ot.emd2([], [], ot.dist(x.double().numpy(), y.double().numpy()))), rel=1e-12
    )


@pytest.mark.parametrize("size", [200, 150])
def test_sliced_is_pots(size: int) -> None:
    x, y = normal(200, 4, seed=1), normal(size, 4, seed=2, shift=0.3)
    directions = metrics._directions(4, 50, seed=7)
    np.testing.assert_array_equal(directions, ot.sliced.get_random_projections(4, 50, seed=7))
    expected = ot.sliced_wasserstein_distance(
        x.double().numpy(), y.double().numpy(), projections=directions
    )
    found = metrics.sliced_w2(x, y, projections=50, seed=7)
    assert found == pytest.approx(float(expected), rel=1e-9)
    assert found == metrics.sliced_w2(x, y, projections=50, seed=7)
    assert found != metrics.sliced_w2(x, y, projections=50, seed=8)


def test_paired_distances() -> None:
    x = torch.zeros(3, 2)
    fine = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 1.0]])
    assert metrics.paired_distances(x, fine).tolist() == [5.0, 0.0, 1.0]
    assert metrics.rms_distance(x, fine) == pytest.approx(math.sqrt(26 / 3))
    assert metrics.median_distance(x, fine) == 1.0
    with pytest.raises(ValueError, match="pair with x"):
        metrics.rms_distance(x, fine[:2])


def test_frechet_of_known_gaussians() -> None:
    a, b = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 4.0, 1.0])
    mean = torch.tensor([1.0, 0.0, -2.0])
    expected = 5.0 + 1.0 + 0.0 + 4.0  # |mean|² + (1 - 2)² + (2 - 2)² + (3 - 1)²
    zero = torch.zeros(3)
    found = metrics.frechet_from_moments(mean, torch.diag(a), zero, torch.diag(b))
    assert found == pytest.approx(expected, rel=1e-9)


def test_frechet_of_features_is_that_of_their_moments() -> None:
    x = normal(400, 6, seed=1) @ normal(6, 6, seed=2)
    y = normal(300, 6, seed=3) + 0.5
    expected = metrics.frechet_from_moments(
        x.double().mean(0), x.double().T.cov(), y.double().mean(0), y.double().T.cov()
    )
    reference = metrics.FrechetReference(y)
    assert reference.distance(x) == pytest.approx(expected, rel=1e-8)
    assert reference.distance(x) == pytest.approx(expected, rel=1e-8)  # nothing kept from before
    assert metrics.frechet_distance(x, y) == reference.distance(x)
    # Fewer samples than features: a singular covariance is no error.
    assert math.isfinite(reference.distance(x[:3]))
    with pytest.raises(ValueError, match="features must have shape"):
        reference.distance(x[:, :2])


def test_label_accuracy() -> None:
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [0.0, 5.0]])
    assert metrics.label_accuracy(logits, torch.tensor([0, 1, 1, 1])) == 0.75
    assert metrics.label_accuracy(torch.tensor([0, 1, 1]), 1) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="labels must be"):
        metrics.label_accuracy(logits, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="logits must have shape"):
        metrics.label_accuracy(logits[:, 0], 1)


def test_stderr_is_that_of_a_mean_and_shrinks_with_the_root_of_repeats() -> None:
    draws = np.random.default_rng(0).normal(size=4096)
    few, many = estimate(draws[:256]), estimate(draws)
    assert few.stderr is not None
    assert many.stderr is not None
    assert many.stderr == pytest.approx(1 / 64, rel=0.05)  # sd of a sample sd at 4096: 1.1 %
    assert few.stderr / many.stderr == pytest.approx(4.0, rel=0.2)  # 4.4 % at 256
    assert estimate([3.0]) == Estimate(3.0, None)
    with pytest.raises(ValueError, match="at least one repetition"):
        estimate([])


def test_reference_gives_what_the_functions_give() -> None:
    true, sampled = normal(200, 2, seed=1), normal(200, 2, seed=2, shift=0.3)
    reference = metrics.Reference(true, w2_samples=100, projections=32, seed=4)
    found = reference.compare(sampled)
    expected = {
        "energy": metrics.energy_distance(sampled, true),
        "sliced_w2": metrics.sliced_w2(sampled, true, projections=32, seed=4),
        "w2": metrics.w2(sampled, true, samples=100),
    }
    assert found == pytest.approx(expected, rel=1e-9)
    floor = reference.compare(normal(200, 2, seed=3))
    assert all(floor[name] < found[name] for name in metrics.SET_METRICS)
    fewer = reference.compare(sampled[:150])["sliced_w2"]
    assert fewer == pytest.approx(
        metrics.sliced_w2(sampled[:150], true, projections=32, seed=4), rel=1e-9
    )


def test_scalar_events_and_images_work() -> None:
    for event in [(), (1, 4, 4)]:
        found = metrics.Reference(normal(30, *event, seed=1)).compare(normal(30, *event, seed=2))
        assert set(found) == set(metrics.SET_METRICS)


def test_bad_input_names_what_is_wrong() -> None:
    x = normal(10, 2)
    with pytest.raises(ValueError, match="NaN or infinity"):
        metrics.energy_distance(torch.full((3, 2), math.nan), x)
    with pytest.raises(ValueError, match="events of one size"):
        metrics.w2(x, normal(10, 3))
    with pytest.raises(ValueError, match="tensor of samples"):
        metrics.sliced_w2(torch.empty(0, 2), x)
    with pytest.raises(ValueError, match="Did you mean 'energy'"):
        metrics.Reference(x, metrics=["energi"])
    with pytest.raises(ValueError, match="at least 2 samples"):
        metrics.energy_distance(x[:1], x, unbiased=True)


def test_every_metric_is_described() -> None:
    assert set(metrics.SET_METRICS) < set(metrics.METRICS)
    assert not metrics.METRICS["accuracy"].lower_is_better
