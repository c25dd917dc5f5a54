"""Every part of an error budget against its closed form, on one-dimensional Gaussians.

There the probability-flow ODE and every linear sampler are affine maps of the initial state, so the
law of each solution is a Gaussian that is known, and so is the energy distance of two Gaussians.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import integrate, stats

from experiments.budget_parts import (
    ORDER,
    Part,
    law_parts,
    paired_energy,
    reference_parts,
    solver_parts,
)
from experiments.budget_pictures import budget_tables
from experiments.budget_problem import Problem, fine_steps, reference_for
from experiments.budget_subject import scaled
from experiments.draw import Machine
from experiments.error_budget import BudgetOptions, make_plan, run
from experiments.network_error import (
    Amplified,
    SwitchedScore,
    amplified,
    displacements,
    error_by_time,
    score_error_by_time,
)
from experiments.results import load_results, results_schema
from experiments.run_error_budget import run_error_budget
from sde_diffusion import SDE, VPSDE, GaussianMixture, named_target
from sde_diffusion.scaling import Scaling
from solvers import DDIM, DPMSolverPP, ProbabilityFlow, Solver, sample
from tests.test_compare import Silent

RING = {"targets": ["ring"]}
SHORT = VPSDE(beta_max=4.0, t_min=0.15)  # a prior and an end that are visibly off


def energy(a: tuple[float, float], b: tuple[float, float]) -> float:
    """D² of N(m, s²) and N(n, r²), each given as (mean, deviation)."""

    def mean_distance(mean: float, deviation: float) -> float:
        return float(stats.foldnorm.mean(abs(mean) / deviation, scale=deviation))

    (m, s), (n, r) = a, b
    across = mean_distance(m - n, math.hypot(s, r))
    return 2 * across - mean_distance(0, math.sqrt(2) * s) - mean_distance(0, math.sqrt(2) * r)


def gaussian(mean: float, deviation: float) -> GaussianMixture:
    return GaussianMixture(torch.tensor([[mean]]), torch.tensor([deviation**2]))


def noised(mean: float, deviation: float, sde: SDE, t: float) -> tuple[float, float]:
    level = sde.at(t)
    alpha, sigma = float(level.alpha), float(level.sigma)
    return alpha * mean, math.hypot(alpha * deviation, sigma)


def from_prior(mean: float, deviation: float, sde: SDE) -> tuple[float, float]:
    """The law of the exact ODE of a Gaussian's score, from the standard prior."""
    low, high = noised(mean, deviation, sde, sde.t_min), noised(mean, deviation, sde, sde.t_max)
    ratio = low[1] / high[1]
    return low[0] - ratio * high[0], ratio


def problem(**changes: Any) -> Problem:
    given: dict[str, Any] = {
        "name": "gaussian",
        "sde_name": "vp",
        "sde": SHORT,
        "event_shape": (1,),
        "target": gaussian(1.0, 0.5),
        "network": None,
        "num_classes": None,
        "data": None,
        "samples": 1500,
        "repeats": 6,
        "seed": 0,
        "grid": None,
        "denoise": False,
        "machine": Machine(torch.device("cpu")),
    }
    return Problem(**given | changes)


def measured(
    made: Problem, solver: Solver, steps: int, fine: int | None = None
) -> dict[str, tuple[float, ...]]:
    """Every part of a solver's budget, squared, repeat by repeat; ``fine``: steps of the fine
    solution."""
    found: dict[str, list[float]] = {}
    for repeat in range(made.repeats):
        reference = reference_for(solver)
        shared, tensors = reference_parts(made, reference, fine or fine_steps(reference), repeat)
        x = made.solve(solver, steps, made.ids(repeat)).x
        own = solver_parts(made, x, tensors["x"], tensors.get("true"), repeat)
        for name, value in {**law_parts(made, repeat), **shared, **own}.items():
            found.setdefault(name, []).append(value)
    return {name: tuple(values) for name, values in found.items()}


def near(squared: tuple[float, ...], expected: float) -> None:
    """Within five standard errors: 1 in 250 where Student has 5 degrees of freedom, seeds fixed."""
    error = float(np.std(squared, ddof=1)) / math.sqrt(len(squared))
    assert abs(np.mean(squared) - expected) < 5 * error
    assert error < 0.15 * expected  # so that the comparison says something


def test_paired_energy_is_the_energy_distance_of_the_laws() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 700, 1, generator=generator, dtype=torch.float64)
    near(tuple(paired_energy(one, 0.3 + 1.5 * one) for one in x), energy((0, 1), (0.3, 1.5)))
    # Equal laws whose pairs are far apart: zero on average, and sometimes negative.
    found = np.array([paired_energy(one, -one) for one in x])
    assert abs(found.mean()) < 4 * found.std() / math.sqrt(len(found))
    assert found.min() < 0
    assert paired_energy(x[0], x[0]) == 0
    with pytest.raises(ValueError, match="two pairs of one shape"):
        paired_energy(x[0], x[0, :10])


def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(90, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = paired_energy(x, 1.1 * x)
    monkeypatch.setattr("experiments.budget_parts._TILE", 32)
    assert paired_energy(x, 1.1 * x) == pytest.approx(whole, rel=1e-10)


def test_every_part_is_its_closed_form() -> None:
    other = gaussian(0.7, 0.7)  # stands for a network with errors of mean and spread
    made = problem(network=other.model(SHORT))
    found = measured(made, ProbabilityFlow("euler"), 6)
    near(found["truncation"], energy((1, 0.5), noised(1, 0.5, SHORT, SHORT.t_min)))
    exact = from_prior(1.0, 0.5, SHORT)
    law = noised(1, 0.5, SHORT, SHORT.t_min)
    near(found["prior_mismatch"], energy(exact, law))
    fine = from_prior(0.7, 0.7, SHORT)
    near(found["score_error"], energy(fine, exact))
    # The solver is affine: two points give its map of the standard prior.
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    b, a_b = sample(other.score_fn(SHORT), SHORT, ProbabilityFlow("euler"), x=ends, steps=6).x
    solved = float(b), float(a_b - b)
    near(found["discretisation"], energy(solved, fine))
    near(found["total"], energy(solved, (1.0, 0.5)))
    # The triangle inequality, with what Monte Carlo leaves.
    parts = [Part(found[name]).value for name in ORDER if name in found]
    assert len(parts) == 4
    assert Part(found["total"]).value < 1.05 * sum(parts)


def test_stochastic_solvers_share_the_brownian_path() -> None:
    made = problem(samples=200, repeats=1)
    fine = DPMSolverPP(order=2, eta=1.0)
    a, b = (made.solve(fine, steps, made.ids(0), grid="log_snr").x for steps in (40, 20))
    # Sample by sample: with independent noise they would be 0.7 apart, and D² scatter by 0.005.
    assert float((a - b).square().mean().sqrt()) < 0.05
    assert abs(paired_energy(a, b)) < 2e-4


def test_truncation_is_less_after_denoising() -> None:
    plain, denoised = (problem(denoise=d, sde=VPSDE(t_min=0.1)).truncated(0) for d in (False, True))
    assert paired_energy(*denoised) != paired_energy(*plain)
    assert denoised[1].std() < 0.5 < plain[1].std()  # the posterior mean is narrower than the data


def test_scaled_targets_are_the_law_of_scaled_samples() -> None:
    target, scaling = named_target("gmm16"), Scaling(-3.0, 5.0)
    x = target.sample(5, 0, dtype=torch.float64)[0]
    found = scaled(target, scaling).log_prob(scaling.to_model(x))
    assert torch.allclose(found, target.log_prob(x) + 16 * math.log(4.0), rtol=1e-9)


def test_score_error_by_time_is_its_closed_form() -> None:
    # Equal spreads, means 0.3 apart: eps differs by sigma alpha 0.3 / (alpha² s² + sigma²).
    exact, network = gaussian(1.0, 0.5), gaussian(0.7, 0.5)
    x, _ = exact.sample(2000, 0)
    sde = VPSDE()
    buckets = score_error_by_time(network.model(sde), exact.model(sde), x, sde, buckets=4)

    def square(half_log_snr: float) -> float:
        level = sde.at(float(sde.time(half_log_snr)))
        alpha, sigma = float(level.alpha), float(level.sigma)
        return (0.3 * sigma * alpha / ((0.5 * alpha) ** 2 + sigma**2)) ** 2

    for bucket in buckets:
        low, high = bucket.half_log_snr_low, bucket.half_log_snr_high
        expected = integrate.quad(square, low, high)[0] / (high - low)
        # Times are spread evenly over the bucket; float32 times are the error that is left.
        assert bucket.mean == pytest.approx(expected, rel=2e-3)


def amplification(made: Problem, buckets: int) -> Amplified:
    _, error = error_by_time(made, buckets)
    return amplified(DDIM(), 10, *displacements(made, DDIM(), 10, error), error)


def test_amplification_is_of_the_error_inside_its_range_only() -> None:
    exact, network = gaussian(1.0, 0.5), gaussian(0.7, 0.5)
    made = problem(network=network.model(SHORT), samples=100)
    whole = amplification(made, 1)
    assert whole.displacement == (whole.whole,)
    line, (_, error) = amplification(made, 3), error_by_time(made, 3)
    # On a Gaussian, errors of the mean add up along the path: so do the displacements.
    assert sum(line.displacement) == pytest.approx(line.whole, rel=1e-4)
    assert line.factor[0] == pytest.approx(line.displacement[0] / math.sqrt(error[0].mean))
    same = amplification(problem(network=exact.model(SHORT), samples=50), 2)
    assert max(same.displacement) < 1e-5


def test_a_switched_score_is_one_inside_and_the_other_outside() -> None:
    a, b = gaussian(0.0, 1.0).score_fn(SHORT), gaussian(3.0, 1.0).score_fn(SHORT)
    x = torch.zeros(4, 1)
    level = SHORT.at(torch.tensor([0.05, 0.3, 0.6, 0.9]))
    lambdas = level.half_log_snr
    switched = SwitchedScore(a, b, float(lambdas[2]) - 1e-3, float(lambdas[1]) + 1e-3)
    found = switched(x, level).eps
    expected = torch.cat([b(x, level).eps[:1], a(x, level).eps[1:3], b(x, level).eps[3:]])
    assert torch.allclose(found, expected)


def test_a_run_writes_rows_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.budget_problem.FINE_ODE_STEPS", 8)
    given: dict[str, Any] = {"solvers": ["ddim"], "budgets": [4, 8], "samples": 20, "repeats": 2}
    options = BudgetOptions(targets=["ring"], sdes=["vp"], out=str(tmp_path / "a"), **given)
    outcome = run(make_plan(options), Silent())
    results = load_results(tmp_path / "a")
    jsonschema.Draft202012Validator(results_schema()).validate(results)
    assert [row["budget"] for row in results["rows"]] == [4, 8]
    parts = results["rows"][0]["parts"]
    assert set(parts) == {"truncation", "prior_mismatch", "discretisation", "total", "floor"}
    assert [table.title for table in budget_tables(outcome)]
    digits = BudgetOptions(models=["digits-vp"], out=str(tmp_path / "b"), buckets=2, **given)
    assert run_error_budget(digits) == 0
    for name in ("error_budget.png", "network_error.png"):
        with Image.open(tmp_path / "b" / name) as image:
            image.load()
    (row, _) = load_results(tmp_path / "b")["rows"]
    assert set(row["parts"]) == {"rest", "discretisation", "total", "floor"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["digits"]}, "--target digits has no exact score; give its network alone"),
        (
            {"targets": ["ring"], "models": ["digits-vp"]},
            "makes samples of shape .* and --target ring",
        ),
        (
            {"targets": ["ring"], "solvers": ["scipy_ode"]},
            "--solver scipy_ode chooses its own steps",
        ),
        ({**RING, "samples": 1}, "--samples must be at least 2, got 1"),
        ({"targets": ["ring", "moons"]}, "one --target, one --model, or one of each"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(BudgetOptions(**options))
