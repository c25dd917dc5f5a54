"""``Restart``: the way up, moments and contraction in closed form, counts, splits."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from sde_diffusion import SDE, VESDE, VPSDE, named_target
from solvers import (
    DDIM,
    DPMSolverPP,
    EulerMaruyama,
    FixedGrid,
    ProbabilityFlow,
    RecordedNoise,
    Restart,
    RestartInterval,
    Solver,
    Tsitouras,
    UniPC,
    sample,
)
from tests.problems import (
    SDES,
    GaussianProblem,
    IsotropicScore,
    Moments,
    affine_run,
    fitted_order,
    uniform_grid,
)

LOW, HIGH = 0.2, 1.5
SOLVERS: list[Solver] = [DDIM(), ProbabilityFlow("heun"), DPMSolverPP(3), UniPC(3), Tsitouras()]


def time_at(sde: SDE, ratio: float) -> float:
    return float(sde.time(torch.tensor(-math.log(ratio), dtype=torch.float64)))


def grid_through(sde: SDE, steps: int) -> Tensor:
    """Uniform in log-SNR down to ``LOW`` and from there on."""
    low = time_at(sde, LOW)
    above = uniform_grid(sde, 2 * steps)
    first = above[above > low * (1 + 1e-9)]
    return torch.cat([first, torch.tensor([low], dtype=torch.float64), above[above < low]])


# --- the law -------------------------------------------------------------------------------------


def exact_law(problem: GaussianProblem, start: Moments, repeats: int) -> Moments:
    """The exact flow's law with its ways up, in closed form."""
    sde = problem.sde
    low, high = time_at(sde, LOW), time_at(sde, HIGH)
    law = problem.exact_moments(start, float(sde.t_max), low, eta=0.0)
    a, b = sde.at(low), sde.at(high)
    ratio = b.alpha / a.alpha
    for _ in range(repeats):
        spread = b.sigma**2 - ratio**2 * a.sigma**2
        eye = torch.eye(problem.dimension, dtype=torch.float64)
        law = Moments(ratio * law.mean, ratio**2 * law.covariance + spread * eye)
        law = problem.exact_moments(law, high, low, eta=0.0)
    return problem.exact_moments(law, low, float(sde.t_min), eta=0.0)


@pytest.mark.parametrize("name", ["vp", "ve", "subvp", "cosine", "edm"])
def test_moments_converge_to_those_of_the_exact_flow_with_its_ways_up(name: str) -> None:
    """Second order in the number of steps, from a wrong law: the mean off by one deviation of the
    prior, the variance by half."""
    problem = GaussianProblem(SDES[name])
    prior = problem.prior()
    wrong = Moments(prior.mean + prior.covariance[0, 0].sqrt(), 1.5 * prior.covariance)
    exact = exact_law(problem, wrong, repeats=2)
    errors, counts = [], (20, 40, 80)
    for n in counts:
        run = affine_run(
            problem.score_fn, problem.sde, ProbabilityFlow("heun"), grid_through(problem.sde, n), 2,
            slots=(1,), plan=Restart([(LOW, HIGH, 2, n)]),
        )  # fmt: skip
        errors.append(run.moments(wrong).distance(exact))
    assert fitted_order(counts, errors, finest=2) > 1.75, errors
    assert errors[-1] < 2e-2


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_a_wrong_law_contracts_and_the_right_one_stays(name: str) -> None:
    """One way up and down multiplies a deviation of the mean by ``A r``, a closed form below 1."""
    sde = SDES[name]
    problem = GaussianProblem(sde)
    start = problem.marginal(float(sde.t_max))
    shift = start.covariance[0, 0].sqrt() * torch.ones(2, dtype=torch.float64)
    wrong = Moments(start.mean + shift, start.covariance)
    low, high = time_at(sde, LOW), time_at(sde, HIGH)
    down, _ = problem.exact_affine_map(high, low)
    factor = down * (sde.at(high).alpha / sde.at(low).alpha)
    matrix, _ = problem.exact_affine_map(float(sde.t_max), float(sde.t_min))
    assert float(torch.linalg.eigvalsh(factor).max()) < 0.8
    truth = problem.marginal(float(sde.t_min))
    distances = []
    for repeats in range(4):
        plan = Restart([(LOW, HIGH, repeats, 30)])
        run = affine_run(
            problem.score_fn, sde, DPMSolverPP(3), grid_through(sde, 60), 2, (1,), plan
        )
        law = run.moments(wrong)
        expected = matrix @ torch.linalg.matrix_power(factor, repeats) @ shift
        assert torch.allclose(law.mean - truth.mean, expected, rtol=5e-3, atol=5e-3 * shift[0])
        distances.append(law.distance(truth))
        assert run.moments(start).distance(truth) < 5e-3  # discretisation alone
    assert all(after < 0.8 * before for before, after in pairwise(distances))


@pytest.mark.parametrize("name", ["vp", "ve", "subvp"])
def test_the_noise_of_the_way_up_is_the_forward_kernels(name: str) -> None:
    """A trajectory shows the states before and after; the draw and the levels are known."""
    sde = SDES[name]
    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x * sde.prior_std()
    z = torch.full_like(x, 0.7)
    run = sample(
        named_target("ring").score_fn(sde), sde, DDIM(), x=x, steps=12, trajectory=True,
        noise=RecordedNoise({(0, 1): z}), plan=Restart([RestartInterval(0.3, 1.1, steps=4)]),
    )  # fmt: skip
    assert run.trajectory is not None
    assert run.trajectory_times is not None
    times = run.trajectory_times
    (place,) = (times.diff() > 0).nonzero().flatten().tolist()
    low, high = sde.at(times[place]), sde.at(times[place + 1])
    assert float(high.sigma_over_alpha) == pytest.approx(1.1)
    ratios = sde.at(run.times).half_log_snr
    nearest = (ratios + math.log(0.3)).abs().argmin()
    assert times[place] == run.times[nearest]
    ratio = high.alpha / low.alpha
    variance = high.sigma**2 - ratio**2 * low.sigma**2
    expected = ratio * run.trajectory[place] + variance.sqrt() * z
    assert torch.allclose(run.trajectory[place + 1], expected, rtol=1e-12)
    assert len(times) == 12 + 4 + 1 + 1
    assert torch.equal(run.trajectory[-1], run.x)


# --- counts, splits, other plans -----------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_no_repeats_is_the_plain_run_bitwise(solver: Solver) -> None:
    sde = VPSDE()
    score_fn = named_target("ring").score_fn(sde)
    settings: dict[str, Any] = {"shape": (7, 2), "steps": 9, "trajectory": 2}
    plain = sample(score_fn, sde, solver, plan=FixedGrid(), **settings)
    for plan in (Restart([]), Restart([(LOW, HIGH, 0)])):
        run = sample(score_fn, sde, solver, plan=plan, **settings)
        assert torch.equal(run.x, plain.x)
        assert run.nfe == plain.nfe
        assert run.trajectory is not None
        assert plain.trajectory is not None
        assert torch.equal(run.trajectory, plain.trajectory)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("name", ["vp", "ve"])
def test_a_batch_may_be_split(solver: Solver, name: str) -> None:
    sde = SDES[name]
    score_fn = named_target("ring").score_fn(sde)
    plan = Restart([(0.05, 0.3, 2), (0.4, 2.0, 1, 3)])

    def draw(*ids: int) -> Tensor:
        return sample(
            score_fn, sde, solver, shape=(len(ids), 2), steps=10, seed=3, sample_ids=ids, plan=plan
        ).x

    whole = draw(5, 0, 99, 3)
    assert torch.equal(whole, torch.cat([draw(5), draw(0, 99), draw(3)]))
    again = sample(score_fn, sde, solver, shape=(4, 2), steps=10, seed=4, plan=plan).x
    assert not torch.equal(whole, again)
    assert bool(whole.isfinite().all())


@pytest.mark.parametrize(
    "solver,each,more",
    [(DDIM(), 1, 0), (ProbabilityFlow("heun"), 2, 0), (UniPC(3), 1, 0), (Tsitouras(), 6, 1)],
    ids=lambda value: type(value).__name__,
)
def test_evaluations_are_those_of_all_steps(solver: Solver, each: int, more: int) -> None:
    """``more``: what a solver evaluates once in every way down (the first slope of a pair)."""
    sde = VPSDE()
    plan = Restart([(0.05, 0.3, 2, 3), (0.4, 2.0, 3, 5)])
    run = sample(IsotropicScore(), sde, solver, shape=(2, 2), steps=10, plan=plan)
    ways, ups = 10 + 2 * 3 + 3 * 5, 2 + 3
    assert run.nfe == each * ways + more * (ups + 1)
    assert run.stats["accepted"] == ways + ups
    few = sample(IsotropicScore(), sde, DDIM(), shape=(2, 2), steps=1, plan=Restart([(0.1, 9.0)]))
    assert few.nfe == 2  # the grid has no time but its ends: down, up from the end, and down


def test_a_multistep_solver_starts_without_history_on_every_way_down() -> None:
    """Three runs by hand, joined by the forward kernel, are one run with a restart."""
    sde, solver = VPSDE(), DPMSolverPP(3)
    score_fn = named_target("ring").score_fn(sde)
    x = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    z = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    plan = Restart([(0.3, 1.5, 1, 4)])
    run = sample(
        score_fn, sde, solver, x=x, steps=12, trajectory=True, plan=plan,
        noise=RecordedNoise({(0, 1): z}),
    )  # fmt: skip
    assert run.trajectory is not None
    assert run.trajectory_times is not None
    times = run.trajectory_times
    up = int(times.diff().argmax())
    first = sample(score_fn, sde, solver, x=x, grid=times[: up + 1]).x
    assert torch.equal(first, run.trajectory[up])
    rest = sample(score_fn, sde, solver, x=run.trajectory[up + 1], grid=times[up + 1 :]).x
    assert torch.equal(rest, run.x)


def test_with_gradients_and_denoised() -> None:
    sde = VPSDE()
    score_fn = named_target("ring").score_fn(sde)
    plan = Restart([(0.1, 0.6, 2, 2)])
    x = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    settings: dict[str, Any] = {"steps": 5, "plan": plan, "seed": 2}

    def end(x: Tensor) -> Tensor:
        return sample(score_fn, sde, UniPC(2), x=x, gradients=True, denoise=True, **settings).x

    assert torch.autograd.gradcheck(end, (x.clone().requires_grad_(),), atol=1e-4)


@pytest.mark.parametrize(
    "intervals,message",
    [
        ([(0.3, 0.3)], r"intervals\[0\]\.high must be a finite number greater than 0\.3"),
        ([(0.0, 0.3)], r"intervals\[0\]\.low must be a finite number greater than 0"),
        ([(0.1, float("nan"))], r"intervals\[0\]\.high"),
        ([(0.1, 0.3), (0.2, 0.5)], r"must not overlap, but \(0\.2, 0\.5\) begins within"),
        ([(0.1, 0.3), (0.1, 0.3, 1, 5)], "must not overlap"),
        ([(0.1, 0.3, -1)], r"intervals\[0\]\.repeats must be at least 0, got -1"),
        ([(0.1, 0.3, 1, 0)], r"intervals\[0\]\.steps must be at least 1, got 0"),
    ],
)
def test_intervals_are_checked(intervals: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Restart(intervals)


def test_what_does_not_fit_is_refused_before_any_evaluation() -> None:
    def never(*_: Any) -> Any:
        raise AssertionError

    for wrong in (0.3, "low", [0.1, 0.3], [(1,)]):
        with pytest.raises(TypeError, match="intervals"):
            Restart(wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="repeats must be a whole number"):
        Restart([(0.1, 0.3, 1.5)])
    settings: dict[str, Any] = {"shape": (2, 2), "steps": 5}
    with pytest.raises(ValueError, match=r"EulerMaruyama.* draws noise of its own"):
        sample(never, VPSDE(), EulerMaruyama(), plan=Restart([(0.1, 0.3)]), **settings)
    for interval in ((1e-4, 1.0), (0.1, 200.0)):
        with pytest.raises(ValueError, match=r"the grid reaches from 50 to 0\.01.*: keep within"):
            sample(never, VESDE(), DDIM(), plan=Restart([interval]), **settings)
    assert Restart([(0.1, 0.3), (0.3, 0.5)]).rho == 7  # touching is not overlapping
