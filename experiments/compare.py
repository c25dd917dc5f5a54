"""Solvers × SDEs × numbers of evaluations × guidances, at equal numbers of evaluations.

The cells that `experiments.planning` lays out are computed by `experiments.work`, on the processes
of `experiments.pool`; what a run folder already holds is not computed again. A row is a cell's
repeats taken together.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from experiments.cells import Task
from experiments.computing import Computer, Interrupted, Progress
from experiments.costs import Costs
from experiments.experiment_file import EXPERIMENT
from experiments.folders import prepare_out
from experiments.intervals import error_at_look
from experiments.judging import Cell
from experiments.planning import (
    BUDGETS,
    SOLVERS,
    CompareOptions,
    Plan,
    PlannedCell,
    make_plan,
    task_work,
    work_of,
)
from experiments.resolving import (
    more_repeats,
    unresolved,
)
from experiments.results import RunFolder, naming, write_whole
from experiments.rows import Outcome, Rows
from experiments.store import CellStore
from experiments.timing import Timing
from experiments.work import Given

__all__ = [
    "BUDGETS",
    "SOLVERS",
    "CompareOptions",
    "Interrupted",
    "Outcome",
    "Progress",
    "make_plan",
    "run",
]

PICTURES = ("quality_vs_nfe.png", "quality_vs_seconds.png", "samples.png", "report.html")


def run(
    plan: Plan,
    progress: Progress,
    timing: Timing | None = None,
    more_pictures: Sequence[str] = (),
) -> Outcome:
    """Compute the cells that the folder does not hold; each is on disk as soon as it is finished.

    A cell whose sampler fails says so, and the others go on.

    Args:
        timing: begun by a caller who counts what comes before and after.

    Raises:
        Interrupted: Ctrl-C.
        WriteError: a full disk; the finished cells are kept.
    """
    timing = timing or Timing()
    timing.processes = None if plan.pool.scheduler else plan.pool.jobs
    options = plan.options
    path = prepare_out(plan.out, pictures=(*PICTURES, *more_pictures))
    config = {**asdict(options), "jobs": plan.pool.jobs, "sizes": plan.samples}
    folder = RunFolder(path, plan.experiment, config, device=options.device)
    store = CellStore(path)
    outcome = Outcome(plan, folder, store)
    rows = Rows(outcome)
    computer = Computer(store, plan.pool, progress, options.force, timing)
    progress.start(sum(work_of(plan, planned) for planned in plan.cells) * options.repeats)
    with computer.keeping(folder, rows, len(plan.cells)):
        with naming(path / EXPERIMENT):
            write_whole(path / EXPERIMENT, plan.file.to_toml(options))
        there: set[str] = set()
        for _ in _looks(outcome, rows):
            _references(plan, computer, there)
            fine_of = functools.partial(_fine_of, plan, store)
            for task, done in computer.run(rows.missing(), fine_of):
                progress.now(str(task))
                progress.done(task_work(plan, task))
                rows.add(done)
            rows.write()
        if options.throughput:
            costs = Costs(path, options.device, plan.pool.workers, force=options.force)
            rows.measure(costs, progress)
            rows.write()
        store.write_table(rows.records())
        folder.timing = timing.as_dict()
    return outcome


def _looks(outcome: Outcome, rows: Rows) -> Iterator[int]:
    """Once; with --until-resolved again and again, as long as more repeats are due."""
    plan, options = outcome.plan, outcome.plan.options
    started = time.monotonic()
    yield (look := 1)
    while options.until_resolved:
        found = outcome.folder.rows
        left = options.budget_seconds
        more = more_repeats(
            found,
            unresolved(found),
            rows.seconds_by_column(),
            max_repeats=plan.max_repeats,
            seconds_left=None if left is None else left - (time.monotonic() - started),
        )
        if not more:
            return
        plan.repeats |= more
        look += 1
        rows.look_again(error_at_look(look))
        yield look


def _references(plan: Plan, computer: Computer, there: set[str]) -> None:
    """Floors and fine solutions, which many cells share, before the cells.

    Args:
        there: keys of those that this run has; it grows.
    """
    tasks: dict[str, Task] = {}
    for planned in plan.cells:
        for repeat in range(plan.repeats_of(planned)):
            for task in (plan.floor_task(planned, repeat), plan.fine_task(planned, repeat)):
                if task is not None and task.key not in there:
                    tasks.setdefault(task.key, task)
    for task, _ in computer.run(list(tasks.values())):
        there.add(task.key)


def _fine_of(plan: Plan, store: CellStore, task: Task) -> Given | None:
    if task.kind != "cell" or task.solver.stochastic:
        return None
    subject = next(s for s in plan.subjects if s.name == task.subject)
    planned = PlannedCell(subject, Cell(task.sde, task.condition, task.solver), None, None)
    fine = plan.fine_task(planned, task.repeat)
    return store.tensors(fine.key) if fine is not None else None
