"""Picard iteration gives what the sequential loop gives, in fewer steps one after another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sde_diffusion import (
    VESDE,
    VPSDE,
    NoiseLevel,
    NonFiniteError,
    Prediction,
    bind,
    classifier_free_guided,
    named_target,
)
from sde_diffusion.prediction import ScoreFn
from solvers import (
    DDIM,
    Ancestral,
    BrownianPath,
    DPMSolverPP,
    EulerMaruyama,
    Langevin,
    ParallelPicard,
    PredictorCorrector,
    ProbabilityFlow,
    ReverseDiffusion,
    Solver,
    sample,
)

RING = named_target("ring")
ONE_STEP = [
    DDIM(),
    Ancestral(),
    EulerMaruyama(),
    ReverseDiffusion(),
    ProbabilityFlow("heun"),
    ProbabilityFlow("rk4"),
    PredictorCorrector(corrector=Langevin(steps=2)),
]


@pytest.mark.parametrize("sde", [VPSDE(), VESDE()], ids=["vp", "ve"])
@pytest.mark.parametrize(
    "solver", ONE_STEP, ids=lambda s: type(s).__name__ + getattr(s, "method", "")
)
def test_the_sequential_result(solver: Solver, sde: VPSDE | VESDE) -> None:
    """At tolerance 0 to rounding: 40 steps through y = x / alpha, alpha down to 0.007 on VP."""
    score_fn = RING.score_fn(sde)
    settings = {"shape": (9, 2), "steps": 40, "seed": 2, "dtype": torch.float64}
    sequential = sample(score_fn, sde, solver, **settings)
    exact = sample(score_fn, sde, ParallelPicard(solver, 8, tolerance=0.0), **settings)
    loose = sample(score_fn, sde, ParallelPicard(solver, 8, tolerance=1e-3), **settings)
    assert torch.allclose(exact.x, sequential.x, rtol=0, atol=1e-11)
    # A settled state may be off by the tolerance, and the flow of ring amplifies differences at the
    # edge between two modes: the median is within 2 tolerances, which were 1e-3.
    assert float((loose.x - sequential.x).norm(dim=1).median()) < 2e-3
    assert loose.stats["sequential_depth"] < 0.8 * sequential.nfe
    assert loose.nfe > sequential.nfe


def test_evaluations_are_counted_where_they_happen() -> None:
    seen = torch.zeros(5, dtype=torch.long)
    calls = 0

    def score_fn(x: Tensor, level: NoiseLevel) -> Prediction:
        nonlocal calls
        calls += 1
        seen[:] += torch.bincount(x[:, 1].round().long(), minlength=5)
        # The second element says which sample this is and stays: its eps is 0 and alpha 1 on VE.
        return Prediction.from_eps(x, level, torch.stack([x[:, 0] / 60, 0 * x[:, 1]], 1))

    x = torch.stack([torch.linspace(-60, 60, 5), torch.arange(5.0)], 1)
    run = sample(score_fn, VESDE(), ParallelPicard(DDIM(), window=4), x=x, steps=10)
    assert run.nfe_per_sample is not None
    assert run.nfe_per_sample.tolist() == seen.tolist()
    assert run.nfe == pytest.approx(seen.double().mean().item())
    assert run.stats["sequential_depth"] == calls


def test_samples_do_not_depend_on_their_batch() -> None:
    sde = VPSDE()
    score_fn, solver = named_target("gmm16").score_fn(sde), ParallelPicard(Ancestral(), 6)
    whole = sample(score_fn, sde, solver, shape=(20, 16), steps=15, seed=3).x
    parts = [
        sample(score_fn, sde, solver, shape=(b - a, 16), steps=15, seed=3, sample_ids=range(a, b)).x
        for a, b in ((0, 1), (1, 8), (8, 20))
    ]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("steps, window", [(1, 16), (2, 1), (5, 16), (16, 16)])
def test_few_steps_and_wide_windows(steps: int, window: int) -> None:
    sde = VPSDE()
    run = sample(
        RING.score_fn(sde), sde, ParallelPicard(DDIM(), window, 0.0), shape=(3, 2), steps=steps
    )
    expected = sample(RING.score_fn(sde), sde, DDIM(), shape=(3, 2), steps=steps).x
    # Rounding of float32 at states of size alpha^-1 = 152 in y.
    assert torch.allclose(run.x, expected, atol=1e-3)
    assert run.stats["sequential_depth"] <= steps


def guided(labels: Tensor) -> ScoreFn:
    return classifier_free_guided(RING.model(VPSDE()), labels, scale=2.0)


@pytest.mark.parametrize("make", [guided, lambda labels: bind(RING.model(VPSDE()), labels)])
def test_labels_stay_with_their_samples(make) -> None:  # type: ignore[no-untyped-def]
    settings = {"shape": (8, 2), "steps": 20, "dtype": torch.float64}
    score_fn = make(torch.arange(8))
    found = sample(score_fn, VPSDE(), ParallelPicard(DDIM(), 5, 0.0), **settings)
    expected = sample(score_fn, VPSDE(), DDIM(), **settings)
    assert torch.allclose(found.x, expected.x, atol=1e-11)
    assert found.network_passes / found.nfe == expected.network_passes / expected.nfe


@pytest.mark.parametrize("event", [(), (3, 4, 4)])
def test_events_of_any_shape(event: tuple[int, ...]) -> None:
    def score_fn(x: Tensor, level: NoiseLevel) -> Prediction:
        return Prediction.from_score(x, level, -x)

    settings = {"shape": (4, *event), "steps": 12, "dtype": torch.float64}
    found = sample(score_fn, VPSDE(), ParallelPicard(EulerMaruyama(), 5, 0.0), **settings).x
    expected = sample(score_fn, VPSDE(), EulerMaruyama(), **settings).x
    assert found.shape == (4, *event)
    assert torch.allclose(found, expected, atol=1e-12)


def test_other_noise_than_the_counters() -> None:
    sde = VPSDE()
    settings = {"shape": (4, 2), "steps": 12, "dtype": torch.float64, "noise": BrownianPath(sde, 5)}
    found = sample(RING.score_fn(sde), sde, ParallelPicard(Ancestral(), 5, 0.0), **settings).x
    expected = sample(RING.score_fn(sde), sde, Ancestral(), **settings).x
    assert torch.allclose(found, expected, atol=1e-11)


def test_a_network_that_fails_is_named() -> None:
    sde = VPSDE()
    score = RING.score_fn(sde)

    def failing(x: Tensor, level: NoiseLevel) -> Prediction:
        eps = torch.where((level.t < 0.5)[:, None], torch.nan, score(x, level).eps)
        return Prediction.from_eps(x, level, eps)

    with pytest.raises(NonFiniteError, match="at step 6, t = ") as caught:
        sample(failing, sde, ParallelPicard(DDIM(), 4), shape=(3, 2), steps=10)
    assert caught.value.step == 6
    assert caught.value.time == pytest.approx(0.4006)


def test_settings_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"solver must be a one-step method.*DPMSolverPP"):
        ParallelPicard(DPMSolverPP(2))
    with pytest.raises(TypeError, match="solver must be a Solver"):
        ParallelPicard(DDIM)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        ParallelPicard(window=0)
    with pytest.raises(ValueError, match="tolerance must be at least 0"):
        ParallelPicard(tolerance=-1.0)
