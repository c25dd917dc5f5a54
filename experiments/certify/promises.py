"""Checks of what every solver owes: its count, the independence of a batch, short runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from experiments.certify.bench import Bench, FlowProblem, counted
from experiments.certify.certificate import Check, Sizes
from sde_diffusion import named_target
from solvers import Integrator, Solver, sample


def evaluations(solver: Solver | Integrator, bench: Bench, sizes: Sizes) -> list[Check]:
    """NFE, counted by a score function of the check's own and compared with what is reported."""
    problem = bench.flow("ring", "vp")
    adaptive = isinstance(solver, Integrator) and solver.adaptive
    reported, own = [], []
    for n in (8, 16):
        score_fn = counted(problem.score_fn)
        x = problem.x[:3]
        run = sample(score_fn, problem.sde, solver, x=x, steps=None if adaptive else n)
        reported.append(float(run.nfe))
        own.append(score_fn.rows / len(x))
        if adaptive:
            break
    passed = all(math.isclose(a, b) for a, b in zip(reported, own, strict=True))
    if adaptive:
        measured, note = f"{own[0]:.4g} a run", ""
    else:
        each = (own[1] - own[0]) / 8
        extra = own[0] - 8 * each
        measured = f"{each:g}"
        note = f"and {extra:g} more in a run" if abs(extra) > 1e-9 else ""
    if not passed:
        note = f"reported {reported}, counted {own}"
    return [Check("nfe", "evaluations per step", "as counted", measured, passed, note)]


def splitting(solver: Solver | Integrator, bench: Bench, sizes: Sizes) -> list[Check]:
    """A batch in three parts and in another order of parts gives the same samples, bit by bit."""
    adaptive = isinstance(solver, Integrator) and solver.adaptive
    total, cuts = (3, ((0, 1), (1, 3))) if adaptive else (13, ((5, 13), (0, 1), (1, 5)))
    worst = 0.0
    for name in ("vp", "ve"):
        problem = bench.flow("ring", name)

        def draw(first: int, last: int, problem: FlowProblem = problem) -> Tensor:
            return sample(
                problem.score_fn,
                problem.sde,
                solver,
                shape=(last - first, 2),
                steps=None if adaptive else 9,
                seed=4,
                sample_ids=range(first, last),
            ).x

        whole = draw(0, total)
        for first, last in cuts:
            apart = (whole[first:last] - draw(first, last)).abs().max()
            worst = max(worst, float(apart) if bool(apart.isfinite()) else math.inf)
    measured = "bitwise" if worst == 0 else f"{worst:.1e} apart"
    return [Check("split", "independence of the batch", "bitwise", measured, worst == 0)]


def short_runs(solver: Solver | Integrator, bench: Bench, sizes: Sizes) -> list[Check]:
    """One step and two steps, on every kind of schedule and in 16 dimensions: finite."""
    return finite_runs(solver, bench, ("vp", "ve", "subvp"))


def finite_runs(solver: Solver | Integrator, bench: Bench, names: Sequence[str]) -> list[Check]:
    """One step and two steps under the SDEs of these names."""
    adaptive = isinstance(solver, Integrator) and solver.adaptive
    largest = 0.0
    for name in names:
        sde = bench.sde(name)
        score_fn = named_target("gmm16").score_fn(sde)
        for n in (1,) if adaptive else (1, 2):
            settings: dict[str, Any] = {"shape": (2 if adaptive else 8, 16), "steps": n}
            run = sample(score_fn, sde, solver, **settings)
            largest = max(largest, float(run.x.abs().max()))
    passed = math.isfinite(largest)
    note = f"states up to {largest:.2g}"
    return [Check("short", "one step, two steps", "finite", "finite", passed, note)]
