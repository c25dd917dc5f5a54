"""The catalogue: every solver by name, found without being registered, and settings checked."""

from __future__ import annotations

import inspect
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import solvers
from sde_diffusion import VPSDE
from solvers import Corrector, Integrator, Solver, methods, sample
from solvers import catalogue as catalogue_function
from solvers.catalogue import named, settings_of, snake_case
from tests.problems import IsotropicScore

catalogue = sys.modules["solvers.catalogue"]
ENTRIES = catalogue_function()

NAMES = {
    "adaptive_sde": ("SDE", 2),
    "ancestral": ("SDE", 1),
    "annealed_langevin": ("corrector", None),
    "ddim": ("ODE", 1),
    "euler_maruyama": ("SDE", 1),
    "hold": ("ODE", 0),
    "langevin": ("corrector", None),
    "predictor_corrector": ("SDE", 0),
    "probability_flow": ("ODE", 2),
    "reverse_diffusion": ("SDE", 1),
    "scipy_ode": ("ODE", 5),
    "torchdiffeq_ode": ("ODE", 5),
    "torchsde_sde": ("SDE", None),  # its order is in its own tests
}


@pytest.mark.parametrize("name", NAMES)
def test_the_solvers_that_were_promised_are_there(name: str) -> None:
    kind, order = NAMES[name]
    entry = ENTRIES[name]
    assert entry.kind == kind
    if name != "torchsde_sde":
        assert entry.order == order


def test_names_are_in_alphabetical_order() -> None:
    assert list(ENTRIES) == sorted(ENTRIES)
    assert set(NAMES) <= set(ENTRIES)


@pytest.mark.parametrize("name", ENTRIES)
def test_every_entry(name: str) -> None:
    entry = ENTRIES[name]
    made = entry.type()
    assert entry.name == name == snake_case(entry.type.__name__)
    assert getattr(solvers, entry.type.__name__) is entry.type is named(name)
    assert entry.type.__name__ in dir(solvers)
    assert len(entry.summary) > 20
    assert entry.summary == (entry.type.__doc__ or "").strip().split("\n")[0]
    assert entry.adapter == (".adapters." in entry.type.__module__)
    if isinstance(made, Corrector):
        assert (entry.kind, entry.order) == ("corrector", None)
    else:
        assert isinstance(made, (Solver, Integrator))
        assert entry.kind == ("SDE" if made.stochastic else "ODE")
        assert entry.order == made.order
        assert isinstance(made.order, int) or float(made.order) > 0
    # Settings: JSON that makes the same solver again, except where it nests another.
    settings = settings_of(made)
    assert settings == entry.settings
    assert json.loads(json.dumps(settings)) == settings
    plain = {key: value for key, value in settings.items() if not isinstance(value, dict)}
    assert entry.type(**plain) == made
    with pytest.raises(AttributeError):  # frozen: nothing that evolves lives in a solver
        setattr(made, next(iter(settings), "anything"), 1)


def test_settings_nest() -> None:
    solver = solvers.PredictorCorrector(solvers.Ancestral(0.5), solvers.Langevin(0.1, 3))
    assert settings_of(solver) == {
        "predictor": {"name": "ancestral", "eta": 0.5, "variance": "small"},
        "corrector": {"name": "langevin", "snr": 0.1, "steps": 3, "norm": "expected"},
        "first": "predictor",
    }


@pytest.mark.parametrize(
    "name,expected",
    [
        ("DDIM", "ddim"),
        ("ProbabilityFlow", "probability_flow"),
        ("ScipyODE", "scipy_ode"),
        ("TorchsdeSDE", "torchsde_sde"),
        ("DPMSolverPP", "dpm_solver_pp"),
        ("UniPC", "uni_pc"),
    ],
)
def test_snake_case(name: str, expected: str) -> None:
    assert snake_case(name) == expected


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"unknown solver 'ancestrall'.*mean 'ancestral'"):
        named("ancestrall")
    with pytest.raises(ValueError, match="probability_flow, reverse_diffusion"):
        named("zzz")
    with pytest.raises(AttributeError, match="'EulerMaruyamma'"):
        solvers.EulerMaruyamma  # noqa: B018


# --- a file dropped into methods -----------------------------------------------------------------

DROPPED = '''
"""A user's own file."""
from dataclasses import dataclass
from solvers.base import Solver, Stepped
from solvers.methods.ddim import DDIM  # imported names are not found a second time

@dataclass(frozen=True)
class HalfStep(Solver):
    """Halves the state at every step, whatever the score says."""
    factor: float = 0.5
    order = 1
    stochastic = False

    def step(self, score_fn, x, step, state, noise):
        score_fn(x, step.start)
        return Stepped(self.factor * x, state)

class _Hidden(HalfStep):
    """Not listed."""
'''


@pytest.fixture
def dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "half_step.py").write_text(DROPPED)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    catalogue_function.cache_clear()
    yield
    sys.modules.pop("solvers.methods.half_step", None)
    catalogue_function.cache_clear()


def test_a_new_file_is_found(dropped: None) -> None:
    entries = catalogue_function()
    assert set(entries) - set(ENTRIES) == {"half_step"}
    entry = entries["half_step"]
    assert (entry.kind, entry.order, entry.adapter) == ("ODE", 1, False)
    assert entry.settings == {"factor": 0.5}
    assert entry.summary == "Halves the state at every step, whatever the score says."
    assert entries["ddim"].type is solvers.DDIM
    x = torch.ones(2, 3)
    solver = solvers.HalfStep(0.25)
    assert sample(IsotropicScore(), VPSDE(), solver, x=x, steps=2).x.unique().tolist() == [0.0625]


def test_and_is_gone_with_its_file() -> None:
    assert set(catalogue_function()) == set(ENTRIES)


# --- settings ------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf
INVALID: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("adaptive_sde", {"pair": "sra1"}, TypeError, "pair must be a Solver such as ImprovedEuler"),
    ("adaptive_sde", {"pair": solvers.DDIM(1.0)}, ValueError, "pair must draw noise and estimate"),
    ("adaptive_sde", {"pair": solvers.Tsitouras()}, ValueError, "for the ODE, use sample"),
    ("adaptive_sde", {"rtol": 0}, ValueError, "rtol must be a finite number greater than 0, got 0"),
    ("adaptive_sde", {"atol": NAN}, ValueError, "atol must be a finite number greater than 0"),
    ("adaptive_sde", {"max_steps": 0}, ValueError, "max_steps must be at least 1, got 0"),
    ("ancestral", {"eta": -0.1}, ValueError, r"eta must lie in \[0, 1\], got -0.1"),
    ("ancestral", {"eta": 1.1}, ValueError, r"eta must lie in \[0, 1\], got 1.1"),
    ("ancestral", {"eta": NAN}, ValueError, "eta must be a finite number, got nan"),
    ("ancestral", {"eta": "1"}, TypeError, "eta must be a number, got '1'"),
    ("ancestral", {"variance": "smal"}, ValueError, "unknown variance 'smal'.*mean 'small'"),
    ("ddim", {"eta": 2}, ValueError, r"eta must lie in \[0, 1\], got 2"),
    ("ddim", {"variance": None}, ValueError, "unknown variance None"),
    ("euler_maruyama", {"eta": -1}, ValueError, r"eta must lie in \[0, inf\], got -1"),
    ("euler_maruyama", {"eta": INF}, ValueError, "eta must be a finite number, got inf"),
    ("euler_maruyama", {"eta": None}, TypeError, "eta must be a number, got None"),
    ("langevin", {"snr": 0}, ValueError, "snr must be a finite number greater than 0, got 0"),
    ("langevin", {"snr": NAN}, ValueError, "snr must be a finite number greater than 0, got nan"),
    ("langevin", {"snr": "a"}, TypeError, "snr must be a number, got 'a'"),
    ("langevin", {"steps": 0}, ValueError, "steps must be at least 1, got 0"),
    ("langevin", {"steps": 1.5}, TypeError, "steps must be a whole number, got 1.5"),
    ("langevin", {"steps": True}, TypeError, "steps must be a whole number, got True"),
    ("langevin", {"norm": "expect"}, ValueError, "unknown norm 'expect'.*mean 'expected'"),
    ("annealed_langevin", {"step_size": 0}, ValueError, "step_size must be .* greater than 0"),
    ("annealed_langevin", {"step_size": 2}, ValueError, "step_size must be below 2"),
    ("annealed_langevin", {"steps": -3}, ValueError, "steps must be at least 1, got -3"),
    ("predictor_corrector", {"predictor": "ddim"}, TypeError, "predictor must be a Solver"),
    ("predictor_corrector", {"corrector": None}, TypeError, "corrector must be a Corrector"),
    ("predictor_corrector", {"first": "predict"}, ValueError, "unknown first .*mean 'predictor'"),
    ("probability_flow", {"method": "huen"}, ValueError, "unknown method 'huen'.*mean 'heun'"),
    ("probability_flow", {"method": "dopri5"}, ValueError, "Known: euler, heun, midpoint, rk4"),
    ("probability_flow", {"method": 4}, ValueError, "unknown method 4"),
]


@pytest.mark.parametrize("name,settings,error,message", INVALID)
def test_invalid_settings_are_refused_when_made(
    name: str, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ENTRIES[name].type(**settings)


def test_every_setting_of_the_native_samplers_above_is_among_them() -> None:
    tried = {(name, key) for name, settings, *_ in INVALID for key in settings}
    declared = {
        (name, key)
        for name, entry in ENTRIES.items()
        if name in NAMES and not entry.adapter
        for key in inspect.signature(entry.type).parameters
    }
    assert declared <= tried
