"""``sample``: what it refuses, and how NaN and divergence are reported."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from sde_diffusion import VPSDE, NoiseLevel, NonFiniteError, Prediction, ScoreFn, named_target
from solvers import (
    DDIM,
    Ancestral,
    EulerMaruyama,
    Langevin,
    Noise,
    PredictorCorrector,
    ProbabilityFlow,
    Solver,
    Step,
    Stepped,
    grids,
    sample,
)
from tests.native import Counting
from tests.problems import IsotropicScore

# --- what it refuses -----------------------------------------------------------------------------

X = torch.zeros(3, 2)
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({}, ValueError, "either shape=.* or x="),
    ({"shape": (3, 2), "x": X}, ValueError, "either shape=.* or x="),
    ({"shape": (3, 2), "steps": None}, ValueError, "steps is missing"),
    ({"shape": (3, 2), "steps": 0}, ValueError, "steps must be at least 1, got 0"),
    ({"shape": (3, 2), "steps": -1}, ValueError, "steps must be at least 1, got -1"),
    ({"shape": (3, 2), "steps": 1.5}, TypeError, "steps must be a whole number, got 1.5"),
    ({"shape": (3, 2), "steps": True}, TypeError, "steps must be a whole number, got True"),
    ({"shape": (3, 2), "steps": "9"}, TypeError, "steps must be a whole number, got '9'"),
    ({"x": X.index_fill(0, torch.tensor(1), math.nan)}, ValueError, "x holds NaN or infinite"),
    ({"x": X.index_fill(0, torch.tensor(1), math.inf)}, ValueError, "x holds NaN or infinite"),
    ({"x": X.long()}, TypeError, "x must be a floating tensor.*int64"),
    ({"x": X.tolist()}, TypeError, "x must be a floating tensor.*list"),
    ({"x": torch.tensor(1.0)}, TypeError, r"x must be a floating tensor of shape \(B"),
    ({"shape": (0, 2)}, ValueError, r"shape\[0\] must be at least 1, got 0"),
    ({"shape": (3, 2.0)}, TypeError, r"shape\[1\] must be a whole number, got 2.0"),
    ({"shape": ()}, ValueError, "shape must be .* got"),
    ({"shape": (3, 2), "dtype": torch.int64}, TypeError, "dtype must be a floating dtype"),
    ({"shape": (3, 2), "grid": "karas"}, ValueError, "unknown grid 'karas'.*mean 'karras'"),
    ({"shape": (3, 2), "grid": "table"}, ValueError, "TabulatedVPSDE"),
    ({"shape": (3, 2), "grid": [1.0, 0.5]}, ValueError, "grid has 2 times.*steps=4"),
    ({"shape": (3, 2), "grid": [1.0], "steps": None}, ValueError, "at least two times"),
    ({"shape": (3, 2), "grid": [0.1, 0.5], "steps": None}, ValueError, r"grid\[1\]=0.5 follows"),
    ({"shape": (3, 2), "grid": [0.5, 0.5], "steps": None}, ValueError, r"grid\[1\]=0.5 follows"),
    ({"shape": (3, 2), "grid": [1.0, 0.0], "steps": None}, ValueError, r"grid\[1\] .* above 0"),
    ({"shape": (3, 2), "grid": [2.0, 0.5], "steps": None}, ValueError, r"grid\[0\].* t_max"),
    ({"shape": (3, 2), "grid": [1.0, math.nan], "steps": None}, ValueError, r"grid\[1\] must be"),
    ({"shape": (3, 2), "sample_ids": [1, 2]}, ValueError, "sample_ids must be 3 whole numbers"),
    ({"shape": (3, 2), "sample_ids": [1.0, 2.0, 3.0]}, ValueError, "sample_ids must be 3 whole"),
    ({"shape": (3, 2), "seed": -1}, ValueError, "seed must be at least 0, got -1"),
    ({"shape": (3, 2), "seed": 0.5}, TypeError, "seed must be a whole number"),
    ({"shape": (3, 2), "trajectory": 0}, ValueError, "trajectory must be at least 1"),
    ({"shape": (3, 2), "trajectory": -2}, ValueError, "trajectory must be at least 1"),
    ({"shape": (3, 2), "solver": EulerMaruyama}, TypeError, r"instance, EulerMaruyama\(\)"),
    ({"shape": (3, 2), "solver": "ddim"}, TypeError, "solver must be a Solver .* 'ddim'"),
    ({"shape": 3}, TypeError, r"shape must be a sequence \(B, \*event\), got 3"),
    ({"shape": (3, 2), "plan": "adaptive"}, TypeError, "plan must be a Plan, got 'adaptive'"),
    ({"shape": (3, 2), "noise": torch.randn}, TypeError, "noise must be a Noise, got"),
    ({"shape": (3, 2), "sde": VPSDE}, TypeError, r"sde must be an SDE.*instance, VPSDE\(\)"),
    ({"shape": (3, 2), "sde": "vp"}, TypeError, "sde must be an SDE, got 'vp'"),
    ({"shape": (3, 2), "score_fn": None}, TypeError, "score_fn must be callable.*got None"),
    ({"shape": (3, 2), "solver": Langevin()}, TypeError, "solver must be a Solver .* Langevin"),
]


@pytest.mark.parametrize("options,error,message", REFUSED)
def test_refused_before_any_work(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    counting = Counting(IsotropicScore())
    given = {"score_fn": counting, "sde": VPSDE(), "solver": DDIM(), "steps": 4, **options}
    with pytest.raises(error, match=message):
        sample(**given)
    assert counting.calls == 0


def test_a_network_that_was_not_wrapped() -> None:
    with pytest.raises(TypeError, match="score_fn must return a Prediction, got Tensor: wrap"):
        sample(lambda x, level: x, VPSDE(), DDIM(), shape=(2, 2), steps=3)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("form", ["x0", "eps", "score", "v"])
@pytest.mark.parametrize("index", [(slice(None), 0), (slice(None), slice(1)), (slice(2),)])
def test_a_prediction_that_would_be_broadcast(form: str, index: Any) -> None:
    """``(B,)`` and ``(B, 1)`` fit arithmetic with ``(B, D)``, and the samples would be wrong."""

    def score_fn(x: Tensor, level: NoiseLevel) -> Prediction:
        return getattr(Prediction, f"from_{form}")(x, level, x[index])

    with pytest.raises(ValueError, match=r"prediction of shape .* for x of shape \(3, 3\)"):
        sample(score_fn, VPSDE(), DDIM(), shape=(3, 3), steps=3)


def test_a_state_of_a_shape_that_the_target_does_not_have() -> None:
    sde = VPSDE()
    with pytest.raises(ValueError, match=r"x must have shape \(B, 2\), got \(3, 5\)"):
        sample(named_target("ring").score_fn(sde), sde, DDIM(), shape=(3, 5), steps=3)


# --- NaN and divergence --------------------------------------------------------------------------


class Broken:
    """Exact, but NaN (or infinite) for one sample at and below a time."""

    def __init__(self, time: float, value: float = math.nan) -> None:
        self.time = time
        self.value = value

    def __call__(self, x: Tensor, level: NoiseLevel) -> Prediction:
        eps = IsotropicScore()(x, level).eps.clone()
        bad = level.t <= self.time
        eps[2] = torch.where(bad, self.value, eps[2])
        return Prediction.from_eps(x, level, eps)


STOCHASTIC_AND_NOT = [EulerMaruyama(), DDIM(), PredictorCorrector(Ancestral(), first="corrector")]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("k", [0, 1, 7, 14, 15, 16, 17, 31, 32, 39])
@pytest.mark.parametrize("solver", STOCHASTIC_AND_NOT, ids=lambda s: type(s).__name__)
def test_a_score_that_is_not_finite_is_reported_where_it_began(
    solver: Solver, k: int, value: float
) -> None:
    """The state is looked at every 16 steps: k lies inside windows, at their ends, and in the last
    one, which is cut short."""
    sde = VPSDE()
    times = grids.time(sde, 40)
    with pytest.raises(NonFiniteError, match="score_fn returned NaN or infinity") as raised:
        sample(Broken(float(times[k]), value), sde, solver, shape=(5, 2), steps=40)
    assert raised.value.step == k
    assert raised.value.time == pytest.approx(float(times[k]), rel=1e-12)
    assert f"step {k}," in str(raised.value)


@pytest.mark.parametrize("k", [1, 15, 16, 17, 40])
def test_a_method_that_looks_ahead_meets_it_a_step_earlier(k: int) -> None:
    sde = VPSDE()
    times = grids.time(sde, 40)
    with pytest.raises(NonFiniteError, match="score_fn returned") as raised:
        sample(Broken(float(times[k])), sde, ProbabilityFlow("heun"), shape=(5, 2), steps=40)
    assert raised.value.step == k - 1
    assert raised.value.time == pytest.approx(float(times[k - 1]), rel=1e-12)


def test_nan_in_the_final_denoise_is_reported_too() -> None:
    sde = VPSDE()
    with pytest.raises(NonFiniteError, match="score_fn returned") as raised:
        sample(Broken(sde.t_min), sde, DDIM(), shape=(5, 2), steps=20, denoise=True)
    assert raised.value.step == 20
    assert raised.value.time == pytest.approx(sde.t_min)


def test_a_passing_nan_is_reported_though_a_replay_does_not_show_it() -> None:
    calls = 0

    def score_fn(x: Tensor, level: NoiseLevel) -> Prediction:
        nonlocal calls
        calls += 1
        eps = IsotropicScore()(x, level).eps
        return Prediction.from_eps(x, level, eps * math.nan if calls == 20 else eps)

    with pytest.raises(NonFiniteError, match="did not when replayed") as raised:
        sample(score_fn, VPSDE(), DDIM(), shape=(5, 2), steps=40)
    assert raised.value.step == 16  # the first of the window it happened in


def test_a_diverging_update_is_told_apart_from_a_broken_score() -> None:
    """Ten times the state at each step, with finite scores throughout: float32 ends at 3e38, in the
    39th step, so that the replay must begin from the state after the 32nd, not from the first."""

    @dataclass(frozen=True)
    class Diverging(Solver):
        """Multiplies by 10."""

        order = 1
        stochastic = False

        def step(
            self, score_fn: ScoreFn, x: Tensor, step: Step, state: Any, noise: Noise
        ) -> Stepped:
            score_fn(x, step.start)
            return Stepped(10 * x, state)

    def score_fn(x: Tensor, level: NoiseLevel) -> Prediction:
        return Prediction.from_eps(x, level, torch.zeros_like(x))

    x = torch.ones(3, 2)
    with pytest.raises(
        NonFiniteError, match=r"the score was finite, so use more steps.*"
    ) as raised:
        sample(score_fn, VPSDE(), Diverging(), x=x, steps=40)
    assert raised.value.step == 38
    assert sample(score_fn, VPSDE(), Diverging(), x=x, steps=38).x.max() == pytest.approx(1e38)
