"""A comparison laid out: its options checked, its cells and their keys, before any work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from experiments.budget import BudgetError, measured_nfe, steps_for_budget
from experiments.cells import Judging, Kind, Task, cell_key
from experiments.conditions import Condition, make_conditions
from experiments.draw import make_machine
from experiments.experiment_file import ExperimentFile
from experiments.folders import default_out
from experiments.judging import Cell, Judge
from experiments.pool import Pool
from experiments.resolving import MAX_REPEATS, Column
from experiments.spec import parse_solver, spec_of
from experiments.subjects import ExactSubject, ModelSubject, Subject, SubjectOptions, make_subjects
from experiments.work import judge_of, time_limit
from experiments.worker_start import usable_cores
from sde_diffusion.errors import require_count, require_finite
from solvers import Integrator, ProbabilityFlow, Solver, grids
from solvers.catalogue import is_users

SOLVERS = ("ancestral", "euler_maruyama", "predictor_corrector", "probability_flow")
BUDGETS = (10, 20, 50, 100)
EXACT_SAMPLES, LARGE_SAMPLES, MODEL_SAMPLES = 2000, 400, 100
_LARGE = 20_000  # numbers in a mixture's means from which its score takes as long as a network
# Work of one evaluation of one sample, for progress: of a network; of a mixture 1, and so much more
# for each number in its means (digits, 115,000 numbers: 22 microseconds against half a one).
_OF_NETWORK, _OF_NUMBER = 60.0, 4e-4
_WORTH_PROCESSES = 8e6  # such units, some seconds of work, make up for starting processes
# Options that say how a run is computed, and change no figure.
HOW = (
    *("out", "batch_size", "device", "jobs", "scheduler", "cell_timeout", "force"),
    *("throughput", "until_resolved", "budget_seconds", "max_repeats"),
)


@dataclass(frozen=True)
class CompareOptions:
    """What the command line says; empty or None: the default."""

    targets: Sequence[str] = ()
    models: Sequence[str] = ()
    sdes: Sequence[str] = ()
    solvers: Sequence[str] = SOLVERS
    budgets: Sequence[int] = BUDGETS
    guidances: Sequence[str] = ("none",)
    scales: Sequence[float] = ()
    label: str | None = None
    data: str | None = None
    features: str | None = None
    metrics: Sequence[str] = ()
    samples: int | None = None
    repeats: int = 4
    seed: int = 0
    batch_size: int | None = None
    device: str = "cpu"
    grid: str | None = None
    denoise: bool = False
    out: str | None = None
    jobs: int | None = None
    scheduler: str | None = None
    cell_timeout: float | None = None
    force: bool = False
    until_resolved: bool = False
    budget_seconds: float | None = None
    max_repeats: int | None = None
    throughput: bool = False


KEYS = {"budgets": "nfe", "guidances": "guidance"}  # of files, where not the fields' names
FILE = ExperimentFile("compare", CompareOptions, KEYS)
# Options that compare alone has.
OF_COMPARE = (
    *("features", "metrics", "throughput"),
    *("until_resolved", "budget_seconds", "max_repeats"),
)


@dataclass(frozen=True)
class PlannedCell:
    """A cell and its steps; ``budget`` and ``steps`` are None where the solver has its own."""

    subject: Subject
    cell: Cell
    budget: int | None
    steps: int | None

    @property
    def column(self) -> Column:
        """The column of a table that its row stands in."""
        return self.subject.name, self.cell.sde, self.cell.condition.guided_by, self.budget

    def __str__(self) -> str:
        condition = f" · {self.cell.condition}" if str(self.cell.condition) else ""
        count = "own steps" if self.budget is None else f"{self.budget} evaluations"
        return (
            f"{self.subject.name} · {self.cell.sde}{condition} · {spec_of(self.cell.solver)} · "
            f"{count}"
        )


@dataclass
class Plan:
    """A comparison, all of whose arguments are known to be good."""

    options: CompareOptions
    sources: SubjectOptions
    subjects: list[Subject]
    cells: list[PlannedCell]
    pool: Pool
    out: str
    samples: dict[str, int]
    judging: Judging = "distance"
    file: ExperimentFile[Any] = FILE
    repeats: dict[Column, int] = field(default_factory=dict)  # where not ``options.repeats``

    @property
    def experiment(self) -> str:
        """The command that it is a run of."""
        return self.file.table

    def repeats_of(self, planned: PlannedCell) -> int:
        """How many repeats a cell has."""
        return self.repeats.get(planned.column, self.options.repeats)

    @property
    def max_repeats(self) -> int | None:
        """The most that --until-resolved comes to; None where only the time is limited."""
        if self.options.max_repeats is None and self.options.budget_seconds is None:
            return MAX_REPEATS
        return self.options.max_repeats

    def tasks(self, planned: PlannedCell) -> list[Task]:
        """The repeats of a cell."""
        return [self._task("cell", planned, r) for r in range(self.repeats_of(planned))]

    def fine_task(self, planned: PlannedCell, repeat: int) -> Task | None:
        """What a solver without noise is compared with sample by sample; None for others."""
        if planned.cell.solver.stochastic:
            return None
        fine = Cell(planned.cell.sde, planned.cell.condition, self.judge(planned).fine_solver)
        return self._task("fine", PlannedCell(planned.subject, fine, None, None), repeat)

    def floor_task(self, planned: PlannedCell, repeat: int) -> Task:
        """What true samples of a cell's law score."""
        planned = PlannedCell(planned.subject, planned.cell, None, None)
        return self._task("floor", planned, repeat, law=str(self.judge(planned).law(planned.cell)))

    def judge(self, planned: PlannedCell) -> Judge:
        """The judge of a cell, in this process."""
        return judge_of(self._task("cell", planned, 0), self.pool.workers)

    def _task(self, kind: Kind, planned: PlannedCell, repeat: int, **more: Any) -> Task:
        subject, cell, options = planned.subject, planned.cell, self.options
        numbers: dict[str, Any] = {
            "budget": planned.budget,
            "steps": planned.steps,
            "grid": options.grid,
            "denoise": options.denoise,
            "seed": options.seed,
            "repeat": repeat,
            "samples": self.samples[subject.name],
        }
        device = torch.device(options.device).type
        if getattr(cell.solver, "depends_on_batch", False):
            more["batch_size"] = options.batch_size
        if self.judging != "distance":
            more["judging"] = self.judging
        # The floor of a law is the same whatever sampled it.
        solver = ProbabilityFlow("rk4") if kind == "floor" else cell.solver
        key = cell_key(
            kind, subject, cell.sde, cell.condition, solver, device=device, **numbers, **more
        )
        return Task(
            kind=kind,
            key=key,
            subjects=self.sources,
            subject=subject.name,
            sde=cell.sde,
            condition=cell.condition,
            solver=cell.solver,
            device=options.device,
            batch_size=options.batch_size,
            seconds=options.cell_timeout,
            judging=self.judging,
            **numbers,
        )


def make_plan(options: CompareOptions) -> Plan:
    """Check everything and lay out the cells.

    Raises:
        ValueError, TypeError: whatever is wrong with the options, before any work.
    """
    targets = options.targets or (() if options.models else ("ring", "digits"))
    solvers = different([parse_solver(text) for text in options.solvers])
    if not solvers or not options.budgets:
        raise ValueError("--solver and --nfe need at least one value each")
    check_numbers(options)
    make_conditions(options.guidances, options.scales, options.label)
    workers = make_machine(options.device, options.batch_size).workers
    sources = SubjectOptions(
        tuple(targets),
        tuple(options.models),
        tuple(options.sdes),
        options.data,
        options.features,
        tuple(options.metrics),
    )
    subjects = make_subjects(sources)
    for subject in subjects:
        if isinstance(subject, ModelSubject):
            subject.check_judge()
    cells = [
        planned
        for subject in subjects
        for planned in cells_of(subject, _conditions(subject, options), solvers, options)
    ]
    samples = {subject.name: options.samples or samples_of(subject) for subject in subjects}
    config = {name: value for name, value in asdict(options).items() if name not in HOW}
    out = options.out or default_out("compare", [s.name for s in subjects], config)
    plan = Plan(options, sources, subjects, cells, Pool(), out, samples)
    plan.pool = Pool(jobs_of(plan), workers, options.scheduler)
    return plan


def _conditions(subject: Subject, options: CompareOptions) -> list[Condition]:
    return make_conditions(options.guidances, options.scales, options.label, subject.unguided)


def samples_of(subject: Subject) -> int:
    """Samples in a repeat where none are asked for."""
    if not isinstance(subject, ExactSubject):
        return MODEL_SAMPLES
    return LARGE_SAMPLES if subject.target.means.numel() > _LARGE else EXACT_SAMPLES


def check_numbers(options: CompareOptions) -> None:
    """Raise ValueError for a number that is out of its range."""
    for budget in options.budgets:
        require_count("--nfe", budget)
    require_count("--seed", options.seed, least=0)
    require_count("--repeats", options.repeats)
    if options.samples is not None:
        require_count("--samples", options.samples, least=2)
    if options.batch_size is not None:
        require_count("--batch-size", options.batch_size)
    if options.jobs is not None:
        require_count("--jobs", options.jobs)
    if options.throughput and options.scheduler is not None:
        raise ValueError(
            f"--throughput measures this machine, and --scheduler {options.scheduler} samples on "
            "others; leave one of them out"
        )
    if options.cell_timeout is not None:
        require_finite("--cell-timeout", options.cell_timeout, above=0.0)
    _check_resolving(options)


def _check_resolving(options: CompareOptions) -> None:
    given = {"--budget-seconds": options.budget_seconds, "--max-repeats": options.max_repeats}
    for name, value in given.items():
        if value is not None and not options.until_resolved:
            raise ValueError(f"{name} {value:g} limits --until-resolved: add it, or leave it out")
    if options.budget_seconds is not None:
        require_finite("--budget-seconds", options.budget_seconds, above=0.0)
    if options.max_repeats is not None:
        require_count("--max-repeats", options.max_repeats, least=options.repeats)


def cells_of(
    subject: Subject,
    conditions: Sequence[Condition],
    solvers: Sequence[Solver | Integrator],
    options: CompareOptions,
) -> Iterator[PlannedCell]:
    """Every condition × SDE × solver × number of evaluations.

    Raises:
        ValueError: a condition that the subject cannot have, a budget too small for a solver.
    """
    budgets = sorted(set(options.budgets))
    steps = {
        (s, b): steps_within(
            s, b, options.denoise, event_shape=subject.event_shape, seconds=options.cell_timeout
        )
        for s in solvers
        for b in budgets
    }
    for condition in conditions:
        subject.check(condition)
        for sde, process in subject.sdes.items():
            if options.grid is not None:
                grids.resolve(options.grid, process, 1)
            for solver in solvers:
                cell = Cell(sde, condition, solver)
                if getattr(solver, "adaptive", False):
                    yield PlannedCell(subject, cell, None, None)
                    continue
                for budget in budgets:
                    yield PlannedCell(subject, cell, budget, steps[solver, budget])


def jobs_of(plan: Plan) -> int:
    """As many processes as cores, where there is enough to do for them."""
    work = sum(work_of(plan, planned) for planned in plan.cells) * plan.options.repeats
    return processes_for(plan.options, work)


def processes_for(options: CompareOptions, work: float) -> int:
    """The processes asked for; else as many as cores, where ``work`` is enough for them."""
    if options.jobs is not None:
        return options.jobs
    if torch.device(options.device).type != "cpu":
        return 1
    return usable_cores() if work > _WORTH_PROCESSES else 1


def steps_within(
    solver: Solver | Integrator,
    budget: int,
    denoise: bool,
    *,
    event_shape: tuple[int, ...] = (1,),
    seconds: float | None = None,
) -> int | None:
    """The most steps within a budget of evaluations; None where the solver chooses its own.

    A user's own solver is run on samples of ``event_shape``, for ``seconds`` at most. Where it
    fails, a step is taken to cost one evaluation: its cells will fail and say why.

    Raises:
        ValueError: not even one step is, or steps of this solver cost nothing.
    """
    if getattr(solver, "adaptive", False):
        return None
    if not is_users(solver):
        return _steps_within(solver, budget, denoise, (1,))
    try:
        with time_limit(seconds):
            return _steps_within(solver, budget, denoise, event_shape)
    except BudgetError:
        raise
    except Exception:  # whatever it is, of a solver that nothing is known of
        return budget


def _steps_within(
    solver: Solver | Integrator, budget: int, denoise: bool, event_shape: tuple[int, ...]
) -> int:
    least = measured_nfe(solver, 1, denoise=denoise, event_shape=event_shape)
    if least > budget:
        raise BudgetError(
            f"--nfe {budget} is too few for {spec_of(solver)}: one step costs {least:g} "
            f"evaluations; give at least {least:g}"
        )
    try:
        return steps_for_budget(solver, budget, denoise=denoise, event_shape=event_shape)
    except BudgetError as error:
        raise BudgetError(
            f"--solver {spec_of(solver)} cannot be given --nfe {budget}: {error}"
        ) from None


def different(solvers: Sequence[Any]) -> list[Any]:
    """Without repetitions."""
    found: list[Any] = []
    for solver in solvers:
        if solver not in found:
            found.append(solver)
    return found


def work_of(plan: Plan, planned: PlannedCell) -> float:
    """Of one repeat."""
    weight = weight_of(planned.subject)
    return weight * plan.samples[planned.subject.name] * (planned.budget or 100)


def task_work(plan: Plan, task: Task) -> float:
    (subject,) = (s for s in plan.subjects if s.name == task.subject)
    return weight_of(subject) * task.samples * (task.budget or 100)


def weight_of(subject: Subject) -> float:
    """Work of one evaluation of one sample."""
    if not isinstance(subject, ExactSubject):
        return _OF_NETWORK
    return 1 + _OF_NUMBER * subject.target.means.numel()
