"""Where a sampler's error comes from, part by part, in one unit.

The unit is the energy distance, rooted: ``D(p, q) = sqrt(2 E|X-Y| - E|X-X'| - E|Y-Y'|)`` (Székely
and Rizzo 2013, "Energy statistics"). It is a metric on laws, so that the parts of a chain of laws

    data -> data at t_min -> exact solution from the prior -> the same with the network -> sampler

add up to at least the distance from one end to the other: D(data, sampler) <= sum of the parts.
Each part is measured between two sets of samples that share their noise (or their data points):
sample i of one and sample i of the other differ by the part alone. With pairs i != j only, the
estimate of D² has no bias, and being near each other makes its spread small: `paired_energy`.

docs/error-budget.md says what each part is and how it is measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from experiments.budget_problem import GRID, ORDER, Problem, make_problem
from experiments.compare import Progress
from experiments.draw import one_thread_each
from experiments.estimates import estimate
from experiments.folders import default_out, prepare_out
from experiments.intervals import Interval, t_interval
from experiments.metrics import energy_distance
from experiments.network_error import NetworkError, network_error
from experiments.planning import steps_within
from experiments.results import Row, RunFolder
from experiments.spec import parse_solver, spec_of
from sde_diffusion.errors import require_count
from solvers import Integrator, Solver
from solvers.catalogue import name_of, settings_of

__all__ = ["BudgetOptions", "BudgetPlan", "BudgetRow", "Part", "make_plan", "paired_energy", "run"]

SOLVERS = ("ancestral", "ddim", "probability_flow")
BUDGETS = (10, 20, 50)
PICTURES = ("error_budget.png", "network_error.png")
_TILE = 512


@dataclass(frozen=True)
class BudgetOptions:
    """What the command line says.

    Attributes:
        target: an exact target; with ``model``: what the model was trained on samples of.
        model: a model folder, or None.
        samples: in a repeat.
        buckets: ranges of times that a network's error is measured in.
    """

    target: str | None = "ring"
    model: str | None = None
    sdes: Sequence[str] = ()
    solvers: Sequence[str] = SOLVERS
    budgets: Sequence[int] = BUDGETS
    samples: int = 1000
    repeats: int = 3
    seed: int = 0
    grid: str | None = None
    denoise: bool = False
    device: str = "cpu"
    buckets: int = 8
    out: str | None = None


@dataclass(frozen=True)
class Part:
    """One part of an error budget.

    Attributes:
        squared: D² of each repeat, unbiased unless it is the floor; may be negative.
        value: D, the root of their mean; 0 where that is negative.
        interval: 95 % interval of D; None for a single repeat.
    """

    squared: tuple[float, ...]

    @property
    def value(self) -> float:
        return math.sqrt(max(0.0, sum(self.squared) / len(self.squared)))

    @property
    def interval(self) -> Interval | None:
        found = t_interval(self.squared)
        if found is None:
            return None
        return Interval(*(math.sqrt(max(0.0, end)) for end in found))

    @property
    def resolved(self) -> bool:
        """Whether it is above zero beyond Monte Carlo."""
        return self.interval is not None and self.interval.low > 0


@dataclass(frozen=True)
class BudgetRow:
    """The budget of one sampler at one number of evaluations.

    Attributes:
        parts: name -> part, of ``truncation``, ``prior_mismatch``, ``score_error``,
            ``discretisation`` in the order of the chain, or ``rest`` and ``discretisation`` where
            the target is not known.
        total: the sampler against independent true samples, floor taken off; None without data.
        floor: Monte Carlo: what true samples score against true samples, floor not taken off.
    """

    sde: str
    solver: str
    kind: Solver | Integrator
    budget: int
    steps: int
    nfe: float
    network_passes: float
    seconds: float
    parts: dict[str, Part]
    total: Part | None
    floor: Part | None


@dataclass
class BudgetPlan:
    """Arguments known to be good."""

    options: BudgetOptions
    problems: list[Problem]
    cells: list[tuple[Solver | Integrator, int, int]]
    out: str


@dataclass
class BudgetOutcome:
    """What was measured."""

    folder: RunFolder
    rows: list[BudgetRow] = field(default_factory=list)
    networks: list[NetworkError] = field(default_factory=list)
    references: dict[str, dict[str, float]] = field(default_factory=dict)


def paired_energy(x: Tensor, y: Tensor) -> float:
    """Unbiased ``D²`` of two laws from pairs ``(x_i, y_i)``, independent from pair to pair.

    ``mean over i != j of |x_i - y_j| + |y_i - x_j| - |x_i - x_j| - |y_i - y_j|``: each term has the
    mean D² whatever ties x_i to y_i, and is small where they are near each other.

    Args:
        x, y: (N, *event), N >= 2.
    """
    if x.shape != y.shape or len(x) < 2:
        raise ValueError(
            f"x and y must be at least two pairs of one shape, got {tuple(x.shape)} and "
            f"{tuple(y.shape)}"
        )
    a, b = (s.detach().cpu().double().flatten(1) for s in (x, y))
    if not bool(a.isfinite().all() and b.isfinite().all()):
        raise ValueError("x and y must be finite: they hold NaN or infinity")
    total = 0.0
    for rows in torch.arange(len(a)).split(_TILE):
        for columns in torch.arange(len(a)).split(_TILE):
            # Differences of distances first: they are many digits smaller than the distances.
            apart = _distances(a[rows], b[columns]) + _distances(b[rows], a[columns])
            apart -= _distances(a[rows], a[columns]) + _distances(b[rows], b[columns])
            apart.masked_fill_(rows[:, None] == columns, 0.0)
            total += float(apart.sum())
    return total / (len(a) * (len(a) - 1))


def make_plan(options: BudgetOptions) -> BudgetPlan:
    """Check everything.

    Raises:
        ValueError, TypeError: whatever is wrong with the options, before any work.
    """
    require_count("--samples", options.samples, least=2)
    require_count("--repeats", options.repeats)
    require_count("--seed", options.seed, least=0)
    require_count("--buckets", options.buckets)
    for budget in options.budgets:
        require_count("--nfe", budget)
    cells: list[tuple[Solver | Integrator, int, int]] = []
    for text in dict.fromkeys(options.solvers):
        solver = parse_solver(text)
        for budget in sorted(set(options.budgets)):
            steps = steps_within(solver, budget, options.denoise)
            if steps is None:
                raise ValueError(
                    f"--solver {text} chooses its own steps, and a budget is of a number of "
                    "evaluations; use a fixed method"
                )
            cells.append((solver, budget, steps))
    problems = make_problem(
        options.target,
        options.model,
        options.sdes,
        samples=options.samples,
        repeats=options.repeats,
        seed=options.seed,
        grid=options.grid,
        denoise=options.denoise,
        device=options.device,
    )
    config = {**asdict(options), "out": None, "device": None}
    out = options.out or default_out("error-budget", [problems[0].name], config)
    return BudgetPlan(options, problems, cells, out)


def run(plan: BudgetPlan, progress: Progress) -> BudgetOutcome:
    """Measure every part of every row; results.json is written as rows are finished."""
    options = plan.options
    path = prepare_out(plan.out, pictures=PICTURES)
    folder = RunFolder(path, "error-budget", asdict(options), device=options.device)
    outcome = BudgetOutcome(folder)
    progress.start(len(plan.problems) * (len(plan.cells) + 1))
    with folder, one_thread_each():
        for problem in plan.problems:
            if problem.network is not None:
                progress.now(f"{problem.name} · {problem.sde_name} · the network's error by time")
                outcome.networks.append(network_error(problem, plan.cells, options.buckets))
            progress.done(1)
            for solver, budget, steps in plan.cells:
                progress.now(f"{problem.name} · {problem.sde_name} · {spec_of(solver)} · {budget}")
                found = _budget_row(problem, solver, budget, steps)
                outcome.rows.append(found)
                folder.add(_as_row(plan, problem, found))
                progress.done(1)
            outcome.references[problem.sde_name] = {
                kind: _reference_error(problem, kind)
                for kind in ("ode", "sde")
                if any(solver.stochastic == (kind == "sde") for solver, _, _ in plan.cells)
            }
    return outcome


def _budget_row(
    problem: Problem, solver: Solver | Integrator, budget: int, steps: int
) -> BudgetRow:
    squared: dict[str, list[float]] = {}
    nfe = passes = seconds = 0.0

    def note(name: str, value: float) -> None:
        squared.setdefault(name, []).append(value)

    for repeat in range(problem.repeats):
        solution = problem.solve(solver, steps, repeat)
        nfe, passes = solution.nfe, solution.network_passes
        seconds += solution.stats["seconds"]
        fine = problem.fine(solver, repeat)
        note("discretisation", paired_energy(solution.x, fine))
        if problem.target is not None:
            data, cut = problem.truncated(repeat)
            note("truncation", paired_energy(data, cut))
            exact = problem.fine(solver, repeat, exact=True)
            from_law = problem.fine(solver, repeat, exact=True, from_law=True)
            note("prior_mismatch", paired_energy(exact, from_law))
            if problem.network is not None:
                note("score_error", paired_energy(fine, exact))
        true = problem.true_samples(repeat)
        if true is None:
            continue
        if problem.target is None:
            note("rest", energy_distance(fine, true[0], unbiased=True))
        note("total", energy_distance(solution.x, true[0], unbiased=True))
        note("floor", energy_distance(true[0], true[1]))
    found = {name: Part(tuple(values)) for name, values in squared.items()}
    return BudgetRow(
        sde=problem.sde_name,
        solver=spec_of(solver),
        kind=solver,
        budget=budget,
        steps=steps,
        nfe=nfe,
        network_passes=passes,
        seconds=seconds,
        parts={name: found[name] for name in ORDER if name in found},
        total=found.get("total"),
        floor=found.get("floor"),
    )


def _reference_error(problem: Problem, kind: str) -> float:
    """D between the fine solution and one with half its steps: how far the reference can be off."""
    solver = problem.reference(kind)
    coarse = problem.solve(solver, problem.fine_steps(solver) // 2, 0, grid=GRID).x
    return Part((paired_energy(coarse, problem.fine(solver, 0)),)).value


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # The product form of cdist loses half the digits of small distances.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _as_row(plan: BudgetPlan, problem: Problem, found: BudgetRow) -> Row:
    """A row of results.json: parts squared as metrics, and rooted under ``parts``."""
    ends = {"total": found.total, "floor": found.floor}
    every = found.parts | {name: part for name, part in ends.items() if part is not None}
    extra: dict[str, Any] = {
        "spec": found.solver,
        "budget": found.budget,
        "seed": plan.options.seed,
        "samples": problem.samples * problem.repeats,
        "repeats": problem.repeats,
        "status": "ok",
        "by_repeat": {name: part.squared for name, part in every.items()},
        "intervals": {name: t_interval(part.squared) for name, part in every.items()},
        "parts": {
            name: {"value": part.value, "interval": part.interval, "resolved": part.resolved}
            for name, part in every.items()
        },
    }
    return Row(
        solver=name_of(type(found.kind)),
        settings=settings_of(found.kind),
        sde=found.sde,
        target=problem.name,
        steps=found.steps,
        nfe=found.nfe,
        network_passes=found.network_passes,
        seconds=found.seconds,
        metrics={name: estimate(part.squared) for name, part in every.items()},
        extra=extra,
    )
