"""Embedded pairs at fixed steps, and ``Adaptive``: tolerances, counts, batches, paths, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sde_diffusion import (
    VPSDE,
    GaussianMixture,
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
from solvers.noise import AREA
from tests.problems import (
    SDES,
    GaussianProblem,
    IsotropicScore,
    affine_run,
    assert_close_to_monte_carlo,
    fine_flow,
    fitted_order,
    uniform_grid,
    warped_grid,
)

PAIRS: dict[str, Solver] = {
    "bogacki_shampine": BogackiShampine(),
    "dormand_prince": DormandPrince(),
    "tsitouras": Tsitouras(),
}
STOCHASTIC: dict[str, Solver] = {"improved_euler": ImprovedEuler(), "sra1": SRA1()}
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


def start(name: str, count: int = 6, dimension: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, dimension, generator=generator, dtype=torch.float64)
    return x * SDES[name].prior_std()


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
    problem, x = GaussianProblem(SDES[name]), start(name)
    sde = problem.sde
    exact = problem.exact_flow(x, sde.t_max, sde.t_min)
    tolerances = (1e-4, 1e-6, 1e-8)
    if pair == "bogacki_shampine":
        tolerances = (1e-3, 1e-5, 1e-7)
    errors = []
    for tolerance in tolerances:
        run = sample(problem.score_fn, sde, PAIRS[pair], x=x, plan=Adaptive(tolerance, tolerance))
        errors.append(float((run.x - exact).abs().max()))
        assert errors[-1] < 50 * tolerance
    # Four decades of tolerance are about four of error (more where 1e-4 is still coarse).
    assert 0.6 < math.log10(errors[0] / errors[2]) / 4 < 1.6


@pytest.mark.parametrize("solver", [DormandPrince(), BogackiShampine(), ImprovedEuler(), SRA1()])
def test_evaluations_are_counted_per_sample_and_end_with_the_sample(solver: Solver) -> None:
    sde, count = VPSDE(), 12
    counts = torch.zeros(count, dtype=torch.long)
    target = named_target("ring")
    score_fn = PerSample(target.score_fn(sde), counts, torch.arange(count))
    tolerance = 5e-2 if solver.stochastic else 1e-4
    plan = Adaptive(tolerance, tolerance)
    run = sample(score_fn, sde, solver, shape=(count, 2), plan=plan, dtype=torch.float64)
    assert run.nfe_per_sample is not None
    assert torch.equal(run.nfe_per_sample, counts)
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


# --- adaptive SDE --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vp", "ve"])
@pytest.mark.parametrize("method", STOCHASTIC)
def test_weak_order_of_the_stochastic_pairs(method: str, name: str) -> None:
    problem, solver = GaussianProblem(SDES[name]), STOCHASTIC[method]
    sde, steps = problem.sde, (64, 128)
    begin = problem.marginal(sde.t_max)
    exact = problem.exact_moments(begin, sde.t_max, sde.t_min, 1.0)
    slots = (0, AREA) if method == "sra1" else (0,)
    errors = [
        affine_run(problem.score_fn, sde, solver, uniform_grid(sde, n), 2, slots)
        .moments(begin)
        .distance(exact)
        for n in steps
    ]
    assert fitted_order(steps, errors, finest=2) > 2 - 0.25


@pytest.mark.parametrize("method", STOCHASTIC)
def test_rejected_steps_do_not_bias_the_variance(method: str) -> None:
    """At a loose tolerance; fresh noise after a rejection would give 0.94."""
    sde, n = VPSDE(), 4000
    target = GaussianMixture(torch.zeros(1, 1), torch.tensor([0.25]))
    run = sample(
        target.score_fn(sde),
        sde,
        STOCHASTIC[method],
        shape=(n, 1),
        plan=Adaptive(0.1, 0.1),
        dtype=torch.float64,
    )
    assert run.stats["rejected"] > 1
    variance = 0.25 * sde.at(1e-3).alpha ** 2 + sde.at(1e-3).sigma ** 2
    assert_close_to_monte_carlo(run.x.var() / variance, 1.0, math.sqrt(2 / n), z=4.0)


@pytest.mark.parametrize("method", STOCHASTIC)
def test_tolerances_converge_on_one_path(method: str) -> None:
    sde = VPSDE()
    options: dict[str, Any] = {"shape": (20, 2), "dtype": torch.float64}
    solver, score_fn = STOCHASTIC[method], IsotropicScore()
    fine = sample(
        score_fn, sde, solver, grid=uniform_grid(sde, 256), noise=BrownianPath(sde, 0), **options
    ).x
    errors = []
    for tolerance in (0.1, 0.02):
        end = sample(score_fn, sde, solver, plan=Adaptive(tolerance, tolerance), **options).x
        errors.append(float((end - fine).square().mean().sqrt()))
    assert errors[1] < 0.5 * errors[0]
    assert errors[1] < 0.1


def test_the_path_gives_the_area_of_its_own_increments() -> None:
    """The integral over a step is that over its parts; area and increment are independent normals.

    5 standard errors of 20,000 draws.
    """
    sde, n = VPSDE(), 20_000
    path, x = BrownianPath(sde, 4), torch.empty(n, 1, dtype=torch.float64)

    def seen(first: float, last: float) -> tuple[Tensor, Tensor, float]:
        a, b = sde.at(first), sde.at(last)
        h = float(a.sigma_over_alpha**2 - b.sigma_over_alpha**2)
        step = Step(0, a, b)
        z, area = path(x, step), path(x, step, AREA)
        for draw in (z, area):
            assert abs(float(draw.var()) - 1) < 5 * math.sqrt(2 / n)
        assert abs(float((z * area).mean())) < 5 / math.sqrt(n)
        increment = math.sqrt(h) * z
        return increment, h * (0.5 * increment + math.sqrt(h / 12) * area), h

    (w, i, h), (w1, i1, h1), (w2, i2, h2) = (seen(*p) for p in ((0.6, 0.1), (0.6, 0.3), (0.3, 0.1)))
    torch.testing.assert_close(w1 + w2, w, rtol=0, atol=1e-10)
    torch.testing.assert_close(i1 + h2 * w1 + i2, i, rtol=0, atol=1e-10)
    assert abs(h1 + h2 - h) < 1e-12


def test_levels_of_their_own_see_the_same_path() -> None:
    sde = VPSDE()
    path, x = BrownianPath(sde, 4), torch.empty(3, 2, dtype=torch.float64)
    firsts, lasts = torch.tensor([0.9, 0.5, 0.2]).double(), torch.tensor([0.4, 0.3, 0.01]).double()
    together = path(x, Step(0, sde.at(firsts), sde.at(lasts)))
    for i in range(3):
        alone = path(x, Step(0, sde.at(float(firsts[i])), sde.at(float(lasts[i]))))
        assert torch.equal(together[i], alone[i])


# --- what it refuses -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rtol", "atol", "safety", "shrink", "integral"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
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
