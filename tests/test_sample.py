"""``sample``: independence of the batch, counting, trajectories, starts, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sde_diffusion import (
    EDMSDE,
    VESDE,
    VPSDE,
    EpsModel,
    GaussianMixture,
    NoiseLevel,
    NonFiniteError,
    Prediction,
    ScoreFn,
    bind,
    classifier_free_guided,
    classifier_guided,
    named_target,
)
from sde_diffusion.networks.mlp import MLP
from solvers import (
    DDIM,
    DEIS,
    Ancestral,
    Corrector,
    CounterNoise,
    EulerMaruyama,
    Integrator,
    Langevin,
    Noise,
    PredictorCorrector,
    ProbabilityFlow,
    RecordedNoise,
    ReverseDiffusion,
    Solver,
    Step,
    Stepped,
    catalogue,
    grids,
    sample,
)
from solvers.multistep import Multistep
from solvers.noise import AREA
from tests.problems import SDES, IsotropicScore


def native_samplers() -> dict[str, Solver]:
    """Every sampler of the catalogue that runs in ``sample``'s own loop, and the settings whose
    code differs. A new file in ``solvers/methods`` is tested here without a word."""
    samplers: dict[str, Solver] = {}
    for name, entry in catalogue().items():
        if issubclass(entry.type, Integrator):
            continue
        made = entry.type()
        if isinstance(made, Corrector):
            made = PredictorCorrector(corrector=made)
        assert isinstance(made, Solver)
        samplers[name] = made
    samplers["ancestral-large"] = Ancestral(0.5, "large")
    samplers["ddim-0.5"] = DDIM(0.5)
    for method in ("euler", "midpoint", "rk4"):
        samplers[method] = ProbabilityFlow(method)
    samplers["langevin-sample"] = PredictorCorrector(corrector=Langevin(steps=2, norm="sample"))
    samplers["corrector-first"] = PredictorCorrector(Ancestral(), first="corrector")
    return samplers


NATIVE = native_samplers()
IDS = torch.tensor([31, 4, 159, 2, 653, 58, 9, 79, 32, 3, 84, 62, 6, 43, 38, 327, 95, 0, 28, 8, 41])
PARTS = ([0], list(range(1, 8)), list(range(8, 21)))  # 1 + 7 + the rest


class Counting:
    """A score function that counts its own calls, and those of a network inside it."""

    def __init__(self, score_fn: ScoreFn) -> None:
        self.score_fn = score_fn
        self.calls = 0

    def __call__(self, x: Tensor, level: NoiseLevel) -> Prediction:
        self.calls += 1
        return self.score_fn(x, level)


# --- samples do not depend on their batch --------------------------------------------------------


def in_parts(run: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.cat([run(IDS[part]) for part in PARTS])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("target", ["ring", "gmm16"])
@pytest.mark.parametrize("sampler", NATIVE)
def test_split_runs_are_bitwise_equal_on_exact_targets(
    sampler: str, target: str, dtype: torch.dtype
) -> None:
    mixture = named_target(target)
    for name in ("vp", "ve"):
        sde = SDES[name]
        score_fn = mixture.score_fn(sde)

        def run(
            ids: Tensor, score_fn: ScoreFn = score_fn, sde: Any = sde, denoise: bool = True
        ) -> Tensor:
            shape = (len(ids), mixture.dimension)
            return sample(
                score_fn,
                sde,
                NATIVE[sampler],
                shape=shape,
                steps=6,
                seed=5,
                sample_ids=ids,
                denoise=denoise,
                dtype=dtype,
            ).x

        whole = run(IDS)
        assert whole.dtype == dtype
        assert bool((in_parts(run) == whole).all())
        order = torch.arange(20, -1, -1)
        assert bool((run(IDS[order]) == whole[order]).all())
        # Two ids give two samples: equality above is not that of constants.
        assert len(whole[:, 0].unique()) == len(IDS)


@pytest.mark.parametrize("sampler", NATIVE)
def test_split_runs_agree_to_rounding_on_a_network(sampler: str) -> None:
    """Matrix products round differently in batches of other sizes: by 1e-16 of values near 1 in
    each of some twenty layers, carried on by 8 steps that stretch a difference by at most
    ``1/alpha`` = 150 in all: 1e-12 is expected, and 1e-10 allowed."""
    sde, net = VPSDE(), random_mlp((3,))
    score_fn = bind(EpsModel(net, sde), None)

    def run(ids: Tensor) -> Tensor:
        return sample(
            score_fn,
            sde,
            NATIVE[sampler],
            shape=(len(ids), 3),
            steps=8,
            sample_ids=ids,
            dtype=torch.float64,
        ).x

    whole = run(IDS)
    assert (in_parts(run) - whole).abs().max() < 1e-10 * whole.abs().max()


def random_mlp(event: tuple[int, ...], dtype: torch.dtype = torch.float64) -> nn.Module:
    """A small network whose every weight is random, none at its zero initialisation."""
    net = MLP(event, width=32, blocks=2).to(dtype)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for weight in net.parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=dtype)
            weight.copy_(noise / math.sqrt(weight.shape[-1]))
    return net.eval()


def test_guided_batches_split_with_their_labels() -> None:
    mixture, sde = named_target("ring"), VPSDE()
    labels = IDS % 8

    def run(ids: Tensor) -> Tensor:
        guided = classifier_free_guided(mixture.model(sde), ids % 8, torch.tensor(1.5))
        return sample(guided, sde, Ancestral(), shape=(len(ids), 2), steps=40, sample_ids=ids).x

    whole = run(IDS)
    assert bool((in_parts(run) == whole).all())
    nearest = (whole[:, None].double() - mixture.means).square().sum(2).argmin(1)
    assert nearest.tolist() == labels.tolist()


def test_the_batch_norm_is_the_named_exception() -> None:
    mixture, sde = named_target("ring"), VPSDE()
    solver = PredictorCorrector(corrector=Langevin(norm="batch"))

    def run(ids: Tensor) -> Tensor:
        return sample(
            mixture.score_fn(sde), sde, solver, shape=(len(ids), 2), steps=6, sample_ids=ids
        ).x

    assert (in_parts(run) - run(IDS)).abs().max() > 1e-2


def test_default_ids_count_from_0_and_ids_may_be_a_list() -> None:
    mixture, sde = named_target("ring"), VPSDE()

    def run(**options: Any) -> Tensor:
        return sample(mixture.score_fn(sde), sde, Ancestral(), steps=5, **options).x

    whole = run(shape=(4, 2))
    assert torch.equal(whole, run(shape=(4, 2), sample_ids=[0, 1, 2, 3]))
    assert torch.equal(whole[2:3], run(shape=(1, 2), sample_ids=[2]))


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


# --- a solver of one's own -----------------------------------------------------------------------


@dataclass(frozen=True)
class EulerODE(Solver):
    """One line that the catalogue prints."""

    order = 1
    stochastic = False

    def coefficients(self, step: Step) -> tuple[Tensor, ...]:
        ratio = step.end.alpha / step.start.alpha
        return ratio, step.end.sigma - ratio * step.start.sigma

    def step(self, score_fn: ScoreFn, x: Tensor, step: Step, state: Any, noise: Noise) -> Stepped:
        a, b = self.coefficients_of(step, x)
        eps = score_fn(x, step.start).eps
        return Stepped((a * x).addcmul_(b, eps), state)


def test_a_solver_in_ten_lines() -> None:
    mixture, sde = named_target("ring"), VPSDE()
    own, ddim = (
        sample(mixture.score_fn(sde), sde, s, shape=(6, 2), steps=9, dtype=torch.float64)
        for s in (EulerODE(), DDIM())
    )
    assert (own.x - ddim.x).abs().max() < 1e-13
    assert own.nfe == 9


@pytest.mark.parametrize("sampler", [*NATIVE, "own", "multistep"])
def test_steps_by_hand_equal_the_loop(sampler: str) -> None:
    """Steps made from two levels, 0-d or one per sample; a method that evaluates inside a step is
    given its ``stages``. A multistep method knows no earlier levels there and is of order 1, so
    DDIM. Coefficients of the loop are the same in float64, to rounding."""
    mixture, sde = named_target("ring"), VPSDE()
    solver = {**NATIVE, "own": EulerODE(), "multistep": PredictorCorrector(DEIS(4))}[sampler]
    score_fn, noise, n = mixture.score_fn(sde), CounterNoise(3), 5
    same = solver
    if isinstance(solver, Multistep):
        same = DDIM()
    elif sampler == "multistep":
        same = PredictorCorrector(DDIM())
    run = sample(score_fn, sde, same, shape=(4, 2), steps=n, seed=3, dtype=torch.float64)
    for width in (None, 4):
        x = noise.prior(torch.empty(4, 2, dtype=torch.float64))
        state = solver.init(x)
        for i in range(n):
            start, end = (sde.at(float(t)) for t in run.times[i : i + 2])
            if width is not None:
                start, end = start.per_sample(width), end.per_sample(width)
            step = Step(i, start, end)
            if stages := solver.stages(sde, start, end):
                step = Step(i, start, end, stages)
            x, state, _ = solver.step(score_fn, x, step, state, noise)
        assert (x - run.x).abs().max() < 1e-11


# --- torch.compile -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    "solver",
    [Ancestral(), ProbabilityFlow("heun"), PredictorCorrector(EulerMaruyama(), Langevin())],
    ids=lambda s: type(s).__name__,
)
def test_compiled_steps_give_the_same_samples(solver: Solver) -> None:
    """Fused kernels round differently: 1e-15 of values near 3, stretched by 150 at most."""
    target = GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), torch.tensor([0.05, 0.1]))
    sde = VPSDE()
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    plain, compiled = (
        sample(
            target.score_fn(sde),
            sde,
            solver,
            shape=(8, 2),
            steps=10,
            dtype=torch.float64,
            denoise=True,
            compile=compile,
        )
        for compile in (False, True)
    )
    assert graphs["unique_graphs"] > before  # it was compiled indeed
    assert (plain.x - compiled.x).abs().max() < 1e-9
    assert (plain.nfe, plain.network_passes) == (compiled.nfe, compiled.network_passes)
