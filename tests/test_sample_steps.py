"""``sample`` against steps taken by hand, and against compiled ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from sde_diffusion import VPSDE, GaussianMixture, ScoreFn, named_target
from solvers import (
    DDIM,
    DEIS,
    Ancestral,
    CounterNoise,
    EulerMaruyama,
    Langevin,
    Noise,
    PredictorCorrector,
    ProbabilityFlow,
    Solver,
    Step,
    Stepped,
    sample,
)
from solvers.multistep import Multistep
from tests.native import NATIVE

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
