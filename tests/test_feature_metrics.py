"""Kernel distance and nearest-neighbour metrics against brute force, closed cases, torchmetrics."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from experiments import feature_metrics
from experiments.feature_metrics import Neighbourhoods, kernel_distance, recall


def normal(n: int, d: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) + shift


def brute_force(real: Tensor, fake: Tensor, k: int, dense: int) -> dict[str, float]:
    """The definitions, pair by pair."""

    def distance(a: Tensor, b: Tensor) -> float:
        return float((a - b).square().sum().sqrt())

    def radius(of: Tensor, i: int, nearest: int) -> float:
        others = sorted(distance(of[i], of[j]) for j in range(len(of)) if j != i)
        return others[nearest - 1]

    def within(x: Tensor, of: Tensor, nearest: int) -> list[bool]:
        return [distance(x, of[i]) <= radius(of, i, nearest) for i in range(len(of))]

    lies = [within(x, real, dense) for x in fake]
    return {
        "precision": sum(any(within(x, real, k)) for x in fake) / len(fake),
        "recall": sum(any(within(x, fake, k)) for x in real) / len(real),
        "density": sum(map(sum, lies)) / (dense * len(fake)),
        "coverage": sum(any(row[i] for row in lies) for i in range(len(real))) / len(real),
    }


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_neighbours_are_those_of_the_definitions(
    shift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_metrics, "_ROWS", 7)  # several tiles
    real, fake = normal(19, 3, 0), normal(16, 3, 1, shift)
    found = Neighbourhoods(real, precision_k=2, density_k=3).compare(fake)
    assert found == pytest.approx(brute_force(real, fake, 2, 3), abs=1e-12)


def test_a_set_against_itself_against_one_far_away_and_against_a_point() -> None:
    x = normal(300, 4, 0)
    same = Neighbourhoods(x).compare(x)
    # Every sample lies in its own ball, and a ball holds its centre and k others.
    assert same == {"precision": 1.0, "recall": 1.0, "density": pytest.approx(6 / 5), "coverage": 1}
    assert Neighbourhoods(x).compare(x + 100) == dict.fromkeys(same, 0.0)
    # All samples one and the same real one: precise, but of no variety.
    point = Neighbourhoods(x).compare(x[:1].expand(300, -1))
    assert point["precision"] == 1.0
    assert point["recall"] == pytest.approx(1 / 300)
    # A single place covers the balls that it lies in, density_k of them on average.
    assert point["coverage"] == pytest.approx(point["density"] * 5 / 300)


def test_coverage_of_one_law_is_what_naeem_et_al_derive() -> None:
    # 1 - prod_{i<k} (N-1-i)/(N+M-1-i) : no fake among the k nearest; density 1.
    n, runs = 200, 40
    found = [
        Neighbourhoods(normal(n, 3, 2 * s)).compare(
            normal(n, 3, 2 * s + 1), ("coverage", "density")
        )
        for s in range(runs)
    ]
    expected = 1.0
    for i in range(5):
        expected *= (n - 1 - i) / (2 * n - 1 - i)
    for name, mean in (("coverage", 1 - expected), ("density", 1.0)):
        values = torch.tensor([one[name] for one in found])
        stderr = float(values.std()) / runs**0.5
        assert abs(float(values.mean()) - mean) < 4 * stderr  # fixed seeds
        assert stderr < 0.02


def test_recall_sees_a_missing_mode_and_precision_an_added_one() -> None:
    one, two = normal(200, 2, 0), torch.cat([normal(100, 2, 1), normal(100, 2, 2, 30.0)])
    missing = Neighbourhoods(two).compare(one)
    assert missing["precision"] > 0.9
    assert 0.4 < missing["recall"] < 0.55
    added = Neighbourhoods(one).compare(two)
    assert 0.4 < added["precision"] < 0.55


def test_the_kernel_distance_is_the_u_statistic() -> None:
    x, y = normal(12, 3, 0), normal(12, 3, 1, 0.5)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / 3 + 1) ** 3

    n, off = 12, ~torch.eye(12, dtype=torch.bool)
    expected = (kernel(x, x)[off].sum() + kernel(y, y)[off].sum()) / (n * (n - 1))
    expected -= 2 * kernel(x, y).mean()
    assert kernel_distance(x, y) == pytest.approx(float(expected), rel=1e-10)


def test_the_kernel_distance_agrees_with_torchmetrics_class() -> None:
    from torchmetrics.image.kid import KernelInceptionDistance

    x, y = normal(40, 5, 0), normal(40, 5, 1, 0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it keeps all features
        metric = KernelInceptionDistance(torch.nn.Identity(), subsets=1, subset_size=40)
    metric.set_dtype(torch.float64)
    metric.update(y, real=True)
    metric.update(x, real=False)
    assert kernel_distance(x, y) == pytest.approx(float(metric.compute()[0]), rel=1e-6)


def test_the_kernel_distance_of_one_law_is_zero_on_average() -> None:
    values = torch.tensor([kernel_distance(normal(30, 4, 2 * s), normal(50, 4, 2 * s + 1))
                           for s in range(60)])  # fmt: skip
    assert abs(float(values.mean())) < 4 * float(values.std()) / 60**0.5
    assert float(values.min()) < 0 < float(values.max())
    assert kernel_distance(normal(30, 4, 0, 1.0), normal(50, 4, 1)) > 4 * float(values.std())


def test_the_choice_of_subsets_is_seeded_and_moves_no_generator() -> None:
    x, y = normal(30, 4, 0), normal(50, 4, 1)
    before = torch.get_rng_state()
    assert kernel_distance(x, y) == kernel_distance(x, y)
    assert kernel_distance(x, y) != kernel_distance(x, y, seed=1)
    assert torch.equal(before, torch.get_rng_state())


def test_what_does_not_fit_is_explained() -> None:
    x = normal(10, 3, 0)
    with pytest.raises(ValueError, match="more than 5 samples for neighbours, got 5"):
        Neighbourhoods(x[:5])
    with pytest.raises(ValueError, match="recall needs more than 3"):
        Neighbourhoods(x).compare(x[:3])
    with pytest.raises(ValueError, match="as many features"):
        Neighbourhoods(x).compare(normal(10, 4, 0))
    with pytest.raises(ValueError, match="holds NaN"):
        kernel_distance(x, x * torch.nan)


@pytest.mark.parametrize("sizes", [(60, 50), (600, 300)], ids=str)  # one tile, and several
def test_recall_alone_is_recall_among_others(sizes: tuple[int, int]) -> None:
    real, fake = normal(sizes[0], 3, 0), normal(sizes[1], 3, 1, 0.5)
    found = recall(real, fake)
    assert found == Neighbourhoods(real).compare(fake, ("recall",))["recall"]
    if sizes == (60, 50):
        assert found == brute_force(real, fake, 3, 5)["recall"]
    assert 0 < found < 1
