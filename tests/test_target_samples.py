"""Covariances, moments and samples of exact targets."""

from __future__ import annotations

import math

import pytest
import torch

from sde_diffusion import TARGETS, VPSDE, GaussianMixture, named_target
from tests.problems import assert_close_to_monte_carlo
from tests.targets import NAMES, points, reference, rotated, target_of


def test_full_diagonal_and_isotropic_covariances_agree() -> None:
    means = rotated()[0]
    isotropic = torch.tensor([0.2, 0.5, 1.5], dtype=torch.float64)
    diagonal = isotropic[:, None] * torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    forms = [GaussianMixture(means, c) for c in (isotropic, diagonal, torch.diag_embed(diagonal))]
    uneven = diagonal * torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
    others = [GaussianMixture(means, c) for c in (uneven, torch.diag_embed(uneven))]
    level = VPSDE().at(0.2)
    x = points(forms[0], level)
    for group in (forms, others):
        for other in group[1:]:
            for read in (
                lambda m: m.log_prob_at(x, level),
                lambda m: m.score_fn(VPSDE())(x, level).score,
                lambda m: m.covariance(),
                lambda m: m.mean(),
            ):
                # eigh of a diagonal matrix is exact up to order and sign: ulps.
                torch.testing.assert_close(read(other), read(group[0]), rtol=1e-12, atol=1e-13)
    assert not torch.allclose(
        forms[0].log_prob_at(x, level), others[0].log_prob_at(x, level), rtol=1e-3
    )


@pytest.mark.parametrize("target_name", NAMES)
def test_mean_and_covariance_are_the_samples(target_name: str) -> None:
    target = target_of(target_name)
    n = 40_000
    x, labels = target.sample(n, seed=0, dtype=torch.float64)
    assert x.shape == (n, target.dimension)
    assert labels.shape == (n,)
    expected = reference(target)
    torch.testing.assert_close(target.mean(), expected.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        target.covariance().diagonal(), expected.variance, rtol=1e-10, atol=1e-12
    )
    assert_close_to_monte_carlo(
        x.mean(0), target.mean(), (target.covariance().diagonal() / n).sqrt()
    )
    centred = x - target.mean()
    products = centred[:, :, None] * centred[:, None, :]
    stderr = products.std(0) / math.sqrt(n)
    assert_close_to_monte_carlo(products.mean(0), target.covariance(), stderr)
    # Classes in proportion to their weights: a binomial count each.
    for c in range(target.num_classes):
        p = target.weights[target.labels == c].sum().item()
        share = (labels == c).double().mean()
        if target.num_classes > 1:
            assert_close_to_monte_carlo(share, p, math.sqrt(p * (1 - p) / n))


@pytest.mark.parametrize("target_name", NAMES)
def test_samples_of_a_class_have_its_moments(target_name: str) -> None:
    target = target_of(target_name)
    n, label = 20_000, 0  # of two components with unequal weights in "shared classes"
    x, labels = target.sample(n, seed=4, label=label, dtype=torch.float64)
    assert (labels == label).all()
    law = target.conditional(label)
    assert_close_to_monte_carlo(x.mean(0), law.mean(), (law.covariance().diagonal() / n).sqrt())
    # Together with the class shares above: labels belong to their samples, and not by accident.
    both, which = target.sample(n, seed=5, dtype=torch.float64)
    mine = both[which == label]
    stderr = (law.covariance().diagonal() / len(mine)).sqrt()
    assert_close_to_monte_carlo(mine.mean(0), law.mean(), stderr)


def test_sample_is_a_function_of_the_seed() -> None:
    target = target_of("ring")
    first, labels = target.sample(50, seed=1)
    assert first.dtype == torch.float32
    again, again_labels = target.sample(50, seed=1)
    assert (first == again).all()
    assert (labels == again_labels).all()
    assert (target.sample(50, seed=2)[0] != first).any()
    assert target.sample(0, seed=1)[0].shape == (0, 2)
    with pytest.raises(ValueError, match="n must be at least 0"):
        target.sample(-1, seed=1)
    with pytest.raises(ValueError, match=r"label must lie in 0\.\.7"):
        target.sample(3, seed=1, label=8)


def test_singular_covariances_are_data_on_a_plane() -> None:
    # A point mass and a line: no density at t = 0, an exact one at any noise level.
    line = torch.tensor([[[1.0, 1.0], [1.0, 1.0]]], dtype=torch.float64)
    point = torch.zeros(1, 2, 2, dtype=torch.float64)
    target = GaussianMixture(torch.zeros(2, 2), torch.cat([line, point]))
    level = VPSDE().at(0.3)
    x = points(target, level)
    expected = reference(target, level).log_prob(x)
    torch.testing.assert_close(target.log_prob_at(x, level), expected, rtol=1e-9, atol=1e-9)
    drawn, _ = target.sample(10, seed=0, dtype=torch.float64)
    torch.testing.assert_close(drawn[:, 0], drawn[:, 1], rtol=0, atol=1e-7)


@pytest.mark.parametrize("target_name", TARGETS)
def test_named_targets_are_scaled_like_data(target_name: str) -> None:
    target = named_target(target_name)
    std = target.covariance().diagonal().mean().sqrt().item()
    assert 0.7 < std < 1.3  # "about unit standard deviation"
    dimension, classes = {
        "gaussian": (2, 1),
        "ring": (2, 8),
        "moons": (2, 2),
        "spiral": (2, 2),
        "gmm16": (16, 10),
        "heavy_tails": (2, 2),
        "imbalanced": (2, 6),
        "nearly_singular": (8, 4),
        "swiss_roll": (3, 4),
    }[target_name]
    assert target.dimension == dimension
    assert target.num_classes == classes
    # The same numbers each time it is made.
    again = named_target(target_name)
    assert (again.means == target.means).all()
    assert (again.variances == target.variances).all()


def test_an_unknown_target_lists_the_names() -> None:
    with pytest.raises(ValueError, match=r"unknown target 'rign'\. Did you mean 'ring'\?.*spiral"):
        named_target("rign")
