"""Solvers × SDEs × numbers of evaluations × guidances, at equal numbers of evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from experiments.budget import measured_nfe, steps_for_budget
from experiments.conditions import Condition, make_conditions
from experiments.draw import Drawn, Machine, make_machine, one_thread_each
from experiments.estimates import Estimate
from experiments.folders import default_out, prepare_out
from experiments.judging import Cell, Judge, Size, make_judge
from experiments.results import Row, RunFolder
from experiments.spec import parse_solver, spec_of
from experiments.subjects import ExactSubject, Subject, SubjectOptions, make_subjects
from sde_diffusion import NonFiniteError
from sde_diffusion.errors import require_count
from solvers import Integrator, ProbabilityFlow, Solver, grids
from solvers.catalogue import name_of, settings_of

SOLVERS = ("ancestral", "euler_maruyama", "predictor_corrector", "probability_flow")
BUDGETS = (10, 20, 50, 100)
EXACT_SAMPLES, MODEL_SAMPLES = 2000, 100
PICTURES = ("quality_vs_nfe.png", "quality_vs_seconds.png", "samples.png")
_WEIGHTS = {True: 1.0, False: 60.0}  # of one evaluation of one sample, exact or network: progress
_KEPT = 600  # samples of a cell kept for the picture


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
    samples: int | None = None
    repeats: int = 3
    seed: int = 0
    batch_size: int | None = None
    device: str = "cpu"
    grid: str | None = None
    denoise: bool = False
    out: str | None = None


@dataclass(frozen=True)
class PlannedCell:
    """A cell and its steps; ``budget`` and ``steps`` are None where the solver has its own."""

    subject: Subject
    cell: Cell
    budget: int | None
    steps: int | None

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
    subjects: list[Subject]
    cells: list[PlannedCell]
    machine: Machine
    out: str
    sizes: dict[str, Size]


@dataclass
class Kept:
    """Samples of one cell, for the picture."""

    planned: PlannedCell
    x: Tensor


@dataclass
class Outcome:
    """What a finished comparison leaves beside its folder."""

    folder: RunFolder
    kept: list[Kept] = field(default_factory=list)
    truths: dict[tuple[str, str, Condition, str], Tensor | None] = field(default_factory=dict)
    judges: dict[str, Judge] = field(default_factory=dict)


class Progress(Protocol):
    """Where the run tells how far it is."""

    def start(self, total: float) -> None: ...
    def now(self, what: str) -> None: ...
    def done(self, amount: float) -> None: ...


class Interrupted(KeyboardInterrupt):
    """Ctrl-C; the message says where and what is kept."""


def make_plan(options: CompareOptions) -> Plan:
    """Check everything and lay out the cells.

    Raises:
        ValueError, TypeError: whatever is wrong with the options, before any work.
    """
    targets = options.targets or (() if options.models else ("ring", "digits"))
    solvers = _different([parse_solver(text) for text in options.solvers])
    if not solvers or not options.budgets:
        raise ValueError("--solver and --nfe need at least one value each")
    for budget in options.budgets:
        require_count("--nfe", budget)
    require_count("--seed", options.seed, least=0)
    require_count("--repeats", options.repeats)
    if options.samples is not None:
        require_count("--samples", options.samples, least=2)
    if options.batch_size is not None:
        require_count("--batch-size", options.batch_size)
    make_conditions(options.guidances, options.scales, options.label)
    machine = make_machine(options.device, options.batch_size)
    subjects = make_subjects(SubjectOptions(targets, options.models, options.sdes, options.data))
    cells: list[PlannedCell] = []
    steps = {
        (solver, budget): steps_within(solver, budget, options.denoise)
        for solver in solvers
        for budget in dict.fromkeys(options.budgets)
    }
    for subject in subjects:
        for condition in make_conditions(
            options.guidances, options.scales, options.label, subject.unguided
        ):
            subject.check(condition)
            for sde, process in subject.sdes.items():
                if options.grid is not None:
                    grids.resolve(options.grid, process, 1)
                for solver in solvers:
                    cell = Cell(sde, condition, solver)
                    if getattr(solver, "adaptive", False):
                        cells.append(PlannedCell(subject, cell, None, None))
                        continue
                    cells += [
                        PlannedCell(subject, cell, budget, steps[solver, budget])
                        for budget in sorted(set(options.budgets))
                    ]
    sizes = {
        subject.name: Size(
            options.samples
            or (EXACT_SAMPLES if isinstance(subject, ExactSubject) else MODEL_SAMPLES),
            options.repeats,
        )
        for subject in subjects
    }
    config = {**asdict(options), "out": None, "batch_size": None, "device": None}
    out = options.out or default_out("compare", [s.name for s in subjects], config)
    return Plan(options, subjects, cells, machine, out, sizes)


def run(plan: Plan, progress: Progress) -> Outcome:
    """Run the cells; each row is on disk as soon as it is finished.

    Raises:
        NonFiniteError: a score returned NaN or infinity; names cell, step and time.
        Interrupted: Ctrl-C.
    """
    folder_path = prepare_out(plan.out, pictures=PICTURES)
    for subject in plan.subjects:
        subject.to(plan.machine.device)
    config = {**asdict(plan.options), "workers": plan.machine.workers, "sizes": plan.sizes}
    folder = RunFolder(folder_path, "compare", config, device=plan.machine.device)
    outcome = Outcome(folder)
    where = "the start"
    progress.start(sum(_work(plan, planned) for planned in plan.cells))
    try:
        with folder, one_thread_each():
            folder.write()
            fine = _FineSolutions(plan)
            for planned in plan.cells:
                where = str(planned)
                progress.now(where)
                _one(plan, planned, outcome, fine)
                progress.done(_work(plan, planned))
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted at {where}; {_finished(folder, plan)}") from None
    except NonFiniteError as error:
        text = f"{where}: {error}; {_finished(folder, plan)}"
        raise NonFiniteError(text, error.step, error.time) from error
    except RuntimeError as error:
        raise RuntimeError(f"{where}: {error}; {_finished(folder, plan)}") from error
    return outcome


def _one(plan: Plan, planned: PlannedCell, outcome: Outcome, fine: _FineSolutions) -> None:
    subject, cell, options = planned.subject, planned.cell, plan.options
    size = plan.sizes[subject.name]
    if subject.name not in outcome.judges:
        outcome.judges[subject.name] = make_judge(subject, size, options.seed, plan.machine)
    judge = outcome.judges[subject.name]
    floor = judge.floor(cell)
    if subject.name not in outcome.folder.floor:
        outcome.folder.set_floor(subject.name, floor)
    fine.warm_up(subject, cell)
    drawn = draw_cell(plan, subject, cell, size.ids(), planned.steps)
    same_noise = None if cell.solver.stochastic else fine.of(subject, cell, judge)
    found = judge.with_paired(judge.metrics(cell, drawn.x), size, drawn.x, same_noise)
    outcome.folder.add(_row(plan, planned, judge, drawn, found, floor))
    outcome.kept.append(Kept(planned, drawn.x[:_KEPT].clone()))
    key = (subject.name, cell.sde, cell.condition, judge.truth(cell))
    if key not in outcome.truths:
        true = judge.true_samples(cell)
        outcome.truths[key] = None if true is None else true[:_KEPT]


def draw_cell(
    plan: Plan,
    subject: Subject,
    cell: Cell,
    ids: Tensor,
    steps: int | None,
    dtype: torch.dtype = torch.float32,
) -> Drawn:
    """The samples of a cell."""
    return plan.machine.draw(
        subject.score_of(cell.sde, cell.condition),
        subject.sdes[cell.sde],
        cell.solver,
        event_shape=subject.event_shape,
        ids=ids,
        steps=steps,
        seed=plan.options.seed,
        grid=None if steps is None else plan.options.grid,
        denoise=plan.options.denoise,
        dtype=dtype,
        suggested=subject.suggested,
    )


class _FineSolutions:
    """The ODE solved finely from the noise of the cells, once per subject, SDE and condition."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._known: dict[tuple[str, str, Condition], Tensor] = {}
        self._warm: set[tuple[str, str, Condition]] = set()

    def of(self, subject: Subject, cell: Cell, judge: Judge) -> Tensor:
        key = (subject.name, cell.sde, cell.condition)
        if key not in self._known:
            exact = Cell(cell.sde, cell.condition, ProbabilityFlow("rk4"))
            ids = judge.paired_ids(self._plan.sizes[subject.name])
            steps = judge.fine_steps
            self._known[key] = draw_cell(self._plan, subject, exact, ids, steps).x
        return self._known[key]

    def warm_up(self, subject: Subject, cell: Cell) -> None:
        """Two steps that are not timed: first calls of a network are slow."""
        key = (subject.name, cell.sde, cell.condition)
        if key not in self._warm:
            self._warm.add(key)
            flow = Cell(cell.sde, cell.condition, ProbabilityFlow("euler"))
            ids = self._plan.sizes[subject.name].ids()
            draw_cell(self._plan, subject, flow, ids[: 2 * subject.suggested], 2)


def _row(
    plan: Plan,
    planned: PlannedCell,
    judge: Judge,
    drawn: Drawn,
    found: dict[str, Estimate],
    floor: dict[str, Estimate],
) -> Row:
    cell, options = planned.cell, plan.options
    size = plan.sizes[planned.subject.name]
    return Row(
        solver=name_of(type(cell.solver)),
        settings=settings_of(cell.solver),
        sde=cell.sde,
        target=planned.subject.name,
        guidance=cell.condition.guidance,
        scale=cell.condition.scale,
        steps=planned.steps,
        nfe=drawn.nfe,
        network_passes=drawn.network_passes,
        seconds=drawn.seconds,
        metrics=found,
        extra={
            "budget": planned.budget,
            "spec": spec_of(cell.solver),
            "solver_label": _label(plan, planned),
            "label": cell.condition.label,
            "guided_by": cell.condition.guided_by,
            "classes": cell.condition.classes,
            "primary": judge.primary,
            "truth": judge.truth(cell),
            "floor": {name: e._asdict() for name, e in floor.items()},
            "grid": options.grid or planned.subject.sdes[cell.sde].default_grid,
            "denoise": options.denoise,
            "seed": options.seed,
            "samples": size.total,
            "repeats": size.repeats,
            "status": "ok",
        },
    )


def _label(plan: Plan, planned: PlannedCell) -> str:
    """A line's name: the solver as typed, and the guidance where the run has several."""
    here = [p for p in plan.cells if p.subject is planned.subject]
    several = len({p.cell.condition for p in here}) > 1
    text = spec_of(planned.cell.solver)
    return f"{text}, {planned.cell.condition.guided_by}" if several else text


def steps_within(solver: Solver | Integrator, budget: int, denoise: bool) -> int | None:
    """The most steps within a budget of evaluations; None where the solver chooses its own.

    Raises:
        ValueError: not even one step is, or steps of this solver cost nothing.
    """
    if getattr(solver, "adaptive", False):
        return None
    least = measured_nfe(solver, 1, denoise=denoise)
    if least > budget:
        raise ValueError(
            f"--nfe {budget} is too few for {spec_of(solver)}: one step costs {least:g} "
            f"evaluations; give at least {least:g}"
        )
    try:
        return steps_for_budget(solver, budget, denoise=denoise)
    except ValueError as error:
        raise ValueError(
            f"--solver {spec_of(solver)} cannot be given --nfe {budget}: {error}"
        ) from None


def _different(solvers: Sequence[Any]) -> list[Any]:
    found: list[Any] = []
    for solver in solvers:
        if solver not in found:
            found.append(solver)
    return found


def _work(plan: Plan, planned: PlannedCell) -> float:
    weight = _WEIGHTS[isinstance(planned.subject, ExactSubject)]
    return weight * plan.sizes[planned.subject.name].total * (planned.budget or 100)


def _finished(folder: RunFolder, plan: Plan) -> str:
    rows = len(folder.rows)
    return f"{rows} of {len(plan.cells)} rows are finished and kept in {folder.path}/results.json"
