"""What a model hands its network besides the state: time labels and class labels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sde_diffusion import (
    EDMSDE,
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
from sde_diffusion.prediction import select
from tests.problems import SHORT_BETAS
from tests.recorder import Recorder

# --- time labels ---------------------------------------------------------------------------------

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
