"""Error budgets of classes and of guided samples, against closed forms and by other ways."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

from experiments.budget_parts import Part, paired_energy
from experiments.budget_subject import BudgetSubject
from experiments.conditions import Condition
from experiments.draw import Machine
from experiments.error_budget import BudgetOptions, make_plan
from experiments.metrics import energy_distance
from experiments.subjects import ExactSubject
from sde_diffusion import GaussianMixture
from solvers import DDIM, DPMSolverPP, ProbabilityFlow
from tests.test_error_budget import SHORT, energy, from_prior, measured, near, noised, problem

CFG = {"guidances": ("cfg",), "scales": (3.0,)}


def two_classes() -> GaussianMixture:
    """N(-1, 0.4²) and N(1, 0.5²), a class each."""
    means, variances = torch.tensor([[-1.0], [1.0]]), torch.tensor([0.16, 0.25])
    return GaussianMixture(means, variances, labels=torch.tensor([0, 1]))


def of_classes(condition: Condition, **changes: Any) -> Any:
    return problem(target=two_classes(), num_classes=2, condition=condition, **changes)


def test_the_parts_of_a_class_are_their_closed_forms() -> None:
    made = of_classes(Condition("cfg", 1.0, 1))
    found = measured(made, ProbabilityFlow("euler"), 6, fine=40)
    law = noised(1, 0.5, SHORT, SHORT.t_min)
    near(found["truncation"], energy((1, 0.5), law))
    near(found["prior_mismatch"], energy(from_prior(1.0, 0.5, SHORT), law))
    assert len(found["total"]) == len(found["floor"]) == made.repeats


def mixture_energy(a: list[tuple[float, float]], b: list[tuple[float, float]]) -> float:
    """D² of two even mixtures of Gaussians: twice the integral of (F - G)²."""

    def apart(x: float) -> float:
        f, g = (np.mean([stats.norm.cdf(x, *one) for one in law]) for law in (a, b))
        return float((f - g) ** 2)

    return 2 * integrate.quad(apart, -8, 8, limit=200)[0]


def in_turn(laws: list[tuple[float, float]], noise: Tensor) -> Tensor:
    """Sample i of the law i mod C, from given standard noise (N, 1)."""
    place = torch.arange(len(noise)) % len(laws)
    means, deviations = (torch.tensor(column).double()[place] for column in zip(*laws, strict=True))
    return means[:, None] + deviations[:, None] * noise


def test_classes_in_turn_leave_no_bias() -> None:
    # Few samples of classes that are far apart: as if drawn, the bias would be -0.19.
    before, after = [(-2.0, 0.2), (2.0, 0.3)], [(-1.9, 0.25), (1.8, 0.2)]
    classes = torch.arange(20) % 2
    noise = torch.randn(2, 1500, 20, 1, generator=torch.Generator().manual_seed(0)).double()
    paired, apart, careless = [], [], []
    for one, other in zip(*noise, strict=True):
        x, y, z = in_turn(before, one), in_turn(after, one), in_turn(after, other)
        paired.append(paired_energy(x, y, classes))
        apart.append(energy_distance(x, z, unbiased=True, classes=(classes, classes)))
        careless.append(energy_distance(x, z, unbiased=True))
    expected = mixture_energy(before, after)
    near(tuple(paired), expected)
    error = float(np.std(apart)) / math.sqrt(len(apart))
    assert abs(np.mean(apart) - expected) < 4 * error < 0.02
    assert np.mean(careless) < expected - 0.1
    with pytest.raises(ValueError, match="at least 2 samples of each class, got 1"):
        paired_energy(x[:3], y[:3], classes[:3])


@pytest.mark.parametrize(
    ("solver", "fine"),
    [
        pytest.param(DDIM(), 30, id="ode"),
        pytest.param(DPMSolverPP(order=1, eta=1.0), 60, id="sde", marks=pytest.mark.slow),
    ],
)
def test_guided_samples_have_a_discretisation_and_nothing_of_data(solver: Any, fine: int) -> None:
    made = of_classes(Condition("cfg", 3.0, "all"), samples=300, repeats=16)
    found = measured(made, solver, 5, fine)
    assert set(found) == {"discretisation", "total", "floor", "reference"}
    # The same distance twice: from the same noise, and between independent sets.
    a, b = np.array(found["discretisation"]), np.array(found["total"])
    error = np.std(a - b, ddof=1) / math.sqrt(len(a))
    assert abs(np.mean(a - b)) < 4 * error  # sixteen repeats: 1 in 900, seeds fixed
    assert a.mean() > 10 * a.std(ddof=1) / math.sqrt(len(a))  # so that it says something
    assert a.std(ddof=1) < b.std(ddof=1)  # what sharing the noise is for
    assert found["reference"][0] < 1e-2 * a.mean()


def test_a_guided_network_has_a_score_error_too() -> None:
    exact = two_classes()
    same = of_classes(Condition("classifier", 2.0, "all"), samples=100, repeats=2)
    other = GaussianMixture(exact.means + 0.3, exact.variances, labels=exact.labels)
    for network, least in ((exact, 0.0), (other, 0.1)):
        made = of_classes(
            same.condition,
            samples=100,
            repeats=2,
            network=network.model(SHORT),
            classifier=network.classifier(SHORT),
        )
        found = measured(made, DDIM(), 8, fine=20)
        assert set(found) == {"score_error", "discretisation", "total", "floor", "reference"}
        value = Part(found["score_error"]).value
        assert value < 1e-4 if least == 0 else value > least


def test_a_network_without_its_target_has_no_law_at_other_scales() -> None:
    plan = make_plan(BudgetOptions(models=("digits-vp",), solvers=("ddim",), budgets=(4,), **CFG))
    (planned,) = plan.cells
    assert plan.floor_task(planned, 0) is None
    assert plan.primary(planned) == "discretisation"
    assert plan.truth(planned) == "the guided ODE, finely solved"
    assert plan.by_time_task(planned) is not None  # of the score without guidance


def test_a_class_of_real_data_is_compared_with_its_own() -> None:
    plan = make_plan(BudgetOptions(models=("digits-vp",), label="3", samples=10, budgets=(4,)))
    planned = plan.cells[0]
    assert plan.truth(planned) == "held-out data of class 3"
    made = plan.subject.problem("vp", planned.cell.condition, **numbers(plan.options))
    data = plan.subject.network.data if plan.subject.network is not None else None
    assert made.data is not None
    assert data is not None
    assert data.test_y is not None
    assert len(made.data[0]) == int(data.test_y.eq(3).sum()) < len(data.test_x)


def numbers(options: BudgetOptions) -> dict[str, Any]:
    names = ("repeats", "seed", "grid", "denoise")
    machine = Machine(torch.device(options.device))
    return {"samples": 10, "machine": machine, **{name: getattr(options, name) for name in names}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": (2.0,)}, "--scale 2 has nothing to scale"),
        ({"label": "9"}, r"--label must lie in 0\.\.7"),
        ({"targets": ("gaussian",), **CFG}, "--guidance cfg needs classes, and 'gaussian' has a"),
        ({"guidances": ("cfg",), "label": "none"}, "nothing to guide towards"),
        ({"samples": 15, **CFG}, "--samples 15 is too few for 8 classes in turn; .* 16"),
        ({"cell_timeout": -1.0}, "--cell-timeout must"),
        ({"jobs": 0}, "--jobs must be at least 1"),
    ],
)
def test_what_has_no_meaning_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(BudgetOptions(**{"targets": ("ring",), **options}))


def test_classes_of_another_target_are_refused() -> None:
    plan = make_plan(BudgetOptions(models=("digits-vp",), budgets=(10,)))
    subject = BudgetSubject(ExactSubject("ring", ["vp"]), plan.subject.network)
    with pytest.raises(ValueError, match="--label 1 compares classes, and --model has 10 where"):
        subject.check(Condition(label=1))
    subject.check(Condition())  # all of them together are no matter of classes
