"""Guidance against exact conditional scores, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sde_diffusion import (
    EDMSDE,
    VPSDE,
    EpsModel,
    NoiseLevel,
    classifier_free_guided,
    classifier_guided,
    named_target,
)
from sde_diffusion.prediction import cost_of, select
from sde_diffusion.sde import HostedLevel
from solvers import EulerMaruyama, sample
from tests.guided import GUIDANCES, assert_scores_agree, states, target_of
from tests.problems import EXACT_TARGETS, SDES, inner_times


@pytest.mark.parametrize("guidance", GUIDANCES)
@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("target_name", EXACT_TARGETS)
def test_at_scale_1_guidance_is_the_exact_conditional_score(
    target_name: str, name: str, guidance: str
) -> None:
    target, sde = target_of(target_name), SDES[name]
    for label in sorted({0, target.num_classes - 1}):
        exact = target.score_fn(sde, label=label)
        for t in inner_times(sde, 4):
            x, level = states(target, sde, t), sde.at(t)
            expected = exact(x, level).score
            # A number takes the shortcut where there is one; tensors go the whole way.
            for scale in (1.0, torch.tensor(1.0), torch.ones(len(x), dtype=torch.float64)):
                guided = GUIDANCES[guidance](target, sde, label, scale)
                assert_scores_agree(guided(x, level).score, expected)


@pytest.mark.parametrize("guidance", GUIDANCES)
@pytest.mark.parametrize("name", SDES)
def test_per_sample_labels_levels_and_scales(name: str, guidance: str) -> None:
    target, sde = target_of("ring"), SDES[name]
    times = torch.tensor(inner_times(sde, 8), dtype=torch.float64)
    labels = torch.arange(8).flip(0)
    scales = torch.tensor([0.0, 1.0, 0.5, 2.0, 3.0, -1.0, 1.0, 7.5], dtype=torch.float64)
    x = states(target, sde, 0.3, 8)
    guided = GUIDANCES[guidance](target, sde, labels, scales)
    found = guided(x, sde.at(times)).score
    for i, t in enumerate(times.tolist()):
        null, conditional = (
            score_fn(x[i : i + 1], sde.at(t)).score
            for score_fn in (target.score_fn(sde), target.score_fn(sde, label=int(labels[i])))
        )
        assert_scores_agree(found[i : i + 1], null + scales[i] * (conditional - null))
    # A part of the batch keeps its own labels and scales.
    chosen = torch.tensor([5, 2, 7])
    part = select(guided, chosen)(x[chosen], sde.at(times[chosen])).score
    assert (part == found[chosen]).all()


@pytest.mark.parametrize("guidance", GUIDANCES)
@pytest.mark.parametrize("gamma", [-0.5, 0.0, 0.3, 1.0, 3.0])
def test_general_scale(guidance: str, gamma: float) -> None:
    target, sde = target_of("gmm16"), SDES["subvp"]
    for t in inner_times(sde, 3):
        x, level = states(target, sde, t), sde.at(t)
        null, conditional = target.score_fn(sde), target.score_fn(sde, label=2)
        s0, s1 = null(x, level).score, conditional(x, level).score
        for scale in (gamma, torch.tensor(gamma, dtype=torch.float64)):
            found = GUIDANCES[guidance](target, sde, 2, scale)(x, level).score
            assert_scores_agree(found, s0 + gamma * (s1 - s0))


def test_scale_0_is_the_unconditional_score_itself() -> None:
    target, sde = target_of("ring"), VPSDE()
    score_fn = target.score_fn(sde)
    assert classifier_guided(score_fn, target.classifier(sde), 1, 0.0) is score_fn
    x, level = states(target, sde, 0.4), sde.at(0.4)
    found = classifier_free_guided(target.model(sde), 1, 0.0)(x, level).score
    assert (found == score_fn(x, level).score).all()


@pytest.mark.parametrize("guidance", GUIDANCES)
def test_float32_states_stay_float32(guidance: str) -> None:
    target, sde = target_of("moons"), VPSDE()
    level = sde.at(0.4)
    wide = states(target, sde, 0.4)
    expected = target.score_fn(sde, label=1)(wide, level).score
    for scale in (1.0, torch.tensor(1.0).double(), torch.ones(24).double()):
        found = GUIDANCES[guidance](target, sde, 1, scale)(wide.float(), level).score
        assert found.dtype == torch.float32
        # float32 of x (2 ulps of it, times the score's slope 1/sigma^2 < 10): 1e-5 suffices.
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


# --- cost ----------------------------------------------------------------------------------------


class CountingNet(nn.Module):
    """A small conditional network that counts its calls and remembers their sizes."""

    num_classes = 3

    def __init__(self, null_label: int | None = 3) -> None:
        super().__init__()
        if null_label is not None:
            self.null_label = null_label
        self.sizes: list[int] = []
        self.shift = nn.Parameter(torch.linspace(-1, 1, 8).reshape(4, 2))

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        self.sizes.append(len(x))
        assert time.shape == (len(x),)
        label = torch.full((len(x),), 3) if label is None else label
        assert label.shape == (len(x),)
        shift = self.shift[label].reshape(len(x), *[1] * (x.ndim - 2), 2)
        return torch.tanh(x * (1 + time.reshape(-1, *[1] * (x.ndim - 1))) + shift.to(x.dtype))


@pytest.mark.parametrize("scale, passes", [(0.0, 1), (1.0, 1), (2.0, 2), (torch.tensor(1.0), 2)])
def test_cfg_costs_one_pass_at_0_and_1_and_one_batched_forward_otherwise(
    scale: Any, passes: int
) -> None:
    net = CountingNet()
    guided = classifier_free_guided(EpsModel(net, VPSDE()), 1, scale)
    for level in (VPSDE().at(0.3), VPSDE().at(torch.linspace(0.1, 1, 5))):
        net.sizes.clear()
        guided(torch.zeros(5, 2), level)
        assert net.sizes == [5 * passes]
        assert cost_of(guided, level) == passes
    solution = sample(guided, VPSDE(), EulerMaruyama(), shape=(5, 2), steps=7)
    assert (solution.nfe, solution.network_passes) == (7, 7 * passes)


def test_cfg_without_a_null_label_calls_twice_and_says_so() -> None:
    net = CountingNet(null_label=None)
    batched = classifier_free_guided(EpsModel(CountingNet(), VPSDE()), 1, 2.0)
    guided = classifier_free_guided(EpsModel(net, VPSDE()), 1, 2.0)
    x, level = torch.linspace(-2, 2, 10).reshape(5, 2), VPSDE().at(0.3)
    # Two halves of one forward and two forwards: the same elementwise operations.
    torch.testing.assert_close(guided(x, level).eps, batched(x, level).eps)
    assert net.sizes == [5, 5]
    assert cost_of(guided, level) == 2


def test_cfg_on_events_of_several_dimensions() -> None:
    model = EpsModel(CountingNet(), VPSDE())
    x = torch.randn(3, 4, 5, 2, generator=torch.Generator().manual_seed(0))
    level = VPSDE().at(torch.tensor([0.2, 0.5, 0.9]))
    labels, scales = torch.tensor([0, 1, 2]), torch.tensor([0.5, 2.0, 3.0])
    found = classifier_free_guided(model, labels, scales)(x, level).eps
    null, conditional = model(x, level, None).eps, model(x, level, labels).eps
    expected = null + scales[:, None, None, None] * (conditional - null)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("scale, passes", [(0.0, 1), (1.0, 2), (2.5, 2)])
def test_classifier_guidance_costs_the_score_and_the_classifier(scale: float, passes: int) -> None:
    target, sde = target_of("ring"), VPSDE()
    guided = classifier_guided(target.score_fn(sde), target.classifier(sde), 0, scale)
    assert cost_of(guided, sde.at(0.5)) == passes
    solution = sample(guided, sde, EulerMaruyama(), shape=(5, 2), steps=4)
    assert (solution.nfe, solution.network_passes) == (4, 4 * passes)


def test_the_exact_conditional_costs_one() -> None:
    score_fn = target_of("ring").score_fn(VPSDE(), label=torch.tensor([1, 2]))
    assert cost_of(score_fn, VPSDE().at(0.5)) == 1


# --- interval and rescale ------------------------------------------------------------------------


@pytest.mark.parametrize("sde", [VPSDE(), EDMSDE()], ids=["vp", "edm"])
@pytest.mark.parametrize("gamma", [0.0, 3.0])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_interval_is_in_sigma_over_alpha(sde: Any, gamma: float, as_tensor: bool) -> None:
    target = target_of("ring")
    low, high = 0.5, 2.0
    scale = torch.tensor(gamma, dtype=torch.float64) if as_tensor else gamma
    guided = classifier_free_guided(target.model(sde), 3, scale, interval=(low, high))
    null, conditional = target.score_fn(sde), target.score_fn(sde, label=3)
    ratios = torch.tensor([0.1, 0.49, 0.51, 1.0, 1.99, 2.01, 5.0], dtype=torch.float64)
    levels = sde.at(sde.time(-ratios.log()))
    x = states(target, sde, float(levels.t[3]), 7)
    together = guided(x, levels).score
    for i, ratio in enumerate(ratios.tolist()):
        level = levels.map(lambda field, i=i: field[i])
        s0, s1 = null(x, level).score, conditional(x, level).score
        inside = low <= ratio <= high
        expected = s0 + gamma * (s1 - s0) if inside else s1
        assert_scores_agree(guided(x, level).score, expected)
        assert_scores_agree(together[i : i + 1], expected[i : i + 1])
        # The host knows the ratio: the same result, and one pass outside.
        hosted = HostedLevel.of(level, ratio)
        assert_scores_agree(guided(x, hosted).score, expected)
        assert cost_of(guided, hosted) == (2 if inside else 1)
        assert cost_of(guided, level) == 2


def test_interval_saves_passes_in_sample() -> None:
    sde, net = EDMSDE(), CountingNet()
    guided = classifier_free_guided(EpsModel(net, sde), 1, 3.0, interval=(0.5, 5.0))
    times = torch.tensor([40.0, 10.0, 4.0, 1.0, 0.6, 0.3, 0.1], dtype=torch.float64)
    solution = sample(guided, sde, EulerMaruyama(), shape=(2, 2), grid=times)
    assert net.sizes == [2, 2, 4, 4, 4, 2]  # evaluations at all times but the last
    assert (solution.nfe, solution.network_passes) == (6, 9)


def test_interval_does_not_change_scale_1_nor_its_cost() -> None:
    target, sde = target_of("ring"), VPSDE()
    guided = classifier_free_guided(target.model(sde), 3, 1.0, interval=(0.5, 2.0), rescale=0.7)
    x, level = states(target, sde, 0.4), sde.at(0.4)
    assert cost_of(guided, level) == 1
    assert (guided(x, level).score == target.model(sde)(x, level, 3).score).all()


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("event", [(2,), (3, 4, 2)])
def test_rescale_is_lin_et_al_equation_16_in_x0(rescale: float, event: tuple[int, ...]) -> None:
    sde = VPSDE()
    model = EpsModel(CountingNet(), sde)
    x = torch.randn(4, *event, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    level = sde.at(torch.tensor([0.1, 0.3, 0.5, 0.8], dtype=torch.float64))
    labels = torch.tensor([0, 1, 2, 0])
    found = classifier_free_guided(model, labels, 4.0, rescale=rescale)(x, level).x0
    conditional, null = model(x, level, labels).x0, model(x, level, None).x0
    guided = null + 4.0 * (conditional - null)
    for i in range(4):  # per sample, never over the batch
        rescaled = guided[i] * conditional[i].std() / guided[i].std()
        expected = rescale * rescaled + (1 - rescale) * guided[i]
        # x0 from eps divides by alpha, above 0.1 here: a few tens of ulps.
        torch.testing.assert_close(found[i], expected, rtol=1e-12, atol=1e-12)


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("guidance", GUIDANCES)
@pytest.mark.parametrize("target_name", ["ring", "gmm16"])
def test_guidance_works_without_gradients(
    mode: Callable[[], Any], guidance: str, target_name: str
) -> None:
    target, sde = target_of(target_name), VPSDE()
    x = states(target, sde, 0.3)
    expected = target.score_fn(sde, label=1)(x, sde.at(0.3)).score
    with mode():
        guided = GUIDANCES[guidance](target, sde, 1, torch.tensor(1.0))
        inside = x.clone()  # an inference tensor under inference_mode, and a level of such
        for level in (sde.at(0.3), sde.at(torch.full((len(x),), 0.3).double())):
            assert_scores_agree(guided(inside, level).score, expected)
            assert_scores_agree(guided(x, level).score, expected)
        assert not guided(inside, level).score.requires_grad
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_a_target_first_used_in_inference_mode_serves_gradients_later() -> None:
    target, sde = named_target("gmm16"), VPSDE()  # a new one: nothing kept from elsewhere
    x = states(target, sde, 0.3)
    with torch.inference_mode():
        target.score_fn(sde, label=torch.tensor(1))(x, sde.at(0.3))
    guided = classifier_guided(target.score_fn(sde), target.classifier(sde), 1, 1.0)
    expected = target.score_fn(sde, label=1)(x, sde.at(0.3)).score
    assert_scores_agree(guided(x, sde.at(0.3)).score, expected)


@pytest.mark.parametrize("grad", [False, True])
def test_guidance_leaves_the_callers_state_alone(grad: bool) -> None:
    target, sde = target_of("ring"), VPSDE()
    x = states(target, sde, 0.3)
    before = x.clone()
    with torch.set_grad_enabled(grad):
        guided = classifier_guided(target.score_fn(sde), target.classifier(sde), 1, 2.0)
        guided(x, sde.at(0.3))
    assert not x.requires_grad
    assert x.grad is None
    assert (x == before).all()


def test_guidance_leaves_no_gradients_on_the_classifier() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 3)

        def forward(self, x: Tensor, level: NoiseLevel) -> Tensor:
            return self.inner(x)

    classifier, sde = Linear(), VPSDE()
    guided = classifier_guided(target_of("ring").score_fn(sde), classifier, 1, 2.0)
    with torch.no_grad():
        guided(torch.zeros(4, 2), sde.at(0.3))
    assert all(p.grad is None for p in classifier.parameters())


@pytest.mark.parametrize("guidance", GUIDANCES)
@pytest.mark.parametrize("shape", [(), (3,)])
def test_guided_scores_are_differentiable_in_x_and_scale(
    guidance: str, shape: tuple[int, ...]
) -> None:
    # Against finite differences (gradcheck: 1e-6 steps, float64, its own tolerances 1e-5/1e-3):
    # for classifier guidance that is the derivative of a derivative.
    target, sde = target_of("moons"), VPSDE()
    x = states(target, sde, 0.5, 3).requires_grad_()
    scale = torch.full(shape, 1.7, dtype=torch.float64, requires_grad=True)

    def score(x: Tensor, scale: Tensor) -> Tensor:
        return GUIDANCES[guidance](target, sde, 1, scale)(x, sde.at(0.5)).score

    assert torch.autograd.gradcheck(score, (x, scale), atol=1e-5, rtol=1e-3)
