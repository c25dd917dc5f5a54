"""Checks of another library's schedulers: the same scores, noise and references, their own times.

Of the times it is given a scheduler takes the two ends and the number of steps. So its order is
that on its own discretisation, from ``t_max`` to ``t_min``; there is no uniform grid, no start from
the middle, and no nested grids on which paths could be shared. Its tables are float32, and hold no
sub-VP process; steps are counted up to a third of its 1,000 levels, beyond which rounding to them
makes the steps uneven.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from experiments.certify.accuracy import sampled_limit
from experiments.certify.bench import Bench, FlowProblem
from experiments.certify.certificate import QUICK, Check, Sizes
from experiments.certify.convergence import converge, limit_check, order_check
from experiments.certify.problems import NotAffineError, affine_run
from experiments.certify.promises import finite_runs
from solvers import Integrator, Solver, sample

_SIZES = replace(QUICK, flows=(("ring", "vp"), ("gaussian", "ve")), most=320)
_FLOAT32 = 1e-6  # error that float32 tables leave: order by order of magnitude
_AFFINE = 1e-4  # to which float32 states are affine


def peer_order(solver: Solver | Integrator, bench: Bench, sizes: Sizes) -> list[Check]:
    """Order and limit on the probability-flow ODE, in the scheduler's own steps."""
    curves = []
    for target, name in _SIZES.flows:
        problem = bench.flow(target, name)

        def error(n: int, problem: FlowProblem = problem) -> float:
            run = sample(problem.score_fn, problem.sde, solver, x=problem.x, steps=n)
            return problem.error(run.x)

        curves.append(converge(error, f"{target} · {name}", solver.order, _SIZES, _FLOAT32))
    return [
        order_check("uneven", "order, its own times", solver.order, curves),
        limit_check(solver.order, curves),
    ]


def peer_weak_order(solver: Solver | Integrator, bench: Bench, sizes: Sizes) -> list[Check]:
    """Weak order of mean and variance, in the scheduler's own steps."""
    curves = []
    try:
        for name in _SIZES.laws:
            law = bench.law(name)

            def error(n: int, law: Any = law) -> float:
                times = law.grid("uniform", n)
                slots = (0, 1)
                run = affine_run(law.score_fn, law.sde, solver, times, 1, slots, tolerance=_AFFINE)
                return law.error(run)

            curves.append(converge(error, f"moments · {name}", solver.weak_order, _SIZES, _FLOAT32))
    except NotAffineError:
        return sampled_limit(solver, bench, _SIZES)
    return [
        order_check("uneven", "weak order, its own times", solver.weak_order, curves),
        limit_check(solver.weak_order, curves),
    ]


def peer_short_runs(solver: Solver | Integrator, bench: Bench, sizes: Sizes) -> list[Check]:
    """One step and two steps, where its tables can hold the process."""
    return finite_runs(solver, bench, ("vp", "ve"))
