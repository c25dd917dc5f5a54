"""``sample``: counting, trajectories, starts, grids, seeds, dtypes, shapes and noise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sde_diffusion import (
    EDMSDE,
    VESDE,
    VPSDE,
    NoiseLevel,
    Prediction,
    classifier_free_guided,
    classifier_guided,
    named_target,
)
from solvers import (
    DDIM,
    Ancestral,
    CounterNoise,
    EulerMaruyama,
    Langevin,
    Noise,
    PredictorCorrector,
    ProbabilityFlow,
    RecordedNoise,
    ReverseDiffusion,
    Solver,
    Step,
    grids,
    sample,
)
from solvers.noise import AREA
from tests.native import NATIVE, Counting
from tests.problems import SDES, IsotropicScore

# --- evaluations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 9])
@pytest.mark.parametrize("sampler", NATIVE)
def test_nfe_is_what_the_score_function_counts(sampler: str, steps: int) -> None:
    mixture = named_target("ring")
    for name in ("vp", "ve", "edm"):
        sde = SDES[name]
        counting = Counting(mixture.score_fn(sde))
        solution = sample(counting, sde, NATIVE[sampler], shape=(3, 2), steps=steps)
        assert solution.nfe == solution.network_passes == counting.calls
        assert solution.stats["accepted"] == steps
        assert solution.stats["rejected"] == 0
        assert bool(solution.x.isfinite().all())
        before = counting.calls
        denoised = sample(counting, sde, NATIVE[sampler], shape=(3, 2), steps=steps, denoise=True)
        assert counting.calls - before == before + 1
        assert denoised.nfe == denoised.network_passes == before + 1


@pytest.mark.parametrize(
    "solver,per_step",
    [
        (Ancestral(), 1),
        (DDIM(), 1),
        (EulerMaruyama(), 1),
        (ReverseDiffusion(), 1),
        (ProbabilityFlow("euler"), 1),
        (ProbabilityFlow("midpoint"), 2),
        (ProbabilityFlow("heun"), 2),
        (ProbabilityFlow("rk4"), 4),
        (PredictorCorrector(ProbabilityFlow("heun"), Langevin(steps=3)), 5),
    ],
)
def test_evaluations_per_step(solver: Solver, per_step: int) -> None:
    sde = VPSDE()
    assert sample(IsotropicScore(), sde, solver, shape=(2, 2), steps=7).nfe == 7 * per_step


def test_network_passes_of_guidance() -> None:
    mixture, sde = named_target("ring"), VPSDE()
    rows = 0

    class Model:
        num_classes, null_label, cost = 8, 8, 1

        def __call__(self, x: Tensor, level: NoiseLevel, label: Any = None) -> Prediction:
            nonlocal rows
            rows += len(x)
            return mixture.model(sde)(x, level, label)

    free = classifier_free_guided(Model(), 3, 2.0)
    solution = sample(free, sde, ProbabilityFlow("heun"), shape=(5, 2), steps=6, denoise=True)
    assert solution.nfe == 13
    assert solution.network_passes == 26 == rows / 5
    one = sample(classifier_free_guided(Model(), 3, 1.0), sde, DDIM(), shape=(5, 2), steps=6)
    assert (one.nfe, one.network_passes) == (6, 6)
    assert rows / 5 == 26 + 6
    guided = classifier_guided(mixture.score_fn(sde), mixture.classifier(sde), 3, 2.0)
    solution = sample(guided, sde, DDIM(), shape=(5, 2), steps=6)
    assert (solution.nfe, solution.network_passes) == (6, 12)


# --- trajectories, denoising, starts, grids ------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddim", "ancestral", "heun", "predictor_corrector"])
@pytest.mark.parametrize("stride", [True, 1, 3, 4, 100])
def test_trajectory(sampler: str, stride: bool | int) -> None:
    mixture, sde = named_target("ring"), VPSDE()
    solver = {**NATIVE, "heun": ProbabilityFlow()}[sampler]
    options: dict[str, Any] = {"shape": (3, 2), "seed": 2, "dtype": torch.float64}
    score_fn = mixture.score_fn(sde)
    solution = sample(score_fn, sde, solver, steps=12, trajectory=stride, **options)
    kept = [*range(0, 12, int(stride)), 12]
    assert solution.trajectory is not None
    assert solution.trajectory_times is not None
    assert solution.trajectory.shape == (len(kept), 3, 2)
    assert torch.equal(solution.trajectory_times, solution.times[kept])
    # First and last are the initial state and the result; an inner one is where a run ends that
    # takes the same steps up to there.
    initial = CounterNoise(2).prior(torch.empty(3, 2, dtype=torch.float64))
    assert torch.equal(solution.trajectory[0], initial)
    assert torch.equal(solution.trajectory[-1], solution.x)
    if len(kept) > 2:
        part = sample(score_fn, sde, solver, grid=solution.times[: kept[1] + 1], **options)
        assert (solution.trajectory[1] - part.x).abs().max() < 1e-12
    plain = sample(score_fn, sde, solver, steps=12, **options)
    assert plain.trajectory is None
    assert plain.trajectory_times is None
    assert torch.equal(plain.x, solution.x)


def test_trajectory_ends_before_the_denoise() -> None:
    mixture, sde = named_target("ring"), VPSDE()
    score_fn, options = mixture.score_fn(sde), {"shape": (3, 2), "steps": 5}
    plain = sample(score_fn, sde, Ancestral(), **options)  # type: ignore[arg-type]
    solution = sample(score_fn, sde, Ancestral(), denoise=True, trajectory=True, **options)  # type: ignore[arg-type]
    assert torch.equal(solution.trajectory[-1], plain.x)  # type: ignore[index]
    assert torch.equal(solution.x, score_fn(plain.x, sde.at(float(sde.t_min))).x0)
    assert not torch.equal(solution.x, plain.x)
    assert solution.nfe == plain.nfe + 1


@pytest.mark.parametrize("sampler", NATIVE)
def test_start_from_a_given_state(sampler: str) -> None:
    mixture, sde = named_target("ring"), VPSDE()
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(4, 2, generator=torch.Generator().manual_seed(1), dtype=dtype)
        before = x.clone()
        run = sample(mixture.score_fn(sde), sde, NATIVE[sampler], x=x, steps=4, trajectory=True)
        assert torch.equal(x, before)
        assert run.x.dtype == dtype
        assert run.trajectory is not None
        assert torch.equal(run.trajectory[0], before)
        # From the prior's own draw, x= and shape= are the same run.
        prior = sample(
            mixture.score_fn(sde), sde, NATIVE[sampler], shape=(4, 2), steps=4, dtype=dtype
        )
        initial = CounterNoise(0).prior(torch.empty(4, 2, dtype=dtype))
        again = sample(mixture.score_fn(sde), sde, NATIVE[sampler], x=initial, steps=4)
        assert torch.equal(again.x, prior.x)


def test_the_prior_has_the_sdes_deviation() -> None:
    """4000 values: the standard error of a deviation is 1/sqrt(8000) of it; 5 of them allowed."""
    for name, std in (("vp", 1.0), ("ve", 50.0), ("edm", 80.0)):
        start = sample(
            IsotropicScore(), SDES[name], DDIM(), shape=(2000, 2), steps=1, trajectory=True
        ).trajectory
        assert start is not None
        assert abs(float(start[0].std()) / std - 1) < 5 / math.sqrt(8000)
        assert abs(float(start[0].mean()) / std) < 5 / math.sqrt(4000)


@pytest.mark.parametrize("grid", [*(g for g in grids.GRIDS if g != "table"), "callable", "times"])
def test_grids(grid: str) -> None:
    for sde in (VPSDE(), VESDE(), EDMSDE()):
        given: Any = grid
        if grid == "callable":
            given = lambda sde, steps: grids.karras(sde, steps, rho=3.0)  # noqa: E731
        elif grid == "times":
            given = grids.cosine(sde, 6).tolist()
        counted: list[float] = []

        def score_fn(x: Tensor, level: NoiseLevel, counted: list[float] = counted) -> Prediction:
            counted.append(float(level.t))
            return IsotropicScore()(x, level)

        solution = sample(score_fn, sde, DDIM(), shape=(2, 2), steps=6, grid=given)
        assert solution.times.dtype == torch.float64
        assert len(solution.times) == 7
        assert bool((solution.times.diff() < 0).all())
        assert float(solution.times[0]) == pytest.approx(float(sde.t_max), rel=1e-12)
        assert float(solution.times[-1]) == pytest.approx(float(sde.t_min), rel=1e-9)
        # Evaluated at each entry but the last, exactly: no step of the solver's own making.
        assert counted == solution.times[:-1].tolist()
    assert len(sample(IsotropicScore(), sde, DDIM(), shape=(2,), grid=[1.0, 0.5, 0.1]).times) == 3


# --- seeds, dtypes, shapes, noise, progress ------------------------------------------------------


@pytest.mark.parametrize("sampler", NATIVE)
def test_seeds(sampler: str) -> None:
    mixture, sde = named_target("ring"), VPSDE()

    def run(seed: int) -> Tensor:
        return sample(
            mixture.score_fn(sde), sde, NATIVE[sampler], shape=(4, 2), steps=4, seed=seed
        ).x

    torch.manual_seed(0)
    first = run(3)
    torch.manual_seed(1)
    assert torch.equal(first, run(3))
    assert bool((first != run(4)).all())


@pytest.mark.parametrize("sampler", NATIVE)
def test_noise_is_drawn_if_and_only_if_declared(sampler: str) -> None:
    solver, sde = NATIVE[sampler], VPSDE()
    drawn: dict[tuple[int, int], Tensor] = {}

    class Watching(CounterNoise):
        def __call__(self, x: Tensor, step: Step, slot: int = 0) -> Tensor:
            assert (step.index, slot) not in drawn  # a second draw of a slot would be the same
            drawn[step.index, slot] = super().__call__(x, step, slot)
            return drawn[step.index, slot]

    noise = Watching(0)
    sample(IsotropicScore(), sde, solver, shape=(2, 2), steps=5, noise=noise)
    assert bool(drawn) == solver.stochastic
    # No number comes twice: not in another sample, step or slot, nor in the initial state.
    every = torch.stack([noise.prior(torch.empty(2, 2)), *drawn.values()])
    assert len(every.unique()) == every.numel()


@pytest.mark.parametrize("sampler", NATIVE)
def test_float32_agrees_with_float64(sampler: str) -> None:
    """On one Gaussian, which stretches no difference by more than ``1/alpha`` = 150: float32
    rounds by 6e-8 of values up to 3 a dozen times a step, twelve steps, most of it early, before
    the flow contracts: 1e-5 is expected on VP and, with states near 100, 1e-4 on VE."""
    for name, bound in (("vp", 1e-4), ("ve", 1e-3)):
        runs = [
            sample(
                IsotropicScore(), SDES[name], NATIVE[sampler], shape=(20, 2), steps=12, dtype=dtype
            ).x
            for dtype in (torch.float32, torch.float64)
        ]
        scale = 1.0 if sampler != "hold" else float(SDES[name].prior_std()) * 150
        assert (runs[0] - runs[1]).abs().max() < bound * scale


@pytest.mark.parametrize("event", [(), (1,), (5,), (2, 3, 3)])
@pytest.mark.parametrize("sampler", NATIVE)
def test_event_shapes(sampler: str, event: tuple[int, ...]) -> None:
    """Elementwise scores and the expected norm treat every element alike: each equals the run of
    its own noise as a scalar event."""
    sde, steps, b = VPSDE(), 4, 3
    solver = NATIVE[sampler]
    generator = torch.Generator().manual_seed(4)
    draw = {
        (i, slot): torch.randn(b, *event, generator=generator, dtype=torch.float64)
        for i in range(steps)
        for slot in (AREA, 0, 1, 2)
    }
    x = torch.randn(b, *event, generator=generator, dtype=torch.float64)
    run = sample(IsotropicScore(), sde, solver, x=x, steps=steps, noise=RecordedNoise(draw))
    assert run.x.shape == (b, *event)
    shaped = sample(IsotropicScore(), sde, solver, shape=(b, *event), steps=steps, denoise=True)
    assert shaped.x.shape == (b, *event)
    if sampler == "langevin-sample":  # norms over the event tie its elements together
        return
    flat = {place: values.reshape(-1) for place, values in draw.items()}
    scalars = sample(
        IsotropicScore(), sde, solver, x=x.reshape(-1), steps=steps, noise=RecordedNoise(flat)
    )
    assert (scalars.x.reshape(run.x.shape) - run.x).abs().max() < 1e-13 * run.x.abs().max()


def test_progress() -> None:
    seen: list[tuple[int, int]] = []
    run = {"shape": (2, 2), "steps": 5}
    sample(IsotropicScore(), VPSDE(), DDIM(), progress=lambda *at: seen.append(at), **run)  # type: ignore[arg-type]
    assert seen == [(i, 5) for i in range(1, 6)]


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    sample(IsotropicScore(), VPSDE(), DDIM(), shape=(2, 2), steps=5, progress=True)
    assert "5/5" in capsys.readouterr().out
    sample(IsotropicScore(), VPSDE(), DDIM(), shape=(2, 2), steps=5)
    assert capsys.readouterr().out == ""


def test_recorded_noise_replays_a_run() -> None:
    mixture, sde = named_target("ring"), VPSDE()
    score_fn, counter, draw = mixture.score_fn(sde), CounterNoise(6), {}

    class Recording(Noise):
        def __call__(self, x: Tensor, step: Step, slot: int = 0) -> Tensor:
            draw[step.index, slot] = counter(x, step, slot).clone()
            return draw[step.index, slot]

        def prior(self, x: Tensor) -> Tensor:
            return counter.prior(x)

        def select(self, indices: Tensor) -> Noise:
            raise NotImplementedError

    solver = PredictorCorrector(Ancestral(), Langevin(steps=2))
    first = sample(score_fn, sde, solver, shape=(3, 2), steps=4, noise=Recording())
    assert set(draw) == {(i, slot) for i in range(4) for slot in range(3)}
    initial = counter.prior(torch.empty(3, 2))
    again = sample(score_fn, sde, solver, shape=(3, 2), steps=4, noise=RecordedNoise(draw, initial))
    assert torch.equal(first.x, again.x)
    seeded = sample(score_fn, sde, solver, shape=(3, 2), steps=4, seed=6)
    assert torch.equal(first.x, seeded.x)
    with pytest.raises(ValueError, match="step 4, slot 0"):
        sample(score_fn, sde, solver, x=initial, steps=5, noise=RecordedNoise(draw))
    with pytest.raises(ValueError, match="initial"):
        sample(score_fn, sde, solver, shape=(3, 2), steps=4, noise=RecordedNoise(draw))
