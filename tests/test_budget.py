"""The number of steps that a budget of evaluations allows is measured, not computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor

from experiments import budget
from experiments.budget import measured_nfe, steps_for_budget
from solvers import Solver, Step, Stepped, catalogue


@dataclass(frozen=True)
class WarmUp(Solver):
    """Costs four evaluations on each of its first steps and one afterwards, as a multistep may."""

    first: int = 3
    order = 1
    stochastic = False

    def init(self, x: Tensor) -> Any:
        return 0

    def step(self, score_fn: Any, x: Tensor, step: Step, state: Any, noise: Any) -> Stepped:
        for _ in range(4 if state < self.first else 1):
            score_fn(x, step.start)
        return Stepped(x, state + 1)


BY_STEPS = [
    name
    for name, entry in catalogue().items()
    if issubclass(entry.type, Solver) and name != "hold"  # which costs nothing
]


@pytest.mark.parametrize("name", BY_STEPS)
@pytest.mark.parametrize("nfe", [10, 37])
def test_the_largest_number_of_steps_within_the_budget(name: str, nfe: int) -> None:
    solver: Any = catalogue()[name].type()
    steps = steps_for_budget(solver, nfe)
    assert measured_nfe(solver, steps) <= nfe < measured_nfe(solver, steps + 1)


@pytest.mark.parametrize("nfe", [4, 7, 8, 13, 20, 100])
def test_a_warm_up_is_counted(nfe: int) -> None:
    steps = steps_for_budget(WarmUp(), nfe)
    assert measured_nfe(WarmUp(), steps) <= nfe < measured_nfe(WarmUp(), steps + 1)
    by_hand = nfe // 4 if nfe < 12 else 3 + (nfe - 12)
    assert steps == by_hand


def test_the_final_denoise_counts() -> None:
    assert steps_for_budget(WarmUp(first=0), 10) == 10
    assert steps_for_budget(WarmUp(first=0), 10, denoise=True) == 9


def test_results_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = steps_for_budget(WarmUp(first=1), 12)

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("measured again")

    monkeypatch.setattr(budget, "sample", refuse)
    assert steps_for_budget(WarmUp(first=1), 12) == steps


def test_a_budget_that_fits_no_step_says_so() -> None:
    with pytest.raises(ValueError, match="nfe must be at least 4 for WarmUp"):
        steps_for_budget(WarmUp(), 3)
    with pytest.raises(ValueError, match="nfe must be at least 1"):
        steps_for_budget(WarmUp(), 0)
    with pytest.raises(ValueError, match="no step count"):
        steps_for_budget(catalogue()["hold"].type(), 10)  # type: ignore[arg-type]
