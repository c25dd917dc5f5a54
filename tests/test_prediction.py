"""One estimate in four forms, and networks of every kind read as the same estimate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sde_diffusion import (
    EDMSDE,
    VESDE,
    VPSDE,
    EDMModel,
    EpsModel,
    NoiseLevel,
    Prediction,
    ScoreModel,
    VModel,
    X0Model,
    bind,
)
from sde_diffusion.parametrization import ParametrizedModel
from sde_diffusion.prediction import cost_of
from tests.problems import SDES, inner_times
from tests.recorder import Recorder

FORMS = ("x0", "eps", "score", "v")
EVENTS = [(3,), (2, 4, 5), ()]


def column(value: Tensor, x: Tensor) -> Tensor:
    """A 0-d or ``(B,)`` value against ``(B, *event)``, written apart from ``broadcast.expand``."""
    return value if value.ndim == 0 else value.reshape(-1, *[1] * (x.ndim - 1))


def truth(
    level: NoiseLevel, event: tuple[int, ...], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, dict[str, Tensor]]:
    """A state made from a known x0 and eps, and all four forms by their definitions."""
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 4, *event, generator=generator, dtype=torch.float64)
    alpha, sigma = column(level.alpha.double(), x0), column(level.sigma.double(), x0)
    forms = {"x0": x0, "eps": eps, "score": -eps / sigma, "v": alpha * eps - sigma * x0}
    return (alpha * x0 + sigma * eps).to(dtype), {k: v.to(dtype) for k, v in forms.items()}


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("per_sample", [False, True], ids=["0-d", "(B,)"])
@pytest.mark.parametrize("given", FORMS)
def test_every_form_reads_as_every_other(
    name: str, event: tuple[int, ...], per_sample: bool, given: str
) -> None:
    sde = SDES[name]
    times = inner_times(sde, 4)
    levels = (
        [sde.at(torch.tensor(times, dtype=torch.float64))]
        if per_sample
        else [sde.at(t) for t in times]
    )
    for level in levels:
        x, forms = truth(level, event)
        prediction: Prediction = getattr(Prediction, f"from_{given}")(x, level, forms[given])
        assert prediction.x is x
        assert prediction.level is level
        for form in FORMS:
            found, expected = getattr(prediction, form), forms[form]
            assert found.shape == x.shape
            assert found.dtype == torch.float64
            error = (found - expected).abs().reshape(4, -1).amax(1)
            assert (error < 1e-12 * rounding_scale(expected, x, level)).all()
        assert getattr(prediction, given) is forms[given]


def rounding_scale(expected: Tensor, x: Tensor, level: NoiseLevel) -> Tensor:
    """Per sample, what an ulp is relative to: every way from form to form divides by alpha or by
    sigma, so an ulp of x counts up to sigma/alpha (150 on VP) or 1/sigma (500 on EDM) times."""
    growth = torch.maximum(1 / level.sigma, level.sigma / level.alpha).clamp_min(1)
    return expected.abs().reshape(4, -1).amax(1) + x.abs().reshape(4, -1).amax(1) * growth


@pytest.mark.parametrize("given", FORMS)
def test_float32_predictions_stay_float32_with_float64_levels(given: str) -> None:
    # Levels in `sample` are float64 whatever the state's dtype.
    for t in (0.4, torch.tensor([0.1, 0.4, 0.7, 0.9], dtype=torch.float64)):
        level = VPSDE().at(t)
        x, forms = truth(level, (3,), torch.float32)
        prediction = getattr(Prediction, f"from_{given}")(x, level, forms[given])
        for form in FORMS:
            found = getattr(prediction, form)
            assert found.dtype == torch.float32
            # Amplifications at these levels are below 20 in all: 1e-5 is 80 ulps.
            torch.testing.assert_close(found, forms[form], rtol=1e-5, atol=1e-5)


def test_a_form_is_computed_once() -> None:
    prediction = Prediction.from_eps(torch.ones(2, 3), VPSDE().at(0.5), torch.ones(2, 3))
    assert prediction.x0 is prediction.x0
    assert prediction.score is prediction.score
    assert prediction.v is prediction.v


# --- networks ------------------------------------------------------------------------------------


def known_x0(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """The estimate that all the networks below mean: some smooth function of their inputs."""
    t, label = column(t, x), column(label, x)
    return torch.tanh(0.3 * x + 0.1 * t) + 0.2 * label


class Reparametrized(nn.Module):
    """A network whose output is ``known_x0`` in some form, written from the definitions."""

    num_classes = 3
    null_label = 3

    def __init__(self, form: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], sde: Any) -> None:
        super().__init__()
        self.form = form
        self.sde = sde

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        level = self.sde.at(t)
        alpha, sigma = column(level.alpha, x), column(level.sigma, x)
        return self.form(x, known_x0(x, t, label), alpha, sigma)


class Preconditioned(nn.Module):
    """EDM's F for ``known_x0``, from Karras et al. 2022, eq. 7: it sees c_in x and log(s)/4 only
    and has to undo both."""

    num_classes = 3
    null_label = 3

    def __init__(self, sde: Any, sigma_data: float) -> None:
        super().__init__()
        self.sde = sde
        self.sigma_data = sigma_data

    def forward(self, scaled: Tensor, c_noise: Tensor, label: Tensor) -> Tensor:
        s = torch.exp(4 * c_noise)
        t = self.sde.time(-torch.log(s))
        alpha = self.sde.at(t).alpha
        s, alpha = column(s, scaled), column(alpha, scaled)
        total = s**2 + self.sigma_data**2
        y = scaled * total.sqrt()  # y = x / alpha, c_in = 1/sqrt(total)
        c_skip, c_out = self.sigma_data**2 / total, s * self.sigma_data / total.sqrt()
        return (known_x0(alpha * y, t, label) - c_skip * y) / c_out


def models(sde: Any) -> dict[str, ParametrizedModel]:
    def eps(x: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x - alpha * x0) / sigma

    return {
        "x0": X0Model(Reparametrized(lambda x, x0, a, s: x0, sde), sde),
        "eps": EpsModel(Reparametrized(eps, sde), sde),
        "v": VModel(Reparametrized(lambda x, x0, a, s: a * eps(x, x0, a, s) - s * x0, sde), sde),
        "score": ScoreModel(Reparametrized(lambda x, x0, a, s: -eps(x, x0, a, s) / s, sde), sde),
        "blind score": ScoreModel(
            Reparametrized(lambda x, x0, a, s: -eps(x, x0, a, s), sde), sde, divide_by_sigma=True
        ),
        "edm": EDMModel(Preconditioned(sde, 0.7), sde, sigma_data=0.7),
    }


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("event", EVENTS)
def test_networks_of_every_kind_mean_the_same(name: str, event: tuple[int, ...]) -> None:
    sde = SDES[name]
    times = torch.tensor(inner_times(sde, 6)[1:-1], dtype=torch.float64)
    label = torch.tensor([0, 2, 1, 2])
    generator = torch.Generator().manual_seed(0)
    for level in (sde.at(times), sde.at(times[1])):
        x = torch.randn(4, *event, generator=generator, dtype=torch.float64)
        x = x * column(level.alpha + level.sigma, x)
        expected = known_x0(x, level.t, label)
        for kind, model in models(sde).items():
            # Through eps or the score, an ulp of x counts sigma/alpha or alpha/sigma times,
            # below 1e3 at these levels; the tabulated and the cosine time are inverted to 1e-12.
            torch.testing.assert_close(
                model(x, level, label).x0, expected, rtol=1e-9, atol=1e-9, msg=kind
            )
            bound = bind(model, label)
            assert (bound(x, level).x0 == model(x, level, label).x0).all()
            assert cost_of(bound, level) == 1


@pytest.mark.parametrize("sde", [VESDE(), EDMSDE()], ids=["ve", "edm"])
def test_edm_preconditioning_is_karras_table_1(sde: Any) -> None:
    seen = Recorder()
    model = EDMModel(seen, sde, sigma_data=0.5)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t = torch.tensor(inner_times(sde, 5), dtype=torch.float64)
    sigma = sde.at(t).sigma[:, None]
    found = model(x, sde.at(t)).x0
    c_skip = 0.25 / (sigma**2 + 0.25)
    c_out = sigma * 0.5 / (sigma**2 + 0.25).sqrt()
    c_in = 1 / (sigma**2 + 0.25).sqrt()
    inputs, c_noise = seen.calls[0][:2]
    # The same few operations in another order: ulps.
    torch.testing.assert_close(inputs, c_in * x, rtol=1e-13, atol=0)
    torch.testing.assert_close(c_noise, sigma[:, 0].log() / 4, rtol=1e-13, atol=1e-14)
    expected = c_skip * x + c_out * Recorder.output(c_in * x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_edm_model_keeps_float32_with_float64_levels() -> None:
    for level in (VPSDE().at(0.3), VPSDE().at(torch.tensor([0.3, 0.5]).double())):
        seen = Recorder()
        prediction = EDMModel(seen, VPSDE())(torch.ones(2, 3), level)
        inputs, c_noise = seen.calls[0][:2]
        assert inputs.dtype == c_noise.dtype == prediction.x0.dtype == torch.float32


@pytest.mark.parametrize("sigma_data", [0.0, -1.0, math.nan])
def test_sigma_data_must_be_positive(sigma_data: float) -> None:
    with pytest.raises(ValueError, match="sigma_data"):
        EDMModel(Recorder(), VPSDE(), sigma_data=sigma_data)
