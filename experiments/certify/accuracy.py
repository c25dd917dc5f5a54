"""Checks of where a solver goes and how fast: orders, limits, and moments without an order."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

from experiments.certify.bench import REFERENCE_ERROR, ROUNDING, Bench, FlowProblem, slots_of
from experiments.certify.certificate import QUICK, Check, Curve, Sizes
from experiments.certify.convergence import FINEST, converge, limit_check, order_check
from experiments.certify.problems import NotAffineError, affine_run, fitted_order
from solvers import Integrator, Solver, sample

_TIMES_TOLERANCE = 1000.0  # error at the end over tolerance per step: fehlberg2 has some hundreds
_MONTE_CARLO = 20_000
_MONTE_CARLO_ADAPTIVE = 2_000  # whose every sample takes some hundred attempts of its own
_SETTLES = 4  # the highest order whose slope settles above rounding on the wide Gaussian


def flow_order(solver: Solver | Integrator, bench: Bench, sizes: Sizes) -> list[Check]:
    """Order and limit on the probability-flow ODE.

    An adapter's loop costs several times a native one's, and its table is another library's: it is
    measured on the two problems of ``QUICK``.
    """
    if isinstance(solver, Integrator):
        sizes = replace(sizes, flows=QUICK.flows, scale=QUICK.scale)
    curves: dict[str, list[Curve]] = {"uniform": [], "uneven": [], "start": []}
    for target, name in sizes.flows:
        if target == "gaussian" and solver.order > _SETTLES:
            target = "narrow"
        for key, grid in (("uniform", "uniform"), ("uneven", "uneven"), ("start", "uniform")):
            if key == "start" and name == "subvp":
                continue  # order 4 nears the reference's own error there before its slope settles
            problem = bench.flow(target, name, from_middle=key == "start")

            def error(n: int, problem: FlowProblem = problem, grid: str = grid) -> float:
                end = sample(
                    problem.score_fn, problem.sde, solver, x=problem.x, grid=problem.grid(grid, n)
                ).x
                return problem.error(end)

            floor = REFERENCE_ERROR if target == "ring" else ROUNDING
            title = f"{target} · {name} · {grid}" + (" · from the middle" if key == "start" else "")
            curves[key].append(converge(error, title, solver.order, sizes, floor))
    return [
        order_check("uniform", "order, uniform grid", solver.order, curves["uniform"]),
        order_check("uneven", "order, non-uniform grid", solver.order, curves["uneven"]),
        order_check("start", "order, from the middle (start-up)", solver.order, curves["start"]),
        limit_check(solver.order, [c for found in curves.values() for c in found]),
    ]


def weak_order(solver: Solver | Integrator, bench: Bench, sizes: Sizes) -> list[Check]:
    """Weak order of mean and variance on a Gaussian, exactly: start at the marginal, and end
    there."""
    declared = solver.weak_order
    slots = slots_of(solver)
    curves: dict[str, list[Curve]] = {"uniform": [], "uneven": [], "start": []}
    try:
        for name in sizes.laws:
            for key, grid in (("uniform", "uniform"), ("uneven", "uneven"), ("start", "uniform")):
                law = bench.law(name, from_middle=key == "start")

                def error(n: int, law: Any = law, grid: str = grid) -> float:
                    times = law.grid(grid, n)
                    run = affine_run(law.score_fn, law.sde, solver, times, 1, slots)
                    return law.error(run)

                title = f"moments · {name} · {grid}"
                title += " · from the middle" if key == "start" else ""
                curves[key].append(converge(error, title, declared, sizes))
    except NotAffineError:
        note = "the update is not affine: moments cannot be propagated exactly"
        words = "weak order, uniform grid"
        return [
            Check("uniform", words, f"{declared:g}", "–", None, note),
            *sampled_limit(solver, bench, sizes),
        ]
    return [
        order_check("uniform", "weak order, uniform grid", declared, curves["uniform"]),
        order_check("uneven", "weak order, non-uniform grid", declared, curves["uneven"]),
        order_check("start", "weak order, from the middle (start-up)", declared, curves["start"]),
        limit_check(declared, [c for found in curves.values() for c in found]),
    ]


def strong_order(solver: Solver | Integrator, bench: Bench, sizes: Sizes) -> list[Check]:
    """Strong order on shared Brownian paths, by what a run on twice the steps changes.

    The noise of a linear SDE is additive, so Euler's strong order is 1; beyond that a step would
    have to know more of the path than its increment (Clark & Cameron 1980). Hence 1 is asked.
    """
    curves = []
    for name in sizes.paths:
        paths = bench.paths(name)
        ends = {
            n: sample(
                paths.score_fn, paths.sde, solver, x=paths.x, grid=paths.grid(n), noise=paths.noise
            ).x
            for n in paths.steps
        }
        steps = paths.steps[:-1]
        errors = [float((ends[n] - ends[2 * n]).square().mean().sqrt()) for n in steps]
        slope = fitted_order(steps, errors, FINEST) if min(errors) > 10 * ROUNDING else None
        curves.append(Curve(f"path · {name} · uniform", steps, tuple(errors), 1.0, slope))
    return [order_check("strong", "strong order, shared Brownian paths", 1.0, curves)]


def no_order(solver: Solver | Integrator, bench: Bench, sizes: Sizes) -> list[Check]:
    """Order 0: the moments' error, in standard deviations, is finite and does not grow."""
    slots = slots_of(solver)
    counts = (50, 100, 200)
    worst, passed, curves = 0.0, True, []
    try:
        for name in sizes.laws:
            law = bench.law(name)
            errors = [
                law.error(
                    affine_run(law.score_fn, law.sde, solver, law.grid("uneven", n), 1, slots)
                )
                for n in counts
            ]
            curves.append(Curve(f"moments · {name} · uneven", counts, tuple(errors), 0.0, None))
            grows = max(b / max(a, 1e-6) for a, b in pairwise(errors))
            passed &= all(map(math.isfinite, errors)) and grows <= 1.1
            worst = max(worst, grows)
    except NotAffineError:
        return _no_order_sampled(solver, bench, sizes)
    note = f"error at {counts[-1]} steps up to {max(c.errors[-1] for c in curves):.2g}"
    measured = f"×{worst:.2f}"
    name = "bias at twice the steps (no order)"
    return [Check("limit", name, "≤ ×1.1", measured, passed, note, tuple(curves))]


def _no_order_sampled(solver: Solver | Integrator, bench: Bench, sizes: Sizes) -> list[Check]:
    largest = 0.0
    for name in sizes.laws:
        law = bench.law(name)
        for n in (50, 100, 200):
            end = law.draw(solver, law.grid("uneven", n), 1000)
            largest = max(largest, float(end.abs().max()))
    passed = math.isfinite(largest) and largest < 100
    return [Check("limit", "stays finite (no order)", "< 100", f"{largest:.2g}", passed)]


def sampled_limit(solver: Solver | Integrator, bench: Bench, sizes: Sizes) -> list[Check]:
    """Mean and variance of samples, where they cannot be computed: the right law within five
    standard errors and a bias of 0.05."""
    adaptive = isinstance(solver, Integrator) and solver.adaptive
    count = _MONTE_CARLO_ADAPTIVE if adaptive else _MONTE_CARLO
    worst = 0.0
    for name in sizes.laws:
        law = bench.law(name)
        end = law.draw(solver, law.grid("uneven", 200), count)
        mean, variance = law.standardised(end)
        stderr = math.sqrt(1 / count), math.sqrt(2 / count)
        excess = [
            abs(found) - 5 * error for found, error in zip((mean, variance), stderr, strict=True)
        ]
        worst = max(worst, *(e if math.isfinite(e) else math.inf for e in excess))
    steps = "its own" if adaptive else "200"
    note = f"{count:,} samples, {steps} steps, beyond five standard errors"
    measured = f"{max(worst, 0.0):.2g}"
    return [Check("limit", "moments of samples", "≤ 0.05", measured, worst <= 0.05, note)]


def adaptive_limit(solver: Solver | Integrator, bench: Bench, sizes: Sizes) -> list[Check]:
    """RMS distance to the exact solution at tightening tolerances."""
    fields = getattr(solver, "__dataclass_fields__", {})
    tunable = {"rtol", "atol"} <= set(fields)
    # Low orders would take thousands of steps at the last.
    least = sizes.tolerances if solver.order > 3 else sizes.tolerances[:2]
    tolerances = least if tunable else (float(getattr(solver, "rtol", 1e-3)),)
    worst, finest = 0.0, 0.0
    previous = math.inf
    falls = True
    for tolerance in tolerances:
        run: Any = (
            replace(solver, rtol=tolerance, atol=tolerance)  # type: ignore[type-var]
            if tunable
            else solver
        )
        errors = []
        for target, name in sizes.flows[::2]:
            problem = bench.flow(target, name)
            x, exact = problem.x[:2], problem.exact[:2]
            end = sample(problem.score_fn, problem.sde, run, x=x).x
            errors.append(float((end - exact).square().mean().sqrt()))
        finest = max(errors)
        falls &= finest < previous
        previous = finest
        worst = max(worst, finest / tolerance)
    passed = math.isfinite(worst) and worst <= _TIMES_TOLERANCE and falls
    words = f"error over tolerance up to {worst:.2g}"
    declared = f"≤ {_TIMES_TOLERANCE * tolerances[-1]:.0e}"
    name = f"limit at tolerance {tolerances[-1]:.0e}"
    note = words if falls else f"{words}; it does not fall with the tolerance"
    return [Check("limit", name, declared, f"{finest:.1e}", passed, note)]
