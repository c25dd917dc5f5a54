"""Settings of SDEs: as a configuration, by name, and wrong ones named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch

from sde_diffusion import (
    EDMSDE,
    SDE,
    VESDE,
    VPSDE,
    CosineVPSDE,
    SubVPSDE,
    TabulatedVPSDE,
    named_sde,
    sde_from_config,
)
from tests.problems import SDES, SHORT_BETAS, inner_times


@pytest.mark.parametrize(
    "sde",
    [
        *SDES.values(),
        VPSDE(0.2, 15.0, 1e-4, 0.9),
        CosineVPSDE(s=0.01, t_max=0.9),
        SubVPSDE(t_min=1e-2),
        VESDE(0.02, 9.0, t_min=1e-3),
        EDMSDE(0.01, 10.0, t_min=0.02, t_max=5.0),
        TabulatedVPSDE.from_betas(SHORT_BETAS, t_min=0.01, t_max=0.8),
    ],
    ids=lambda sde: type(sde).__name__,
)
def test_config_survives_json(sde: SDE) -> None:
    again = sde_from_config(json.loads(json.dumps(sde.config())))
    assert type(again) is type(sde)
    assert again == sde
    assert (again.t_min, again.t_max) == (sde.t_min, sde.t_max)
    t = inner_times(sde, 3)[1]
    assert [f.item() for f in again.at(t)] == [f.item() for f in sde.at(t)]


def test_config_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"unknown SDE kind 'VPSED'\. Did you mean 'VPSDE'\?"):
        sde_from_config({"kind": "VPSED"})
    with pytest.raises(ValueError, match="unknown SDE kind None"):
        sde_from_config({})
    with pytest.raises(ValueError, match=r"'VPSDE' do not fit.*sigma_max"):
        sde_from_config({"kind": "VPSDE", "sigma_max": 3.0})
    with pytest.raises(ValueError, match="beta_min"):
        sde_from_config({"kind": "VPSDE", "beta_min": -1.0})


def test_sdes_by_name() -> None:
    for name in ("vp", "cosine", "subvp", "ve", "edm"):
        assert named_sde(name) == SDES[name]
    with pytest.raises(ValueError, match=r"unknown SDE 'subpv'.*'subvp'.*cosine, edm, subvp, ve"):
        named_sde("subpv")


NAN = math.nan
BAD_SETTINGS: list[tuple[Callable[[], SDE], type[Exception], str]] = [
    (lambda: VPSDE(beta_min=0.0), ValueError, "beta_min"),
    (lambda: VPSDE(beta_min=NAN), ValueError, "beta_min"),
    (lambda: VPSDE(beta_min="a"), TypeError, "beta_min"),  # type: ignore[arg-type]
    (lambda: VPSDE(beta_max=0.05), ValueError, "beta_max"),
    (lambda: VPSDE(beta_max=math.inf), ValueError, "beta_max"),
    (lambda: VPSDE(t_min=0.0), ValueError, "t_min"),
    (lambda: VPSDE(t_min=-0.1), ValueError, "t_min"),
    (lambda: VPSDE(t_min=NAN), ValueError, "t_min"),
    (lambda: VPSDE(t_min=1.0), ValueError, "t_min must be below t_max"),
    (lambda: VPSDE(t_max=math.inf), ValueError, "t_max"),
    (lambda: VPSDE(t_max=NAN), ValueError, "t_max"),
    (lambda: VPSDE(t_max=None), TypeError, "t_max"),  # type: ignore[arg-type]
    (lambda: SubVPSDE(beta_min=-1.0), ValueError, "beta_min"),
    (lambda: SubVPSDE(beta_max=0.0), ValueError, "beta_max"),
    (lambda: SubVPSDE(t_min=2.0), ValueError, "t_min"),
    (lambda: CosineVPSDE(s=0.0), ValueError, "s must"),
    (lambda: CosineVPSDE(t_max=1.0), ValueError, "t_max"),
    (lambda: CosineVPSDE(t_max=1.5), ValueError, "t_max"),
    (lambda: CosineVPSDE(t_min=0.0), ValueError, "t_min"),
    (lambda: VESDE(sigma_min=0.0), ValueError, "sigma_min"),
    (lambda: VESDE(sigma_max=0.01), ValueError, "sigma_max"),
    (lambda: VESDE(sigma_max=NAN), ValueError, "sigma_max"),
    (lambda: VESDE(t_min=0.0), ValueError, "t_min"),
    (lambda: EDMSDE(sigma_min=-1.0), ValueError, "sigma_min"),
    (lambda: EDMSDE(sigma_max=0.001), ValueError, "sigma_max"),
    (lambda: EDMSDE(t_min=0.0), ValueError, "t_min"),
    (lambda: EDMSDE(t_min=90.0), ValueError, "t_min"),
    (lambda: EDMSDE(t_max=NAN), ValueError, "t_max"),
    (lambda: TabulatedVPSDE(()), ValueError, "betas is empty"),
    (lambda: TabulatedVPSDE.from_betas([]), ValueError, "betas is empty"),
    (lambda: TabulatedVPSDE.from_betas([0.1, 0.0]), ValueError, r"betas\[1\]"),
    (lambda: TabulatedVPSDE.from_betas([0.1, 0.2, 1.0]), ValueError, r"betas\[2\]"),
    (lambda: TabulatedVPSDE.from_betas([NAN]), ValueError, r"betas\[0\]"),
    (lambda: TabulatedVPSDE.from_betas(torch.zeros(2, 2)), ValueError, "one-dimensional"),
    (lambda: TabulatedVPSDE.from_betas([0.1], t_min=-0.5), ValueError, "t_min"),
    (lambda: TabulatedVPSDE.from_betas([0.1], t_min=1.0), ValueError, "t_min"),
    (lambda: TabulatedVPSDE.from_betas([0.1], t_max=1.5), ValueError, "t_max"),
    (lambda: TabulatedVPSDE.from_betas([0.1], t_max=NAN), ValueError, "t_max"),
]


@pytest.mark.parametrize("make, error, message", BAD_SETTINGS, ids=range(len(BAD_SETTINGS)))
def test_a_wrong_setting_is_named(
    make: Callable[[], SDE], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()
