"""What a certificate consists of: each check measures one thing that a solver promises.

Which apply follows from what the solver declares:

* deterministic, fixed steps: the order of its global error, as the slope of log error on the finest
  grids (uniform and not, and started where the solution bends), against closed forms and against
  scipy's DOP853 in t;
* stochastic, fixed steps: the weak order of mean and variance on a Gaussian, by exact propagation,
  and the strong order on shared Brownian paths;
* order 0: no order is claimed; the error of the moments must not grow with the number of steps;
* adaptive: the limit, at tightening tolerances;
* all: the limit itself, evaluations as reported, independence of the batch, short runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from torch import Tensor

from experiments.certify.bench import (
    REFERENCE_ERROR,
    ROUNDING,
    Bench,
    FlowProblem,
    counted,
    slots_of,
)
from experiments.certify.problems import NotAffineError, affine_run, fitted_order
from sde_diffusion import named_target
from solvers import Integrator, Solver, sample

TOLERANCE = 0.25  # by which a measured order may miss the declared one
_FINEST = 3  # grids that a slope is fitted to
_FIRST_STEPS = {1: 64, 2: 100, 3: 120}  # of those three, by declared order; above: as order 3
_LARGEST_ERROR = {1: 0.2, 2: 0.05}  # of the finest grid, in standard deviations; above: 0.02
_TIMES_TOLERANCE = 1000.0  # error at the end over tolerance per step: fehlberg2 has some hundreds
_MONTE_CARLO = 20_000
_SETTLES = 4  # the highest order whose slope settles above rounding on the wide Gaussian


@dataclass(frozen=True)
class Curve:
    """Errors against numbers of steps on one problem; ``slope`` is fitted to the finest."""

    problem: str
    steps: tuple[int, ...]
    errors: tuple[float, ...]
    declared: float
    slope: float | None

    @property
    def passed(self) -> bool:
        """Whether the declared order is met; no slope: the errors are rounding, the order
        infinite."""
        return self.slope is None or self.slope >= self.declared - TOLERANCE


@dataclass(frozen=True)
class Check:
    """One row of a certificate.

    Attributes:
        key: ``uniform``, ``uneven``, ``start``, ``strong``, ``limit``, ``nfe``, ``split``,
            ``short``.
        name: what was checked, in words.
        declared, measured: what is compared, as printed.
        passed: ``None``: could not be measured, for the reason in ``note``.
        curves: what an order was fitted to, the worst first.
    """

    key: str
    name: str
    declared: str
    measured: str
    passed: bool | None
    note: str = ""
    curves: tuple[Curve, ...] = ()


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        flows: ``(target, SDE)`` of deterministic orders.
        laws: SDEs of weak orders.
        paths: SDEs of strong orders.
        tolerances: of adaptive methods.
        most: steps up to which grids are refined when a slope misses.
        scale: factor on the first numbers of steps.
    """

    flows: tuple[tuple[str, str], ...] = tuple(
        (target, sde) for target in ("ring", "gaussian") for sde in ("vp", "ve", "subvp")
    )
    laws: tuple[str, ...] = ("vp", "ve", "subvp")
    paths: tuple[str, ...] = ("vp", "ve")
    tolerances: tuple[float, ...] = (1e-4, 1e-6, 1e-8)
    most: int = 3200
    scale: float = 1.0


FULL = Sizes()
QUICK = Sizes(
    flows=(("ring", "vp"), ("gaussian", "ve")),
    laws=("vp", "ve"),
    paths=("vp",),
    tolerances=(1e-4, 1e-6),
    most=1600,
    scale=0.75,
)

Measure = Callable[[Solver | Integrator, Bench, Sizes], list[Check]]


def checks_of(solver: Solver | Integrator) -> list[Measure]:
    """The measurements that apply to a solver, in the order of the table."""
    common: list[Measure] = [evaluations, splitting, short_runs]
    if isinstance(solver, Integrator) and solver.adaptive:
        return [adaptive_limit if not solver.stochastic else sampled_limit, *common]
    if solver.order == 0:
        return [no_order, *common]
    if solver.stochastic:
        return [weak_order, strong_order, *common]
    return [flow_order, *common]


def measure(solver: Solver | Integrator, bench: Bench, sizes: Sizes) -> Iterator[Check]:
    """All checks of a solver; an exception inside one is its failure, not the run's."""
    for measured in checks_of(solver):
        try:
            yield from measured(solver, bench, sizes)
        except Exception as error:
            key, name = _KEYS[measured]
            why = f"{type(error).__name__}: {error}"
            yield Check(key, name, "runs", "raised", False, " ".join(why.split())[:300])


# --- orders and limits ---------------------------------------------------------------------------


def converge(
    error_at: Callable[[int], float],
    problem: str,
    declared: float,
    sizes: Sizes,
    floor: float = ROUNDING,
    most: int | None = None,
) -> Curve:
    """Errors on three grids, each twice as fine, and their slope.

    Where the slope misses the declared order the grids are refined, up to ``sizes.most`` steps:
    the slope of the finest counts. Where errors come down to ten times the floor, coarser grids
    are taken.
    """
    most = sizes.most if most is None else most
    first = max(8, int(_FIRST_STEPS.get(int(declared), _FIRST_STEPS[3]) * sizes.scale))
    first = min(first, most // 4)
    errors: dict[int, float] = {}
    slope: float | None
    coarsened = False
    while True:
        steps = [first * 2**k for k in range(_FINEST)]
        for n in steps:
            if n not in errors:
                errors[n] = error_at(n)
        finest = [errors[n] for n in steps]
        if not all(map(math.isfinite, finest)):
            slope = -math.inf
            break
        if finest[-1] < 10 * floor:
            if first >= 12:
                first, coarsened = first // 2, True
                continue
            slope = None
            break
        slope = fitted_order(steps, finest, _FINEST)
        if slope >= declared - TOLERANCE or coarsened or 8 * first > most:
            break
        first *= 2
    n_all = tuple(sorted(errors))
    return Curve(problem, n_all, tuple(errors[n] for n in n_all), declared, slope)


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
        _order_check("uniform", "order, uniform grid", solver.order, curves["uniform"]),
        _order_check("uneven", "order, non-uniform grid", solver.order, curves["uneven"]),
        _order_check("start", "order, from the middle (start-up)", solver.order, curves["start"]),
        _limit_check(solver.order, [c for found in curves.values() for c in found]),
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
        _order_check("uniform", "weak order, uniform grid", declared, curves["uniform"]),
        _order_check("uneven", "weak order, non-uniform grid", declared, curves["uneven"]),
        _order_check("start", "weak order, from the middle (start-up)", declared, curves["start"]),
        _limit_check(declared, [c for found in curves.values() for c in found]),
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
        slope = fitted_order(steps, errors, _FINEST) if min(errors) > 10 * ROUNDING else None
        curves.append(Curve(f"path · {name} · uniform", steps, tuple(errors), 1.0, slope))
    return [_order_check("strong", "strong order, shared Brownian paths", 1.0, curves)]


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
    worst = 0.0
    for name in sizes.laws:
        law = bench.law(name)
        end = law.draw(solver, law.grid("uneven", 200), _MONTE_CARLO)
        mean, variance = law.standardised(end)
        stderr = math.sqrt(1 / _MONTE_CARLO), math.sqrt(2 / _MONTE_CARLO)
        excess = [
            abs(found) - 5 * error for found, error in zip((mean, variance), stderr, strict=True)
        ]
        worst = max(worst, *(e if math.isfinite(e) else math.inf for e in excess))
    note = f"{_MONTE_CARLO:,} samples, 200 steps, beyond five standard errors"
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


def _order_check(key: str, name: str, declared: float, curves: Sequence[Curve]) -> Check:
    ordered = sorted(curves, key=lambda c: math.inf if c.slope is None else c.slope)
    worst = ordered[0]
    measured = "exact" if worst.slope is None else f"{worst.slope:.2f}"
    if worst.slope == -math.inf:
        measured = "not finite"
    note = f"worst on {worst.problem}, {worst.steps[-3]}–{worst.steps[-1]} steps"
    passed = all(curve.passed for curve in curves)
    return Check(key, name, f"{declared:g}", measured, passed, note, tuple(ordered))


def _limit_check(declared: float, curves: Sequence[Curve]) -> Check:
    """The error on the finest grid: references share nothing with solvers, so it says where a
    solver goes."""
    worst = max(curves, key=lambda c: c.errors[-1] if math.isfinite(c.errors[-1]) else math.inf)
    allowed = _LARGEST_ERROR.get(int(declared), 0.02)
    error = worst.errors[-1]
    passed = math.isfinite(error) and error <= allowed
    note = f"worst on {worst.problem}, {worst.steps[-1]} steps; in standard deviations"
    return Check(
        "limit", "limit: error on the finest grid", f"≤ {allowed:g}", f"{error:.1e}", passed, note
    )


# --- what every solver owes ----------------------------------------------------------------------


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
    adaptive = isinstance(solver, Integrator) and solver.adaptive
    largest = 0.0
    for name in ("vp", "ve", "subvp"):
        sde = bench.sde(name)
        score_fn = named_target("gmm16").score_fn(sde)
        for n in (1,) if adaptive else (1, 2):
            settings: dict[str, Any] = {"shape": (2 if adaptive else 8, 16), "steps": n}
            run = sample(score_fn, sde, solver, **settings)
            largest = max(largest, float(run.x.abs().max()))
    passed = math.isfinite(largest)
    note = f"states up to {largest:.2g}"
    return [Check("short", "one step, two steps", "finite", "finite", passed, note)]


_KEYS: dict[Measure, tuple[str, str]] = {
    flow_order: ("uniform", "order"),
    weak_order: ("uniform", "weak order"),
    strong_order: ("strong", "strong order"),
    no_order: ("limit", "bias (no order)"),
    sampled_limit: ("limit", "moments of samples"),
    adaptive_limit: ("limit", "limit at tolerance"),
    evaluations: ("nfe", "evaluations per step"),
    splitting: ("split", "independence of the batch"),
    short_runs: ("short", "one step, two steps"),
}


@dataclass
class Certificate:
    """All checks of one solver.

    Attributes:
        name: as on the command line.
        kind: ``ODE`` or ``SDE``.
        order, weak_order: declared.
    """

    name: str
    kind: str
    order: float
    weak_order: float
    settings: dict[str, Any]
    checks: list[Check] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.passed is not False for check in self.checks)

    def get(self, key: str) -> Check | None:
        """The check with a key, the failed one if there are several."""
        found = [check for check in self.checks if check.key == key]
        return min(found, key=lambda c: c.passed is not False, default=None)
