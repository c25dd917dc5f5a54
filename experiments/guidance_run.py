"""Guidance × scale × interval × solver × evaluations, laid out and computed as a comparison is.

A run is a comparison whose cells are judged by the classes asked for (`guidance_judging`), and
whose rows say besides from which scale on their solver breaks (`breaking`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from experiments import compare, planning
from experiments.breaking import Breaking, breaking_scale
from experiments.compare import Outcome, PlannedCell, Progress
from experiments.conditions import Condition, make_conditions
from experiments.draw import make_machine
from experiments.experiment_file import ExperimentFile, Texts
from experiments.folders import default_out
from experiments.guidance_judging import GuidanceJudge
from experiments.options import intervals
from experiments.planning import CompareOptions, Plan
from experiments.spec import parse_solver
from experiments.subjects import SubjectOptions, make_subjects
from experiments.timing import Timing
from sde_diffusion.errors import require_finite

__all__ = ["GuidanceOptions", "Line", "make_plan", "run"]

SOLVERS = ("probability_flow", "dpm_solver_pp", "ancestral")
BUDGETS = (8, 16)
GUIDANCES = ("classifier", "cfg")
SCALES = (1.0, 2.0, 4.0, 8.0)
TOLERANCE = 0.25
SAMPLES = 100
# As on the command line: TOML has no null.
INTERVALS = Texts(
    lambda texts: intervals("--intervals", texts),
    lambda ends: "full" if ends is None else f"{ends[0]!r}:{ends[1]!r}",
)
PICTURES = ("guidance.png", "guidance_intervals.png", "guidance_samples.png")
Interval = tuple[float, float] | None


@dataclass(frozen=True)
class GuidanceOptions(CompareOptions):
    """What the command line says; empty or None: the default.

    Attributes:
        intervals: (low, high) in sigma/alpha outside which gamma is 1; None among them: everywhere.
        tolerance: a solver breaks where its error exceeds so many of the data's deviations.
    """

    targets: Sequence[str] = ()
    sdes: Sequence[str] = ("vp",)
    solvers: Sequence[str] = SOLVERS
    budgets: Sequence[int] = BUDGETS
    guidances: Sequence[str] = GUIDANCES
    scales: Sequence[float] = SCALES
    grid: str | None = "log_snr"
    intervals: Sequence[Interval] = (None,)
    tolerance: float = TOLERANCE


FILE = ExperimentFile(
    "guidance", GuidanceOptions, planning.KEYS, planning.OF_COMPARE, {"intervals": INTERVALS}
)


@dataclass(frozen=True)
class Line:
    """A solver at a number of evaluations, guided in one way, at every scale."""

    target: str
    sde: str
    guidance: str
    interval: Interval
    solver: str
    budget: int | None
    scales: tuple[float, ...]
    breaking: Breaking | None


def make_plan(options: GuidanceOptions) -> Plan:
    """Check everything and lay out the cells.

    Raises:
        ValueError, TypeError: whatever is wrong with the options, before any work.
    """
    require_finite("--tolerance", options.tolerance, above=0.0)
    planning.check_numbers(options)
    if "none" in options.guidances or not options.guidances:
        raise ValueError(
            "--guidance must be classifier or cfg here; without guidance: sde-diffusion compare"
        )
    if options.label == "none":
        raise ValueError("--label none leaves nothing to guide towards: give a class, or all")
    if not options.solvers or not options.budgets or not options.scales:
        raise ValueError("--solver, --nfe and --scale need at least one value each")
    given = make_conditions(options.guidances, sorted(options.scales), options.label)
    conditions = list(_at_intervals(given, options.intervals))
    solvers = planning.different([parse_solver(text) for text in options.solvers])
    targets = tuple(options.targets or (() if options.models else ("digits",)))
    sources = SubjectOptions(targets, tuple(options.models), _sdes(options), options.data)
    subjects = make_subjects(sources)
    workers = make_machine(options.device, options.batch_size).workers
    cells = [
        planned
        for subject in subjects
        for planned in planning.cells_of(subject, conditions, solvers, options)
    ]
    samples = {
        subject.name: options.samples or planning.samples_of(subject) for subject in subjects
    }
    for subject in subjects:
        classes = (subject.num_classes or 1) if given[0].label == "all" else 1
        if samples[subject.name] < 4 * classes:
            raise ValueError(
                f"--samples {samples[subject.name]} is too few to see the variety within the "
                f"{classes} classes of {subject.name!r}; give at least {4 * classes}"
            )
    config = {k: v for k, v in asdict(options).items() if k not in planning.HOW}
    out = options.out or default_out("guidance", [s.name for s in subjects], config)
    plan = Plan(options, sources, subjects, cells, planning.Pool(), out, samples, "guidance", FILE)
    for planned in cells:
        plan.judge(planned)  # says what is wrong with its data
    plan.pool = planning.Pool(planning.jobs_of(plan), workers, options.scheduler)
    return plan


def run(plan: Plan, progress: Progress, timing: Timing | None = None) -> tuple[Outcome, list[Line]]:
    """Compute the cells that the folder does not hold, and say where solvers break.

    Args:
        timing: begun by a caller who counts what comes before and after.

    Raises:
        Interrupted: Ctrl-C.
    """
    outcome = compare.run(plan, progress, timing, more_pictures=PICTURES)
    lines = []
    for members in _lines(plan):
        line = _line(outcome, members)
        lines.append(line)
        values = None if line.breaking is None else _plain(line.breaking)
        for planned in members:
            index = outcome.finished.index(planned)
            outcome.folder.rows[index]["breaks_at"] = values
    outcome.folder.write()
    return outcome, lines


def _sdes(options: GuidanceOptions) -> tuple[str, ...]:
    """A model's own SDE, where none is asked for."""
    own = bool(options.models) and not options.targets and options.sdes == GuidanceOptions.sdes
    return () if own else tuple(options.sdes)


def _at_intervals(given: Sequence[Condition], intervals: Sequence[Interval]) -> list[Condition]:
    """Every condition in every interval; at γ = 1 an interval changes nothing."""
    found = [
        replace(condition, interval=None if condition.scale == 1 else interval)
        for condition in given
        for interval in intervals or (None,)
    ]
    return list(dict.fromkeys(found))


def _lines(plan: Plan) -> list[list[PlannedCell]]:
    """Cells that differ in their scale only, by increasing scale; γ = 1 is in every interval."""
    found: dict[Any, list[PlannedCell]] = {}
    intervals = list(dict.fromkeys(p.cell.condition.interval for p in plan.cells))
    if len(intervals) > 1 and all(
        p.cell.condition.scale == 1 for p in plan.cells if p.cell.condition.interval is None
    ):
        intervals.remove(None)
    for planned in plan.cells:
        cell = planned.cell
        condition = cell.condition
        for interval in intervals if condition.scale == 1 else [condition.interval]:
            place = planned.subject.name, cell.sde, condition.guidance, interval
            found.setdefault((*place, cell.solver, planned.budget), []).append(planned)
    return list(found.values())


def _line(outcome: Outcome, members: Sequence[PlannedCell]) -> Line:
    last = members[-1]
    cell, options = last.cell, outcome.plan.options
    tolerance = options.tolerance if isinstance(options, GuidanceOptions) else TOLERANCE
    strengthened = [p for p in members if (p.cell.condition.scale or 0.0) >= 1]
    breaking = None
    if strengthened and not cell.solver.stochastic:
        scales = [float(p.cell.condition.scale or 0.0) for p in strengthened]
        distances = [_distances(outcome, p) for p in strengthened]
        breaking = breaking_scale(scales, distances, tolerance, seed=options.seed)
    return Line(
        last.subject.name,
        cell.sde,
        cell.condition.guidance,
        cell.condition.interval,
        planning.spec_of(cell.solver),
        last.budget,
        tuple(float(p.cell.condition.scale or 0.0) for p in members),
        breaking,
    )


def _distances(outcome: Outcome, planned: PlannedCell) -> np.ndarray | None:
    judge = outcome.plan.judge(planned)
    deviation = judge.deviation if isinstance(judge, GuidanceJudge) else 1.0
    parts = []
    for task in outcome.plan.tasks(planned):
        record = outcome.store.get(task.key)
        tensors = outcome.store.tensors(task.key) if record is not None else None
        if tensors is None or "distance" not in tensors:
            return None
        parts.append(tensors["distance"].double().numpy() / deviation)
    return np.concatenate(parts)


def _plain(breaking: Breaking) -> Mapping[str, Any]:
    """JSON has no infinity: null, and the side on which the scale lies."""
    values = {k: v if math.isfinite(v) else None for k, v in breaking._asdict().items()}
    side = {-math.inf: "below", math.inf: "above"}
    return {
        **values,
        **{f"{k}_side": side.get(v, "within") for k, v in breaking._asdict().items()},
    }
