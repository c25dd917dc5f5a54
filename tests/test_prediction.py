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
    TabulatedVPSDE,
    VModel,
    X0Model,
    bind,
    continuous_time,
    edm_noise_label,
    scaled_time,
    table_index,
)
from sde_diffusion.parametrization import ParametrizedModel, part_of
from sde_diffusion.prediction import cost_of, select
from tests.problems import SDES, SHORT_BETAS, inner_times

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


# --- time labels ---------------------------------------------------------------------------------


class Recorder(nn.Module):
    """Remembers its arguments."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, ...]] = []
        for key, value in attributes.items():
            setattr(self, key, value)

    @staticmethod
    def output(x: Tensor) -> Tensor:
        return torch.sin(x)

    def forward(self, *arguments: Tensor) -> Tensor:
        self.calls.append(arguments)
        return self.output(arguments[0])


TIMES: list[tuple[str, Any, Any, float]] = [
    ("t", {}, VPSDE(), 0.25),
    ("999 t", {"time_label": scaled_time(999.0)}, VPSDE(), 999 * 0.25),
    ("log sigma / 4", {"time_label": edm_noise_label}, EDMSDE(), math.log(0.25) / 4),
]


@pytest.mark.parametrize("name, settings, sde, expected", TIMES, ids=[row[0] for row in TIMES])
@pytest.mark.parametrize("t", [0.25, torch.full((3,), 0.25).double()], ids=["0-d", "(B,)"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_time_label_reaches_the_network(
    name: str, settings: dict[str, Any], sde: Any, expected: float, t: Any, dtype: torch.dtype
) -> None:
    seen = Recorder()
    EpsModel(seen, sde, **settings)(torch.zeros(3, 2, dtype=dtype), sde.at(t))
    x, label = seen.calls[0]
    assert x.shape == (3, 2)
    assert label.shape == (3,)
    assert label.dtype == dtype
    torch.testing.assert_close(label, torch.full((3,), expected, dtype=dtype))


def test_edm_model_has_its_own_default_label() -> None:
    assert EDMModel(Recorder(), VPSDE()).time_label is edm_noise_label
    assert EpsModel(Recorder(), VPSDE()).time_label is continuous_time


@pytest.mark.parametrize("n", [1, 2, 7, 10, 1000, 4000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_table_index_gives_back_every_index(n: int, dtype: torch.dtype) -> None:
    # Truncation is off by one for 5 of 1,000 indices in float32, and for 24 of 4,000 in float64.
    index = torch.arange(n)
    t = ((index.double() + 1) / n).to(dtype)
    found = table_index(n)(VPSDE().at(t))
    assert found.dtype == torch.long
    assert (found == index).all()


def test_table_index_stays_on_the_table() -> None:
    t = torch.tensor([1e-6, 0.5 / 10, 0.149, 0.151, 1.0], dtype=torch.float64)
    assert table_index(10)(VPSDE().at(t)).tolist() == [0, 0, 0, 1, 9]


def test_table_index_through_a_model_is_whole() -> None:
    sde = TabulatedVPSDE.from_betas(SHORT_BETAS)
    seen = Recorder()
    model = EpsModel(seen, sde, time_label=table_index(20))
    model(torch.zeros(20, 2), sde.at(sde.times))
    assert seen.calls[0][1].dtype == torch.long
    assert seen.calls[0][1].tolist() == list(range(20))


@pytest.mark.parametrize("make", [lambda: table_index(0), lambda: table_index(-3)])
def test_table_index_wants_a_chain(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="n must be at least 1"):
        make()


def test_time_label_settings_are_checked() -> None:
    with pytest.raises(TypeError, match="n must be a whole number"):
        table_index(10.0)  # type: ignore[arg-type]
    for scale in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="scale"):
            scaled_time(scale)


# --- labels --------------------------------------------------------------------------------------


def labels_seen(model: ParametrizedModel, label: Any) -> Tensor | None:
    seen = model.net
    assert isinstance(seen, Recorder)
    bind(model, label)(torch.zeros(3, 2), VPSDE().at(0.5))
    arguments = seen.calls[-1]
    return arguments[2] if len(arguments) == 3 else None


@pytest.mark.parametrize("kind", [EpsModel, X0Model, VModel, ScoreModel, EDMModel])
def test_labels_reach_the_network(kind: type[ParametrizedModel]) -> None:
    model = kind(Recorder(num_classes=4, null_label=4), VPSDE())
    assert model.num_classes == 4
    for label, expected in [
        (2, [2, 2, 2]),
        (0, [0, 0, 0]),
        (torch.tensor([3, 0, 1]), [3, 0, 1]),
        (torch.tensor([3, 0, 1], dtype=torch.int32), [3, 0, 1]),
        (torch.tensor(1), [1, 1, 1]),
        (None, [4, 4, 4]),
    ]:
        found = labels_seen(model, label)
        assert found is not None
        assert found.dtype == torch.long
        assert found.tolist() == expected


def test_null_label_of_the_wrapper_comes_before_the_networks() -> None:
    model = EpsModel(Recorder(num_classes=4, null_label=4), VPSDE(), null_label=0)
    found = labels_seen(model, None)
    assert found is not None
    assert found.tolist() == [0, 0, 0]


def test_a_network_without_labels_is_called_without_one() -> None:
    model = EpsModel(Recorder(), VPSDE())
    assert model.null_label is None
    assert model.num_classes is None
    assert labels_seen(model, None) is None
    assert len(model.net.calls[-1]) == 2  # type: ignore[arg-type]


def test_selecting_part_of_the_batch_selects_its_labels() -> None:
    model = EpsModel(Recorder(num_classes=4, null_label=4), VPSDE())
    x, level = torch.zeros(2, 2), VPSDE().at(0.5)
    chosen = torch.tensor([2, 0])
    select(bind(model, torch.tensor([3, 0, 1])), chosen)(x, level)
    assert model.net.calls[-1][2].tolist() == [1, 3]  # type: ignore[index,union-attr]
    select(bind(model, 2), chosen)(x, level)
    assert model.net.calls[-1][2].tolist() == [2, 2]  # type: ignore[index,union-attr]
    select(bind(model, None), chosen)(x, level)
    assert model.net.calls[-1][2].tolist() == [4, 4]  # type: ignore[index,union-attr]
    assert part_of(torch.tensor(1), chosen) == 1

    def plain(x: Tensor, level: NoiseLevel) -> Prediction:
        return Prediction.from_eps(x, level, x)

    assert select(plain, chosen) is plain


@pytest.mark.parametrize(
    "label, error, message",
    [
        (4, ValueError, r"label must lie in 0\.\.3 \(4 classes\), got 4"),
        (-1, ValueError, r"0\.\.3.*got -1"),
        (torch.tensor([0, 5]), ValueError, r"0\.\.3.*got 5"),
        (torch.tensor([-2, 1]), ValueError, r"0\.\.3.*got -2"),
        (torch.tensor([0.0, 1.0]), ValueError, "integer tensor"),
        (torch.zeros(2, 2, dtype=torch.long), ValueError, "1-d integer tensor"),
        (1.0, TypeError, "label must be an int"),
        (True, TypeError, "label must be an int"),
        ("cat", TypeError, "label must be an int.*'cat'"),
        ([0, 1], TypeError, "label must be an int"),
    ],
)
def test_a_label_that_does_not_fit_is_refused(
    label: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        bind(EpsModel(Recorder(num_classes=4, null_label=4), VPSDE()), label)


@pytest.mark.parametrize("num_classes", [None, 0])
def test_a_label_for_a_network_without_classes_is_refused(num_classes: int | None) -> None:
    model = EpsModel(Recorder(num_classes=num_classes), VPSDE())
    with pytest.raises(ValueError, match="class-conditional"):
        bind(model, 0)
    bind(model, None)
