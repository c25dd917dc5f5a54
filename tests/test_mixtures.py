"""Large mixtures: products in tiles against torch.distributions, autograd and each other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from sde_diffusion import (
    EDMSDE,
    VESDE,
    VPSDE,
    GaussianMixture,
    classifier_free_guided,
    classifier_guided,
)
from sde_diffusion import components as parts
from sde_diffusion.prediction import select
from sde_diffusion.sde import NoiseLevel
from tests.largest import Largest

FORMS = ("one variance", "isotropic", "diagonal", "full")


def large(form: str, count: int = 67, dimension: int = 17) -> GaussianMixture:
    """Just beyond what goes element by element; sizes that no vector register divides."""
    generator = torch.Generator().manual_seed(5)
    means = torch.randn(count, dimension, generator=generator, dtype=torch.float64)
    spread = 0.05 + torch.rand(count, dimension, generator=generator, dtype=torch.float64)
    covariances = {
        "one variance": torch.full((count,), 0.1),
        "isotropic": spread[:, 0],
        "diagonal": spread,
        "full": None,
    }[form]
    if covariances is None:
        root = torch.randn(count, dimension, dimension, generator=generator, dtype=torch.float64)
        covariances = 0.1 * root @ root.mT + 0.02 * torch.eye(dimension, dtype=torch.float64)
    weights = 0.2 + torch.rand(count, generator=generator, dtype=torch.float64)
    return GaussianMixture(means, covariances, weights, torch.arange(count) % 3)


def reference(target: GaussianMixture, level: NoiseLevel, label: int | None) -> MixtureSameFamily:
    keep = slice(None) if label is None else target.labels == label
    eye = torch.eye(target.dimension, dtype=torch.float64)
    covariances = level.alpha**2 * target._full_covariances()[keep] + level.sigma**2 * eye
    components = MultivariateNormal(level.alpha * target.means[keep], covariances)
    return MixtureSameFamily(Categorical(target.weights[keep]), components)


def points(target: GaussianMixture, level: NoiseLevel, n: int) -> Tensor:
    x0, _ = target.sample(n, seed=1, dtype=torch.float64)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return level.alpha * x0 + level.sigma * noise


@pytest.mark.parametrize("per_sample", [False, True], ids=["0-d", "(B,)"])
@pytest.mark.parametrize("form", FORMS)
def test_products_are_the_closed_form(form: str, per_sample: bool) -> None:
    target, sde = large(form), VPSDE()
    assert target.means.numel() > parts.SMALL
    for t in (0.001, 0.2, 1.0):
        level = sde.at(t)
        x = points(target, level, 40)  # more than a tile
        argument = level.per_sample(len(x)) if per_sample else level
        labels = torch.arange(len(x)) % 3
        by_class = target.score_fn(sde, labels)(x, argument).score
        for label in (None, 0, 1, 2):
            law = reference(target, level, label)
            inputs = x.clone().requires_grad_()
            wanted = law.log_prob(inputs)
            (score,) = torch.autograd.grad(wanted.sum(), inputs)
            # Sums of squares of order 1e4 at small t, each good to its ulp: 1e-12, times the
            # condition of the covariance, up to 1e2.
            scale = score.abs().amax(1, keepdim=True).clamp_min(1)
            found = target.score_fn(sde, label)(x, argument).score
            assert ((found - score).abs() < 1e-9 * scale).all()
            if label is None:
                mine = target.log_prob_at(inputs, argument)
                torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-9)
                (gradient,) = torch.autograd.grad(mine.sum(), inputs)
                assert ((gradient - score).abs() < 1e-9 * scale).all()
            else:
                chosen = labels == label
                assert ((by_class - score).abs() < 1e-9 * scale)[chosen].all()
        joint = torch.stack(
            [
                reference(target, level, c).log_prob(x)
                + target.weights[target.labels == c].sum().log()
                for c in range(3)
            ],
            1,
        )
        logits = target.classifier(sde)(x, argument)
        torch.testing.assert_close(logits, joint, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_small_and_large_ways_agree(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target, level = large(form), VESDE().at(0.4)
    x = points(target, level, 50)
    by_products = target.log_prob_at(x, level), target.predict(x, level).score
    monkeypatch.setattr(parts, "SMALL", 10**9)
    again = large(form)
    assert by_products[1] is not None
    torch.testing.assert_close(again.log_prob_at(x, level), by_products[0], rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(again.predict(x, level).score, by_products[1], rtol=1e-9, atol=1e-11)
    monkeypatch.setattr(parts, "BUDGET", 3 * target.means.numel())  # and in chunks of three
    chunked = large(form)
    assert torch.equal(chunked.predict(x, level).score, again.predict(x, level).score)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("per_sample", [False, True], ids=["0-d", "(B,)"])
@pytest.mark.parametrize("form", FORMS)
def test_a_sample_never_depends_on_its_batch_or_the_threads(form: str, per_sample: bool) -> None:
    target, sde, n = large(form, 211, 33), VPSDE(), 75
    x = target.sample(n, seed=1, dtype=torch.float64)[0] + 0.1
    labels = torch.arange(n) % 3
    times = torch.linspace(0.01, 1, n, dtype=torch.float64) if per_sample else torch.tensor(0.3)
    level = sde.at(times.double())
    functions = {
        "score": target.score_fn(sde),
        "conditional": target.score_fn(sde, label=labels),
        "cfg": classifier_free_guided(target.model(sde), labels, 2.0),
        "classifier": classifier_guided(
            target.score_fn(sde), target.classifier(sde), labels, scale=2.0
        ),
    }
    before = torch.get_num_threads()
    with torch.no_grad():
        for name, score_fn in functions.items():
            whole = score_fn(x, level).score
            # A gradient is taken on as many threads as there are, in another order of summing.
            with threads(before if name == "classifier" else 2):
                assert torch.equal(score_fn(x, level).score, whole), name
            for sizes in ([1, 2, 3, 5, 7, 13, 31, 13], [32, 43], [74, 1]):
                found = []
                for chosen in torch.arange(n).split(sizes):
                    own = level.map(lambda f, c=chosen: f[c]) if per_sample else level
                    found.append(select(score_fn, chosen)(x[chosen], own).score)
                assert torch.equal(torch.cat(found), whole), (name, sizes)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
        own = level.map(lambda f: f[order]) if per_sample else level
        for read in (target.log_prob_at, target.class_logits):
            assert torch.equal(read(x[order], own), read(x, level)[order])
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("per_sample", [False, True], ids=["0-d", "(B,)"])
@pytest.mark.parametrize("form", FORMS)
def test_memory_does_not_grow_with_batch_times_components(form: str, per_sample: bool) -> None:
    count, dimension, n = (40, 64, 3000) if form == "full" else (300, 64, 700)
    target, level = large(form, count, dimension), VPSDE().at(0.3)
    x = points(target, level, n)
    level = level.per_sample(n) if per_sample else level
    target.predict(x[:1], level.map(lambda f: f[:1]) if per_sample else level)
    with torch.no_grad(), Largest() as largest:
        target.predict(x, level)
        target.log_prob_at(x, level)
    own = count * dimension**2 if form == "full" else count * dimension
    assert largest.numbers <= max(parts.BUDGET, n * dimension, own) < n * count * dimension


def test_small_mixtures_are_cut_too(monkeypatch: pytest.MonkeyPatch) -> None:
    target = GaussianMixture(torch.eye(5), torch.ones(5))
    x, level = torch.randn(100, 5, generator=torch.Generator().manual_seed(0)), VPSDE().at(0.5)
    whole = target.predict(x, level).score
    monkeypatch.setattr(parts, "BUDGET", 300)
    again = GaussianMixture(torch.eye(5), torch.ones(5))
    with Largest() as largest:
        assert torch.equal(again.predict(x, level).score, whole)
    assert largest.numbers <= 500  # the samples themselves; all differences would be 2,500


@pytest.mark.parametrize("form", FORMS)
def test_far_from_the_origin_no_digits_are_lost(form: str) -> None:
    # Products about the origin would cancel terms of 1e6 * 17 / 0.01^2, good to 2e-5 at best.
    target, level = large(form), VESDE().at(0.0)
    x = points(target, level, 20)
    far = 1024.0
    x = (x * 2**20).round() / 2**20  # so that x + 1024 is exact
    target.means = (target.means * 2**20).round() / 2**20
    moved = GaussianMixture(
        target.means + far, target._covariances(), target.weights, target.labels
    )
    torch.testing.assert_close(
        moved.log_prob_at(x + far, level), target.log_prob_at(x, level), rtol=0, atol=1e-7
    )


@pytest.mark.parametrize("form", FORMS)
def test_moments_and_samples(form: str) -> None:
    target, n = large(form), 20_000
    law = reference(target, NoiseLevel(*torch.tensor([0.0, 1, 0, 0, 0, 0]).double()), None)
    torch.testing.assert_close(target.mean(), law.mean, rtol=1e-12, atol=1e-12)
    covariance = target.covariance()
    torch.testing.assert_close(covariance.diagonal(), law.variance, rtol=1e-10, atol=1e-12)
    x, labels = target.sample(n, seed=0, dtype=torch.float64)
    error = (covariance.diagonal() / n).sqrt()
    assert ((x.mean(0) - target.mean()).abs() < 5 * error).all()  # 17 numbers: 1e-5 by chance
    for c in range(3):
        p = float(target.weights[target.labels == c].sum())
        assert abs(float((labels == c).double().mean()) - p) < 5 * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("form", ["one variance", "diagonal"])
def test_four_thousand_dimensions(form: str) -> None:
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(50, 4096, generator=generator, dtype=torch.float64)
    variances = torch.full((50, 4096), 0.2, dtype=torch.float64)
    if form == "diagonal":
        variances[:, ::2] = 0.4
    target, sde = GaussianMixture(means, variances), EDMSDE()
    level = sde.at(0.5)
    x = points(target, level, 4)
    law = torch.distributions.Independent(
        torch.distributions.Normal(means, (variances + level.sigma**2).sqrt()), 1
    )
    wanted = MixtureSameFamily(Categorical(target.weights), law).log_prob(x)
    torch.testing.assert_close(target.log_prob_at(x, level), wanted, rtol=1e-11, atol=0)


def test_event_shapes_are_kept() -> None:
    flat = large("isotropic", 100, 12)
    shaped = GaussianMixture(
        flat.means, flat.variances, flat.weights, flat.labels, event_shape=(3, 2, 2)
    )
    sde, level = VPSDE(), VPSDE().at(0.3)
    x, labels = flat.sample(9, seed=3)
    drawn, same = shaped.sample(9, seed=3)
    assert torch.equal(drawn, x.reshape(9, 3, 2, 2))
    assert torch.equal(same, labels)
    for label in (None, 1, labels):
        found = shaped.score_fn(sde, label)
        assert found.event_shape == (3, 2, 2)
        wanted = flat.score_fn(sde, label)(x, level).score
        assert torch.equal(found(drawn, level).score, wanted.reshape(9, 3, 2, 2))
    assert torch.equal(shaped.log_prob(drawn), flat.log_prob(x))
    assert torch.equal(shaped.classifier(sde)(drawn, level), flat.classifier(sde)(x, level))
    assert shaped.score_fn(sde)(drawn[:0], level).score.shape == (0, 3, 2, 2)
    with pytest.raises(ValueError, match=r"x must have shape \(B, 3, 2, 2\), got \(9, 12\)"):
        shaped.log_prob(x)
    with pytest.raises(ValueError, match=r"event_shape must hold the 12 numbers.*\(5, 2\)"):
        GaussianMixture(flat.means, flat.variances, event_shape=(5, 2))
