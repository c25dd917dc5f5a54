"""An error budget laid out: its options checked, its cells and their keys, before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from experiments.budget_cells import BudgetTask, subject_of
from experiments.budget_problem import equation_of, fine_steps, reference_for
from experiments.budget_subject import BudgetSubject
from experiments.cells import Kind, Task, cell_key
from experiments.conditions import ALL, Condition, make_conditions
from experiments.draw import make_machine
from experiments.experiment_file import ExperimentFile
from experiments.folders import default_out
from experiments.judging import Cell
from experiments.planning import (
    HOW,
    KEYS,
    OF_COMPARE,
    CompareOptions,
    PlannedCell,
    cells_of,
    check_numbers,
    different,
    processes_for,
    weight_of,
)
from experiments.pool import Pool
from experiments.spec import parse_solver, spec_of
from experiments.subjects import SubjectOptions
from sde_diffusion.errors import require_count
from solvers import ProbabilityFlow

SOLVERS = ("ancestral", "ddim", "probability_flow")
BUDGETS = (10, 20, 50)
SAMPLES = 1000
_STAGES = 4  # evaluations of a step of the fine ODE


@dataclass(frozen=True)
class BudgetOptions(CompareOptions):
    """What the command line says; empty or None: the default.

    Attributes:
        targets: one at most; with a model: what it was trained on samples of. Default without a
            model: ring.
        models: one at most.
        samples: in a repeat.
        buckets: ranges of times that a network's error is measured in.
    """

    solvers: Sequence[str] = SOLVERS
    budgets: Sequence[int] = BUDGETS
    repeats: int = 3
    buckets: int = 8


FILE = ExperimentFile("error-budget", BudgetOptions, KEYS, OF_COMPARE)


@dataclass(frozen=True)
class BudgetPlan:
    """An error budget, all of whose arguments are known to be good."""

    options: BudgetOptions
    sources: SubjectOptions
    subject: BudgetSubject
    cells: list[PlannedCell]
    pool: Pool
    out: str

    @property
    def samples(self) -> int:
        """In a repeat."""
        return self.options.samples or SAMPLES

    def cell_task(self, planned: PlannedCell, repeat: int) -> BudgetTask:
        """A repeat of a row: what is its solver's own."""
        # By its key: how finely the reference is solved is not the cell's to know.
        reference = self.fine_task(planned, repeat).key
        return self._task("cell", planned, repeat, reference=reference)

    def fine_task(self, planned: PlannedCell, repeat: int) -> BudgetTask:
        """What the solvers of its equation share."""
        reference = reference_for(planned.cell.solver)
        fine = Cell(planned.cell.sde, planned.cell.condition, reference)
        steps = fine_steps(reference)
        return self._task("fine", PlannedCell(planned.subject, fine, None, steps), repeat)

    def floor_task(self, planned: PlannedCell, repeat: int) -> BudgetTask | None:
        """What all solvers share; None where nothing is known of the law."""
        condition = planned.cell.condition
        if condition.law == "guided" or not self.subject.has_truth(condition):
            return None
        return self._task("floor", _any_solver(planned, condition), repeat)

    def by_time_task(self, planned: PlannedCell) -> BudgetTask | None:
        """The network's error under an SDE, without guidance; None without a network."""
        if self.subject.network is None or not self.subject.has_truth(Condition()):
            return None
        return self._task(
            "by_time", _any_solver(planned, Condition()), 0, buckets=self.options.buckets
        )

    def amplified_task(self, planned: PlannedCell) -> BudgetTask | None:
        """What a solver makes of that; None where the exact score is not known."""
        by_time = self.by_time_task(planned)
        if by_time is None or self.subject.exact is None:
            return None
        cell = Cell(planned.cell.sde, Condition(), planned.cell.solver)
        plain = PlannedCell(planned.subject, cell, planned.budget, planned.steps)
        return self._task("amplified", plain, 0, reference=by_time.key)

    def shared_tasks(self) -> list[BudgetTask]:
        """What several rows share, each once."""
        found: dict[str, BudgetTask] = {}
        for planned in self.cells:
            for repeat in range(self.options.repeats):
                tasks = self.floor_task(planned, repeat), self.fine_task(planned, repeat)
                found |= {task.key: task for task in tasks if task is not None}
            if (by_time := self.by_time_task(planned)) is not None:
                found[by_time.key] = by_time
        return list(found.values())

    def solver_tasks(self) -> list[BudgetTask]:
        """What is the solvers' own, each once: the cells, and what they make of errors."""
        found: dict[str, BudgetTask] = {}
        for planned in self.cells:
            tasks = [self.cell_task(planned, repeat) for repeat in range(self.options.repeats)]
            if (amplified := self.amplified_task(planned)) is not None:
                tasks.append(amplified)
            found |= {task.key: task for task in tasks}
        return list(found.values())

    def given_tasks(self) -> dict[str, BudgetTask]:
        """By the key of each of `solver_tasks` what it is compared with."""
        found: dict[str, BudgetTask] = {}
        for planned in self.cells:
            for repeat in range(self.options.repeats):
                task = self.cell_task(planned, repeat)
                found[task.key] = self.fine_task(planned, repeat)
            amplified, by_time = self.amplified_task(planned), self.by_time_task(planned)
            if amplified is not None and by_time is not None:
                found[amplified.key] = by_time
        return found

    def truth(self, planned: PlannedCell) -> str:
        """What a row's total is of, in words."""
        condition = planned.cell.condition
        if condition.law == "guided":
            return f"the guided {equation_of(planned.cell.solver)}, finely solved"
        if not self.subject.has_truth(condition):
            return f"the {equation_of(planned.cell.solver)}, finely solved"
        one = "" if condition.law == "whole" else " of the classes"
        if condition.law == "conditional" and condition.label != ALL:
            one = f" of class {condition.label}"
        return f"{'exact samples' if self.subject.exact is not None else 'held-out data'}{one}"

    def primary(self, planned: PlannedCell) -> str:
        """The figure that stands for a row's quality."""
        return "total" if self.subject.has_truth(planned.cell.condition) else "discretisation"

    def work_of(self, task: Task) -> float:
        """As `planning.work_of`."""
        evaluations = float(task.budget or 10)
        if task.kind == "fine":
            solutions = 2.5 if self.subject.network is None else 3.5
            stages = 1 if task.solver.stochastic else _STAGES
            evaluations = solutions * stages * (task.steps or 1)
        if task.kind == "amplified":
            evaluations *= self.options.buckets + 2
        return weight_of(self.subject.sampled) * task.samples * evaluations

    def _task(self, kind: Kind, planned: PlannedCell, repeat: int, **more: Any) -> BudgetTask:
        cell, options = planned.cell, self.options
        numbers: dict[str, Any] = {
            "budget": planned.budget,
            "steps": planned.steps,
            "grid": options.grid if kind in ("cell", "amplified") else None,
            "denoise": options.denoise,
            "seed": options.seed,
            "repeat": repeat,
            "samples": self.samples,
        }
        if self.subject.exact is None:
            more["of"] = options.repeats  # among which real data is dealt out
        if getattr(cell.solver, "depends_on_batch", False):
            more["batch_size"] = options.batch_size
        condition = cell.condition
        key = cell_key(
            kind,
            self.subject,
            cell.sde,
            condition,
            cell.solver,
            experiment="error-budget",
            device=torch.device(options.device).type,
            **numbers,
            **more,
        )
        return BudgetTask(
            kind=kind,
            key=key,
            subjects=self.sources,
            subject=self.subject.name,
            sde=cell.sde,
            condition=condition,
            solver=cell.solver,
            device=options.device,
            batch_size=options.batch_size,
            seconds=options.cell_timeout,
            repeats=options.repeats,
            buckets=options.buckets if kind == "by_time" else 0,
            **numbers,
        )


def make_plan(options: BudgetOptions) -> BudgetPlan:
    """Check everything and lay out the cells.

    Raises:
        ValueError, TypeError: whatever is wrong with the options, before any work.
    """
    check_numbers(options)
    require_count("--buckets", options.buckets)
    make_conditions(options.guidances, options.scales, options.label)
    solvers = different([parse_solver(text) for text in options.solvers])
    if not solvers or not options.budgets:
        raise ValueError("--solver and --nfe need at least one value each")
    for solver in solvers:
        if getattr(solver, "adaptive", False):
            raise ValueError(
                f"--solver {spec_of(solver)} chooses its own steps, and a budget is of a number "
                "of evaluations; use a fixed method"
            )
    workers = make_machine(options.device, options.batch_size).workers
    sources = SubjectOptions(
        tuple(options.targets or (() if options.models else ("ring",))),
        tuple(options.models),
        tuple(options.sdes),
        options.data,
    )
    subject = subject_of(sources, options.device)
    conditions = make_conditions(options.guidances, options.scales, options.label, subject.unguided)
    cells = list(cells_of(subject, conditions, solvers, options))
    config = {name: value for name, value in asdict(options).items() if name not in HOW}
    out = options.out or default_out("error-budget", [subject.name], config)
    samples, classes = options.samples or SAMPLES, subject.num_classes or 1
    if samples < 2 * classes and any(condition.label == ALL for condition in conditions):
        raise ValueError(
            f"--samples {samples} is too few for {classes} classes in turn; give at least "
            f"{2 * classes}"
        )
    plan = BudgetPlan(options, sources, subject, cells, Pool(), out)
    work = sum(map(plan.work_of, [*plan.shared_tasks(), *plan.solver_tasks()]))
    pool = Pool(processes_for(options, work), workers, options.scheduler)
    return replace(plan, pool=pool)


def _any_solver(planned: PlannedCell, condition: Condition) -> PlannedCell:
    """Of what is the same for all solvers: one of them for the key."""
    cell = Cell(planned.cell.sde, condition, ProbabilityFlow("rk4"))
    return PlannedCell(planned.subject, cell, None, None)
