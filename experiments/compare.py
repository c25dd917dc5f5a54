"""Solvers × SDEs × numbers of evaluations × guidances, at equal numbers of evaluations.

The cells that `experiments.planning` lays out are computed by `experiments.work`, on the processes
of `experiments.pool`; what a run folder already holds is not computed again. A row is a cell's
repeats taken together.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from experiments.cells import Task
from experiments.costs import Costs
from experiments.draw import one_thread_each
from experiments.estimates import Estimate, estimate
from experiments.experiment_file import EXPERIMENT, to_toml
from experiments.folders import prepare_out
from experiments.intervals import LEVEL, PairedBootstrap, error_at_look, t_interval
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
from experiments.pool import Work
from experiments.records import OK, Record
from experiments.resolving import (
    Column,
    by_repeat,
    more_repeats,
    row_intervals,
    unresolved,
    with_ranks,
)
from experiments.results import Row, RunFolder, WriteError, naming, write_whole
from experiments.spec import spec_of
from experiments.store import CellStore
from experiments.timing import Timing
from experiments.work import Done
from solvers.catalogue import name_of, settings_of

__all__ = ["BUDGETS", "SOLVERS", "CompareOptions", "Outcome", "make_plan", "run"]

PICTURES = ("quality_vs_nfe.png", "quality_vs_seconds.png", "samples.png", "report.html")
_REWRITE = 1.0  # seconds between two writes of results.json


@dataclass
class Outcome:
    """What a finished comparison leaves beside its folder."""

    plan: Plan
    folder: RunFolder
    store: CellStore
    finished: list[PlannedCell] = field(default_factory=list)

    def samples(self, planned: PlannedCell, count: int) -> Tensor | None:
        """Some samples of a cell, for pictures; None where it failed."""
        found: list[Tensor] = []
        for task in self.plan.tasks(planned):
            tensors = self.store.tensors(task.key) if sum(map(len, found)) < count else None
            found += [tensors["x"]] if tensors else []
        return torch.cat(found)[:count] if found else None

    @property
    def failed(self) -> list[dict[str, Any]]:
        """Rows whose sampler failed."""
        return [row for row in self.folder.rows if row["status"] != OK]


class Progress(Protocol):
    """Where the run tells how far it is."""

    def start(self, total: float) -> None: ...
    def now(self, what: str) -> None: ...
    def done(self, amount: float) -> None: ...


class Interrupted(KeyboardInterrupt):
    """Ctrl-C; the message says where and what is kept."""


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
    rows = _Rows(outcome)
    progress.start(sum(work_of(plan, planned) for planned in plan.cells) * options.repeats)
    where = ""

    def began(task: Task) -> None:
        nonlocal where
        where = f" at {task}"
        progress.now(str(task))

    try:
        with folder, one_thread_each():
            folder.write()
            if plan.experiment == "compare":
                with naming(path / EXPERIMENT):
                    write_whole(path / EXPERIMENT, to_toml(options))
            there: set[str] = set()
            for _ in _looks(outcome, rows):
                _references(plan, store, began, timing, there)
                for task, done in _computed(plan, store, rows.missing(), began, timing):
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
    except WriteError as error:
        raise WriteError(
            f"{error}; {len(rows.records())} cells are finished, and stored in {folder.path}: make "
            "room there, and the same command goes on"
        ) from error
    except KeyboardInterrupt:
        rows.write()
        raise Interrupted(
            f"interrupted{where}; {len(folder.rows)} of {len(plan.cells)} rows are finished "
            f"and kept in {folder.path}; the same command goes on from there"
        ) from None
    return outcome


def _looks(outcome: Outcome, rows: _Rows) -> Iterator[int]:
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


def _references(
    plan: Plan,
    store: CellStore,
    began: Callable[[Task], None],
    timing: Timing,
    there: set[str],
) -> None:
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
    for task, _ in _computed(plan, store, list(tasks.values()), began, timing):
        there.add(task.key)


def _computed(
    plan: Plan,
    store: CellStore,
    tasks: Sequence[Task],
    began: Callable[[Task], None],
    timing: Timing,
) -> Iterator[tuple[Task, Done]]:
    """The cells, those that the folder holds first."""
    missing: list[Work] = []
    for task in tasks:
        if plan.options.force:
            store.forget(task.key)
        record = store.get(task.key)
        if record is None or (task.kind == "fine" and store.tensors(task.key) is None):
            missing.append((task, _fine_of(plan, store, task)))
        else:
            yield task, Done(record, {})
    for task, done in plan.pool.run(missing, began):
        timing.add(done.record)
        store.put(*done)
        yield task, done


def _fine_of(plan: Plan, store: CellStore, task: Task) -> Tensor | None:
    if task.kind != "cell" or task.solver.stochastic:
        return None
    subject = next(s for s in plan.subjects if s.name == task.subject)
    planned = PlannedCell(subject, Cell(task.sde, task.condition, task.solver), None, None)
    fine = plan.fine_task(planned, task.repeat)
    tensors = store.tensors(fine.key) if fine is not None else None
    return None if tensors is None else tensors["x"]


class _Rows:
    """Rows from records, in the order of the plan, written as they become whole."""

    def __init__(self, outcome: Outcome) -> None:
        self._outcome = outcome
        self._records: dict[str, Record] = {}
        self._rows: dict[int, Row] = {}
        self._written = -math.inf
        self._bootstrap = PairedBootstrap(outcome.plan.options.seed)
        adaptive = outcome.plan.options.until_resolved
        self._error = error_at_look(1) if adaptive else 1 - LEVEL
        self._lay_out()

    def _lay_out(self) -> None:
        plan = self._outcome.plan
        self._tasks = [plan.tasks(planned) for planned in plan.cells]
        self._keys = [[task.key for task in tasks] for tasks in self._tasks]
        self._row_of = {key: i for i, keys in enumerate(self._keys) for key in keys}

    def look_again(self, error: float) -> None:
        """The plan has more repeats; from now on ranks may be wrong with probability ``error``."""
        self._error = error
        self._lay_out()

    def missing(self) -> list[Task]:
        """Cells of the plan that have not been added."""
        tasks = [task for tasks in self._tasks for task in tasks]
        return [task for task in tasks if task.key not in self._records]

    def seconds_by_column(self) -> dict[Column, float]:
        """What a repeat of each column takes, by those that are finished."""
        found: dict[Column, float] = {}
        for planned, keys in zip(self._outcome.plan.cells, self._keys, strict=True):
            records = [self._records[key] for key in keys if key in self._records]
            spent = [(r.seconds or 0.0) + (r.judging_seconds or 0.0) for r in records]
            column = planned.column
            found[column] = found.get(column, 0.0) + sum(spent) / max(1, len(spent))
        return found

    def add(self, done: Done) -> None:
        """A finished cell."""
        key = done.record.key
        self._records[key] = done.record
        index = self._row_of[key]
        if all(other in self._records for other in self._keys[index]):
            self._rows[index] = self._row(index)
            if time.monotonic() - self._written > _REWRITE:
                self.write()

    def write(self) -> None:
        """Write results.json with the rows that are whole."""
        plan = self._outcome.plan
        order = sorted(self._rows)
        self._outcome.finished = [plan.cells[i] for i in order]
        self._outcome.folder.replace(with_ranks([self._rows[i] for i in order], self._error))
        self._written = time.monotonic()

    def measure(self, costs: Costs, progress: Progress) -> None:
        """Add to the rows what a sample costs, one after the other, nothing else at work."""
        plan = self._outcome.plan
        for i, row in sorted(self._rows.items()):
            if row.extra["status"] == OK:
                progress.now(f"throughput of {plan.cells[i]}")
                found = costs.of(plan.tasks(plan.cells[i])[0])
                self._rows[i] = replace(row, extra={**row.extra, "throughput": found})

    def records(self) -> list[Record]:
        """The records of the rows that are whole, row after row."""
        return [
            self._records[key]
            for i in sorted(self._rows)
            for key in self._keys[i]
            if key in self._records
        ]

    def _row(self, index: int) -> Row:
        plan = self._outcome.plan
        planned = plan.cells[index]
        records = [self._records[key] for key in self._keys[index]]
        floors = _floors(self._outcome, planned)
        floor = _estimates(floors)
        self._outcome.folder.floor.setdefault(planned.subject.name, floor)
        row = make_row(plan, planned, records, floor)
        if row.metrics:
            row = self._with_intervals(row, records, floors)
        return row

    def _with_intervals(
        self, row: Row, records: Sequence[Record], floors: Sequence[Mapping[str, float]]
    ) -> Row:
        store = self._outcome.store
        values, floor = by_repeat([record.metrics for record in records]), by_repeat(floors)
        kept = [store.tensors(record.key) or {} for record in records] if "rms" in values else []
        distances = [one["distance"].numpy() for one in kept if "distance" in one]
        if len(distances) < len(records):
            distances = []
        seconds = t_interval([record.seconds or 0.0 for record in records])
        total = None if seconds is None else [max(0.0, len(records) * end) for end in seconds]
        more = {
            "by_repeat": values,
            "floor_by_repeat": floor,
            "intervals": row_intervals(values, floor, distances, self._bootstrap),
            "seconds_interval": total,
        }
        return replace(row, extra={**row.extra, **more})


def _floors(outcome: Outcome, planned: PlannedCell) -> list[Mapping[str, float]]:
    """What true samples score, repeat by repeat, as far as there are any."""
    plan, found = outcome.plan, []
    for repeat in range(plan.repeats_of(planned)):
        record = outcome.store.get(plan.floor_task(planned, repeat).key)
        if record is not None and record.metrics:
            found.append(record.metrics)
    return found


def _estimates(metrics: Sequence[Mapping[str, float]]) -> dict[str, Estimate]:
    """Name by name over repeats; what a repeat lacks, or found not finite, is not known."""
    if not metrics:
        return {}
    values = {name: [one.get(name) for one in metrics] for name in metrics[0]}
    return {
        name: estimate(math.nan if v is None else v for v in column)
        for name, column in values.items()
    }


def make_row(
    plan: Plan, planned: PlannedCell, records: Sequence[Record], floor: Mapping[str, Estimate]
) -> Row:
    """The repeats of a cell, taken together; without figures where one of them failed."""
    cell, options = planned.cell, plan.options
    judge = plan.judge(planned)
    failed = [record for record in records if record.status != OK]
    count = len(records)
    return Row(
        solver=name_of(type(cell.solver)),
        settings=settings_of(cell.solver),
        sde=cell.sde,
        target=planned.subject.name,
        guidance=cell.condition.guidance,
        scale=cell.condition.scale,
        steps=planned.steps,
        nfe=sum(record.nfe or 0.0 for record in records) / count,
        network_passes=sum(record.network_passes or 0.0 for record in records) / count,
        seconds=sum(record.seconds or 0.0 for record in records),
        metrics={} if failed else _estimates([record.metrics for record in records]),
        extra={
            "budget": planned.budget,
            "spec": spec_of(cell.solver),
            "solver_label": _label(plan, planned),
            "label": cell.condition.label,
            "guided_by": cell.condition.guided_by,
            "classes": cell.condition.classes,
            "interval": cell.condition.interval,
            "primary": judge.primary,
            "truth": judge.truth(cell),
            "floor": {name: e._asdict() for name, e in floor.items()},
            "grid": options.grid or planned.subject.sdes[cell.sde].default_grid,
            "denoise": options.denoise,
            "depends_on_batch": getattr(cell.solver, "depends_on_batch", False),
            "seed": options.seed,
            "samples": plan.samples[planned.subject.name] * count,
            "repeats": count,
            "peak_bytes": max((record.peak_bytes or 0 for record in records), default=0) or None,
            "batch_size": min((record.batch_size or 0 for record in records), default=0) or None,
            "cells": [record.key for record in records],
            "by_repeat": {},
            "floor_by_repeat": {},
            "intervals": {},
            "seconds_interval": None,
            "status": failed[0].status if failed else OK,
            "error": failed[0].error if failed else "",
        },
    )


def _label(plan: Plan, planned: PlannedCell) -> str:
    """A line's name: the solver as typed, and the guidance where the run has several."""
    here = [p for p in plan.cells if p.subject is planned.subject]
    several = len({p.cell.condition for p in here}) > 1
    text = spec_of(planned.cell.solver)
    if getattr(planned.cell.solver, "depends_on_batch", False):
        text += " (depends on its batch)"
    return f"{text}, {planned.cell.condition.guided_by}" if several else text
