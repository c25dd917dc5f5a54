"""Guidance × scale × interval × solver × evaluations, laid out and computed as a comparison is.

A run is a comparison whose cells are judged by the classes asked for (`guidance_judging`), and
whose rows say besides from which scale on their solver breaks (`breaking`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from experiments import compare, planning
from experiments.compare import Outcome, Progress
from experiments.conditions import Condition, make_conditions
from experiments.draw import make_machine
from experiments.experiment_file import ExperimentFile, Texts
from experiments.folders import default_out
from experiments.guidance_lines import Interval, Line, lines_of, with_breaks
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
    repeats: int = 3
    grid: str | None = "log_snr"
    intervals: Sequence[Interval] = (None,)
    tolerance: float = TOLERANCE


FILE = ExperimentFile(
    "guidance", GuidanceOptions, planning.KEYS, planning.OF_COMPARE, {"intervals": INTERVALS}
)


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
    options = plan.options
    solvers = [planned.cell.solver for planned in plan.cells]
    lines = lines_of(
        outcome.folder.rows,
        outcome.store,
        tolerance=options.tolerance if isinstance(options, GuidanceOptions) else TOLERANCE,
        seed=options.seed,
        noisy={planning.spec_of(solver) for solver in solvers if solver.stochastic},
    )
    outcome.folder.rows = with_breaks(outcome.folder.rows, lines)
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
