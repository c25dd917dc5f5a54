"""Exact targets against torch.distributions, autograd and quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from sde_diffusion import (
    TARGETS,
    VPSDE,
    GaussianMixture,
    NoiseLevel,
    bind,
    classifier_free_guided,
    classifier_guided,
    named_target,
)
from sde_diffusion.prediction import select
from tests.problems import (
    EXACT_TARGETS,
    SDES,
    GaussianProblem,
    assert_close_to_monte_carlo,
    inner_times,
)


def rotated(seed: int = 3, count: int = 3, dimension: int = 3) -> tuple[Tensor, Tensor]:
    """Means and full covariances."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(count, dimension, generator=generator, dtype=torch.float64)
    root = torch.randn(count, dimension, dimension, generator=generator, dtype=torch.float64)
    eye = torch.eye(dimension, dtype=torch.float64)
    return means, 0.3 * root @ root.mT + 0.05 * eye


@cache
def target_of(name: str) -> GaussianMixture:
    if name == "shared classes":  # several components in a class, unequal weights, rotated
        means, covariances = rotated(count=4)
        weights = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
        return GaussianMixture(means, covariances, weights, torch.tensor([0, 1, 0, 2]))
    return named_target(name)


NAMES = [*EXACT_TARGETS, "shared classes"]


def reference(
    target: GaussianMixture, level: NoiseLevel | None = None, label: int | None = None
) -> MixtureSameFamily:
    """The mixture at a 0-d level by torch.distributions, from its public numbers."""
    alpha, sigma = (1.0, 0.0) if level is None else (level.alpha.item(), level.sigma.item())
    covariances = full_covariances(target)
    eye = torch.eye(target.dimension, dtype=torch.float64)
    keep = slice(None) if label is None else target.labels == label
    return MixtureSameFamily(
        Categorical(target.weights[keep]),
        MultivariateNormal(
            alpha * target.means[keep], alpha**2 * covariances[keep] + sigma**2 * eye
        ),
    )


def full_covariances(target: GaussianMixture) -> Tensor:
    if target.rotation is None:
        return torch.diag_embed(target.variances)
    return target.rotation @ torch.diag_embed(target.variances) @ target.rotation.mT


def points(target: GaussianMixture, level: NoiseLevel, n: int = 16) -> Tensor:
    """Points of the law at a level, and some well outside it."""
    x0, _ = target.sample(n, seed=1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    x = level.alpha * x0 + level.sigma * noise
    return torch.cat([x, 2 * x + 0.5])


# --- density and score ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("target_name", NAMES)
def test_density_is_torch_distributions_and_score_its_gradient(target_name: str, name: str) -> None:
    target, sde = target_of(target_name), SDES[name]
    for t in inner_times(sde, 4):
        level = sde.at(t)
        x = points(target, level)
        expected = reference(target, level)
        # A log-density is a sum of squares of order (distance/sigma)^2, each good to an ulp of it
        # times the condition of the covariance (50 on gmm16): 1e-10 relative leaves 1e4 ulps.
        wanted = expected.log_prob(x)
        torch.testing.assert_close(target.log_prob_at(x, level), wanted, rtol=1e-10, atol=1e-10)
        score_fn = target.score_fn(sde)
        found = score_fn(x, level).score
        inputs = x.clone().requires_grad_()
        for log_prob in (target.log_prob_at(inputs, level), expected.log_prob(inputs)):
            (gradient,) = torch.autograd.grad(log_prob.sum(), inputs)
            scale = gradient.abs().amax(1, keepdim=True).clamp_min(1)
            assert ((found - gradient).abs() < 1e-9 * scale).all()


@pytest.mark.parametrize("target_name", NAMES)
def test_log_prob_of_the_data(target_name: str) -> None:
    target = target_of(target_name)
    x, _ = target.sample(32, seed=1, dtype=torch.float64)
    torch.testing.assert_close(
        target.log_prob(x), reference(target).log_prob(x), rtol=1e-10, atol=1e-10
    )
    narrow = target.log_prob(x.float())
    assert narrow.dtype == torch.float32
    # Rounding x to float32 (6e-8) moves the log-density by its score, at most about 1e2 here.
    torch.testing.assert_close(narrow.double(), target.log_prob(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("target_name", ["gaussian", "ring", "moons", "spiral"])
@pytest.mark.parametrize("name", ["vp", "subvp", "ve"])
def test_density_integrates_to_one_in_the_plane(target_name: str, name: str) -> None:
    target, sde = target_of(target_name), SDES[name]
    level = sde.at(sde.time(-math.log(0.3)))  # sigma / alpha = 0.3
    reach = 6.0
    axis = torch.linspace(-reach, reach, 301, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    mass = target.log_prob_at(grid, level).exp().sum() * (axis[1] - axis[0]) ** 2
    # The trapezoidal rule is exact beyond rounding for Gaussians this wide (spacing 0.04 against a
    # width of at least 0.2 there); the tails beyond 6 hold less than 1e-7.
    assert abs(mass.item() - 1) < 1e-6


@pytest.mark.parametrize("target_name", NAMES)
@pytest.mark.parametrize("per_sample", [False, True])
def test_conditional_scores_of_classes(target_name: str, per_sample: bool) -> None:
    target, sde = target_of(target_name), SDES["cosine"]
    times = inner_times(sde, 4)
    for t in times:
        level = sde.at(t)
        x = points(target, level)
        labels = torch.arange(len(x)) % target.num_classes
        argument = level.per_sample(len(x)) if per_sample else level
        found = target.score_fn(sde, label=labels)(x, argument).score
        by_model = bind(target.model(sde), labels)(x, argument).score
        assert (found == by_model).all()
        for label in range(min(3, target.num_classes)):
            inputs = x.clone().requires_grad_()
            log_prob = reference(target, level, label).log_prob(inputs)
            (expected,) = torch.autograd.grad(log_prob.sum(), inputs)
            scale = expected.abs().amax(1, keepdim=True).clamp_min(1)
            alone = target.score_fn(sde, label=label)(x, argument).score
            assert ((alone - expected).abs() < 1e-9 * scale).all()
            mine = labels == label
            assert ((found - expected).abs() < 1e-9 * scale)[mine].all()


@pytest.mark.parametrize("target_name", NAMES)
def test_null_label_of_the_model_is_the_whole_mixture(target_name: str) -> None:
    target, sde = target_of(target_name), VPSDE()
    level = sde.at(0.3)
    x = points(target, level)
    model = target.model(sde)
    whole = target.score_fn(sde)(x, level).score
    assert model.num_classes == model.null_label == target.num_classes
    null = torch.full((len(x),), model.null_label)
    assert (model(x, level).score == whole).all()
    assert (model(x, level, null).score == whole).all()


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("target_name", NAMES)
def test_classifier_is_bayes_rule(target_name: str, name: str) -> None:
    target, sde = target_of(target_name), SDES[name]
    classifier = target.classifier(sde)
    for t in inner_times(sde, 3):
        level = sde.at(t)
        x = points(target, level)
        logits = classifier(x, level)
        assert logits.shape == (len(x), target.num_classes)
        joint = torch.stack(
            [
                reference(target, level, c).log_prob(x)
                + target.weights[target.labels == c].sum().log()
                for c in range(target.num_classes)
            ],
            1,
        )
        torch.testing.assert_close(logits, joint, rtol=1e-10, atol=1e-10)
        posterior = logits.softmax(1)
        torch.testing.assert_close(posterior, joint.softmax(1), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("target_name", NAMES)
def test_conditional_is_the_class_alone(target_name: str) -> None:
    target = target_of(target_name)
    x, _ = target.sample(16, seed=2, dtype=torch.float64)
    for label in range(target.num_classes):
        conditional = target.conditional(label)
        assert conditional.num_classes == 1
        assert conditional.weights.sum().item() == pytest.approx(1, abs=1e-15)
        expected = reference(target, label=label).log_prob(x)
        torch.testing.assert_close(conditional.log_prob(x), expected, rtol=1e-9, atol=1e-9)


def test_gaussian_score_against_a_linear_solve() -> None:
    for name in SDES:
        problem = GaussianProblem(SDES[name])
        for t in inner_times(SDES[name], 4):
            level = SDES[name].at(t)
            x = points(problem.target, level)
            found = problem.target.score_fn(SDES[name])(x, level).score
            expected = problem.score_fn(x, level).score
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


# --- covariances, moments, samples ---------------------------------------------------------------


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


# --- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("per_sample", [False, True], ids=["0-d", "(B,)"])
@pytest.mark.parametrize("target_name", NAMES)
def test_a_sample_never_depends_on_its_batch(
    target_name: str, per_sample: bool, dtype: torch.dtype
) -> None:
    # Bit for bit: vectorised loops have tails, and matrix products sum in an order that depends
    # on the batch; sizes of 1, 3, 5, 7, 13 and more meet both.
    target, sde = target_of(target_name), VPSDE()
    n = 61
    x = target.sample(n, seed=1)[0].to(dtype) + 0.1
    labels = torch.arange(n) % target.num_classes
    scales = torch.linspace(0, 3, n)
    times = torch.linspace(0.01, 1, n, dtype=torch.float64) if per_sample else torch.tensor(0.3)
    level = sde.at(times.double())
    functions = {
        "score": target.score_fn(sde),
        "conditional": target.score_fn(sde, label=labels),
        "one class": target.score_fn(sde, label=0),
        "classifier": classifier_guided(
            target.score_fn(sde), target.classifier(sde), labels, scales
        ),
        "cfg": classifier_free_guided(target.model(sde), labels, scales),
        "cfg, one scale": classifier_free_guided(target.model(sde), labels, 2.5, (0.1, 3.0)),
        "rescaled": classifier_free_guided(target.model(sde), labels, 2.5, rescale=0.5),
    }
    with torch.no_grad():
        for name, score_fn in functions.items():
            whole = score_fn(x, level).score
            assert whole.dtype == dtype
            for sizes in ([1] * n, [60, 1], [3, 5, 7, 13, 33], [32, 29]):
                parts = []
                for chosen in torch.arange(n).split(sizes):
                    own = level.map(lambda f, c=chosen: f[c]) if per_sample else level
                    parts.append(select(score_fn, chosen)(x[chosen], own).score)
                assert torch.equal(torch.cat(parts), whole), (name, sizes)
            log_prob = target.log_prob_at(x, level)
            own = [
                level.map(lambda f, i=i: f[i : i + 1]) if per_sample else level for i in range(n)
            ]
            singly = [target.log_prob_at(x[i : i + 1], own[i]) for i in range(n)]
            assert torch.equal(torch.cat(singly), log_prob)


def test_samples_may_come_in_any_order() -> None:
    target, sde = target_of("gmm16"), VPSDE()
    x, _ = target.sample(40, seed=3)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    score_fn = target.score_fn(sde)
    level = sde.at(0.2)
    assert torch.equal(score_fn(x[order], level).score, score_fn(x, level).score[order])


# --- errors --------------------------------------------------------------------------------------

M, V = torch.zeros(2, 3), torch.ones(2)
NAN = math.nan


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: GaussianMixture(torch.zeros(3), V), r"means must have shape \(K, D\), got \(3,\)"),
        (lambda: GaussianMixture(torch.zeros(0, 3), V), "means"),
        (lambda: GaussianMixture(torch.full((2, 3), NAN), V), "means must be finite"),
        (lambda: GaussianMixture(M, torch.ones(3)), "covariances must have shape"),
        (lambda: GaussianMixture(M, torch.ones(2, 2)), "covariances must have shape"),
        (lambda: GaussianMixture(M, torch.ones(2, 3, 2)), "covariances must have shape"),
        (lambda: GaussianMixture(M, torch.tensor([1.0, NAN])), "covariances must be finite"),
        (lambda: GaussianMixture(M, torch.tensor([1.0, -1.0])), "positive semidefinite.*-1"),
        (
            lambda: GaussianMixture(torch.zeros(1, 2), torch.tensor([[[1.0, 2.0], [2.0, 1.0]]])),
            "positive semidefinite",
        ),
        (
            lambda: GaussianMixture(torch.zeros(1, 2), torch.tensor([[[1.0, 0.5], [0.2, 1.0]]])),
            "symmetric",
        ),
        (lambda: GaussianMixture(M, V, torch.ones(3)), "weights"),
        (lambda: GaussianMixture(M, V, torch.tensor([1.0, 0.0])), "weights"),
        (lambda: GaussianMixture(M, V, torch.tensor([1.0, -0.5])), "weights"),
        (lambda: GaussianMixture(M, V, torch.tensor([1.0, NAN])), "weights must be finite"),
        (lambda: GaussianMixture(M, V, labels=torch.tensor([0])), "labels"),
        (lambda: GaussianMixture(M, V, labels=torch.tensor([0.0, 1.0])), "labels"),
        (lambda: GaussianMixture(M, V, labels=torch.tensor([-1, 0])), "labels"),
        (lambda: GaussianMixture(M, V, labels=torch.tensor([0, 2])), r"missing: \[1\]"),
        (lambda: target_of("ring").conditional(8), r"label must lie in 0\.\.7.*got 8"),
        (lambda: target_of("ring").score_fn(VPSDE(), label=-1), "label.*-1"),
        (lambda: target_of("ring").score_fn(VPSDE(), label=torch.tensor([9])), "label.*9"),
        (lambda: target_of("ring").log_prob(torch.zeros(4, 3)), r"x must have shape \(B, 2\)"),
        (lambda: target_of("ring").log_prob(torch.zeros(2)), r"x must have shape \(B, 2\)"),
    ],
    ids=range(23),
)
def test_a_wrong_argument_is_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_weights_are_normalised_and_equal_by_default() -> None:
    assert GaussianMixture(M, V).weights.tolist() == [0.5, 0.5]
    assert GaussianMixture(M, V, torch.tensor([1.0, 3.0])).weights.tolist() == [0.25, 0.75]
    assert GaussianMixture(M, V).num_classes == 1
