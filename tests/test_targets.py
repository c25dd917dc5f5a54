"""Exact targets against torch.distributions, autograd and quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sde_diffusion import VPSDE, GaussianMixture, bind, classifier_free_guided, classifier_guided
from sde_diffusion.prediction import select
from tests.problems import SDES, GaussianProblem, inner_times
from tests.targets import NAMES, points, reference, target_of

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
