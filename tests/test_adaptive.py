"""Embedded pairs at fixed steps, and ``Adaptive``: tolerances, counts, batches, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sde_diffusion import (
    VPSDE,
    NoiseLevel,
    NonFiniteError,
    Prediction,
    ScoreFn,
    classifier_free_guided,
    named_target,
)
from solvers import (
    DDIM,
    SRA1,
    Adaptive,
    BogackiShampine,
    BrownianPath,
    CounterNoise,
    DormandPrince,
    ImprovedEuler,
    Langevin,
    PredictorCorrector,
    Solver,
    Step,
    Tsitouras,
    sample,
)
from tests.pairs import PAIRS, STOCHASTIC, start
from tests.problems import (
    SDES,
    GaussianProblem,
    IsotropicScore,
    fine_flow,
    fitted_order,
    uniform_grid,
    warped_grid,
)

IDS = torch.tensor([31, 4, 159, 2, 653, 58, 9])
PARTS = ([0], [1, 2, 3, 4], [5, 6])


class PerSample:
    """Counts evaluations of each sample, told apart by their ids, through ``select``."""

    def __init__(self, score_fn: ScoreFn, counts: Tensor, ids: Tensor) -> None:
        self.score_fn, self.counts, self.ids = score_fn, counts, ids

    def __call__(self, x: Tensor, level: NoiseLevel) -> Prediction:
        assert len(x) == len(self.ids)
        self.counts[self.ids] += 1
        return self.score_fn(x, level)

    def select(self, indices: Tensor) -> PerSample:
        return PerSample(self.score_fn, self.counts, self.ids[indices])


# --- fixed steps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [uniform_grid, warped_grid])
@pytest.mark.parametrize("name", ["vp", "ve", "subvp"])
@pytest.mark.parametrize("pair", PAIRS)
def test_order_at_fixed_steps(pair: str, name: str, grid: Any) -> None:
    sde, solver, x = SDES[name], PAIRS[pair], start(name)
    score_fn = named_target("ring").score_fn(sde)
    exact = fine_flow(score_fn, sde, x, sde.t_max, sde.t_min, rtol=1e-11)
    steps = (64, 128, 256)
    ends = [sample(score_fn, sde, solver, x=x, grid=grid(sde, n)).x for n in steps]
    errors = [float((end - exact).square().mean().sqrt()) for end in ends]
    assert fitted_order(steps, errors) > solver.order - 0.25
    assert errors[-1] < (2e-4 if solver.order == 3 else 2e-6)


@pytest.mark.parametrize("pair", PAIRS)
def test_the_error_shrinks_with_its_declared_power_and_the_last_slope_is_used_again(
    pair: str,
) -> None:
    sde, solver = VPSDE(), PAIRS[pair]
    score_fn = IsotropicScore()
    first = sde.at(0.5)
    sizes, calls = [], 0

    def counting(x: Tensor, level: NoiseLevel) -> Prediction:
        nonlocal calls
        calls += 1
        return score_fn(x, level)

    spans = (0.1, 0.05, 0.025)
    for span in spans:
        end = sde.at(sde.time(first.half_log_snr + span))
        step = Step(0, first, end, solver.stages(sde, first, end))
        stepped = solver.step(counting, start("vp"), step, (), CounterNoise(0))
        assert stepped.error is not None
        assert stepped.error.shape == (6, 2)
        sizes.append(float(stepped.error.norm()))
        before = calls
        solver.step(counting, stepped.x, step, stepped.state, CounterNoise(0))
        stages = {3: 3, 5: 6}[solver.order]
        assert calls - before == stages
        before = calls
        # A rejected step keeps its first slope.
        solver.step(counting, start("vp"), step, solver.retried((), stepped.state), CounterNoise(0))
        assert calls - before == stages
    assert fitted_order((1, 2, 4), sizes) > float(solver.error_order or 0) - 0.25


def test_a_corrector_makes_the_last_slope_void() -> None:
    """Where it moves x, the next step evaluates anew: 4 and the corrector's 1, instead of 3 + 1."""
    solver = PredictorCorrector(BogackiShampine(), Langevin())
    assert sample(IsotropicScore(), VPSDE(), solver, shape=(2, 2), steps=5).nfe == 25


# --- adaptive ODE --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vp", "ve", "subvp", "edm"])
@pytest.mark.parametrize("pair", PAIRS)
def test_reaches_the_exact_solution_in_proportion_to_the_tolerance(pair: str, name: str) -> None:
    """A step's error is at most ``sqrt(2) (atol + rtol max|z|)``, by its estimate, and grows no
    more: in ``z = x / radius`` a deviation shrinks by ``sqrt((v / radius^2)_end / ..._start)``,
    where the data's variances are below 1. Errors in all are below that times the steps tried.

    An estimate and a local error of the same power make the error proportional to the tolerance,
    once steps are short: at a tolerance of 1e-4 the pairs of order 5 take 6 to 8 steps, of up to 2
    in half_log_snr, and are still on a steeper line (slopes of 1.23 to 1.46 from there to 1e-8).
    Here slopes of 0.74 to 1.16 were measured; of one run the last step may be 1.3 times as long
    as its error asked for, of the next not, which is worth 0.1 of slope.
    """
    problem, x = GaussianProblem(SDES[name]), start(name)
    sde, solver = problem.sde, PAIRS[pair]
    exact = problem.exact_flow(x, sde.t_max, sde.t_min)
    tolerances = (1e-3, 1e-5, 1e-7) if solver.order == 3 else (1e-6, 1e-8, 1e-10)
    first, last = sde.at(sde.t_max), sde.at(sde.t_min)
    radius, radius_end = (float((e.alpha**2 + e.sigma**2) ** 0.5) for e in (first, last))
    largest = max(float(x.abs().max()) / radius, float(exact.abs().max()) / radius_end)
    assert float(torch.linalg.eigvalsh(problem.covariance).max()) < 1
    errors = []
    for tolerance in tolerances:
        run = sample(problem.score_fn, sde, solver, x=x, plan=Adaptive(tolerance, tolerance))
        assert run.nfe_per_sample is not None
        tried = float(run.nfe_per_sample.max()) / {3: 3, 5: 6}[solver.order]
        errors.append(float((run.x - exact).abs().max()))
        assert errors[-1] < tried * math.sqrt(2) * (1 + largest) * tolerance * radius_end
    assert 0.7 < math.log10(errors[0] / errors[2]) / 4 < 1.25


@pytest.mark.parametrize("solver", [DormandPrince(), BogackiShampine(), ImprovedEuler(), SRA1()])
def test_evaluations_are_counted_per_sample_and_end_with_the_sample(solver: Solver) -> None:
    sde, count = VPSDE(), 12
    counts = torch.zeros(count, dtype=torch.long)
    target = named_target("ring")
    exact, rows = target.score_fn(sde), 0

    def counted(x: Tensor, level: NoiseLevel) -> Prediction:
        nonlocal rows
        rows += len(x)
        return exact(x, level)

    score_fn = PerSample(counted, counts, torch.arange(count))
    tolerance = 5e-2 if solver.stochastic else 1e-4
    plan = Adaptive(tolerance, tolerance)
    run = sample(score_fn, sde, solver, shape=(count, 2), plan=plan, dtype=torch.float64)
    assert run.nfe_per_sample is not None
    assert torch.equal(run.nfe_per_sample, counts)
    assert rows == int(counts.sum())  # whatever select says: a finished sample is in no batch
    assert len(counts.unique()) > 1  # samples ended at different evaluations
    assert run.nfe == run.network_passes == pytest.approx(float(counts.double().mean()))
    tries = run.stats["accepted"] + run.stats["rejected"]
    assert run.stats["rejected"] > 0
    per_try = {DormandPrince: 6, BogackiShampine: 3}.get(type(solver), 2)
    assert run.nfe == pytest.approx(per_try * tries + (not solver.stochastic))
    assert bool(run.x.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("target", ["ring", "gmm16"])
@pytest.mark.parametrize("name", [*PAIRS, *STOCHASTIC])
def test_a_sample_does_not_depend_on_its_batch(name: str, target: str, dtype: torch.dtype) -> None:
    mixture, solver = named_target(target), {**PAIRS, **STOCHASTIC}[name]
    for sde in (SDES["vp"], SDES["ve"]):

        def run(ids: Tensor, sde: Any = sde) -> tuple[Tensor, Tensor]:
            solution = sample(
                mixture.score_fn(sde),
                sde,
                solver,
                shape=(len(ids), mixture.dimension),
                sample_ids=ids,
                plan=Adaptive(0.2, 0.2),
                noise=BrownianPath(sde, 5, ids, depth=8) if solver.stochastic else None,
                dtype=dtype,
                denoise=True,
            )
            assert solution.nfe_per_sample is not None
            return solution.x, solution.nfe_per_sample

        x, nfe = run(IDS)
        parts = [run(IDS[part]) for part in PARTS]
        assert torch.equal(torch.cat([p[0] for p in parts]), x)
        assert torch.equal(torch.cat([p[1] for p in parts]), nfe)


def test_guided_samples_keep_their_labels_and_scales() -> None:
    mixture, sde = named_target("ring"), VPSDE()
    labels = torch.arange(16) % 8
    guided = classifier_free_guided(mixture.model(sde), labels, torch.linspace(1, 2, 16))
    run = sample(guided, sde, DormandPrince(), shape=(16, 2), plan=Adaptive())
    nearest = (run.x[:, None].double() - mixture.means).square().sum(2).argmin(1)
    assert nearest.tolist() == labels.tolist()
    assert run.network_passes == pytest.approx(2 * run.nfe)


@pytest.mark.parametrize("event", [(), (1,), (2, 3, 3)])
@pytest.mark.parametrize("solver", [Tsitouras(), SRA1()])
def test_event_shapes(solver: Solver, event: tuple[int, ...]) -> None:
    plan = Adaptive(0.1, 0.1)
    run = sample(IsotropicScore(), VPSDE(), solver, shape=(3, *event), plan=plan)
    assert run.x.shape == (3, *event)
    assert run.x.dtype == torch.float32
    assert bool(run.x.isfinite().all())


def test_ends_exactly_at_the_grids_end() -> None:
    """The last evaluation of a pair is at the end of its last step."""
    seen: list[float] = []

    def score_fn(x: Tensor, level: NoiseLevel) -> Prediction:
        seen.append(float(level.t.min()))
        return IsotropicScore()(x, level)

    run = sample(score_fn, VPSDE(), DormandPrince(), shape=(1, 2), plan=Adaptive(), grid=[0.9, 0.2])
    assert seen[-1] == min(seen) == 0.2
    assert run.times.tolist() == [0.9, 0.2]


# --- what it refuses -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rtol", "atol", "safety", "shrink", "integral", "grow"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_settings_are_checked(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        Adaptive(**{name: value})


def test_max_steps_says_where_it_stood() -> None:
    with pytest.raises(RuntimeError, match=r"max_steps=5 .* 4 of 4 samples .* t = .* half_log_snr"):
        sample(
            IsotropicScore(), VPSDE(), DormandPrince(), shape=(4, 2),
            plan=Adaptive(1e-9, 1e-9, max_steps=5),
        )  # fmt: skip


def test_what_does_not_fit_is_refused() -> None:
    options: dict[str, Any] = {"shape": (2, 2), "plan": Adaptive()}
    with pytest.raises(ValueError, match=r"DDIM estimates no error.*DormandPrince"):
        sample(IsotropicScore(), VPSDE(), DDIM(), **options)
    for name in ("trajectory", "compile"):
        with pytest.raises(ValueError, match=name):
            sample(IsotropicScore(), VPSDE(), DormandPrince(), **{name: True}, **options)
    with pytest.raises(ValueError, match="noise must be a BrownianPath"):
        sample(IsotropicScore(), VPSDE(), SRA1(), noise=CounterNoise(0), **options)


@pytest.mark.parametrize("where", ["t_min", "everywhere"])
@pytest.mark.parametrize("solver", [DormandPrince(), ImprovedEuler()])
def test_a_score_that_is_not_finite_is_reported(solver: Solver, where: str) -> None:
    sde = VPSDE()

    def broken(x: Tensor, level: NoiseLevel) -> Prediction:
        eps = IsotropicScore()(x, level).eps
        bad = (level.t <= sde.t_min) if where == "t_min" else level.t > 0
        return Prediction.from_eps(x, level, torch.where(bad[:, None], torch.nan, eps))

    with pytest.raises(NonFiniteError, match="score_fn returned NaN") as caught:
        sample(broken, sde, solver, shape=(3, 2), plan=Adaptive(1e-2, 1e-2))
    assert caught.value.time == pytest.approx(1e-3 if where == "t_min" else 1.0, rel=0.01)
