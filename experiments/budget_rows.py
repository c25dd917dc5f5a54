"""Rows of an error budget: the parts of all repeats taken together, written as they are whole."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from experiments.budget_cells import BudgetTask, unpacked
from experiments.budget_parts import ORDER, Part
from experiments.budget_plan import BudgetPlan
from experiments.budget_problem import equation_of
from experiments.estimates import estimate
from experiments.intervals import t_interval
from experiments.network_error import NetworkError, amplified
from experiments.planning import PlannedCell
from experiments.records import OK, Record
from experiments.results import Row, RunFolder
from experiments.rows import sums
from experiments.spec import spec_of
from experiments.store import CellStore
from solvers.catalogue import name_of, settings_of

_REWRITE = 1.0  # seconds between two writes of results.json
_ENDS = ("total", "floor")


@dataclass(frozen=True)
class BudgetRow:
    """The budget of one sampler at one number of evaluations.

    Attributes:
        planned: the sampler, and the condition it is asked for.
        parts: name -> part, of `ORDER`, in that order; empty where the row failed.
        total: the sampler against independent true samples, floor taken off; None without data.
        floor: Monte Carlo: what true samples score against true samples, floor not taken off.
        status, error: of the first of its cells, or of what they share, that failed.
    """

    planned: PlannedCell
    nfe: float
    network_passes: float
    seconds: float
    parts: Mapping[str, Part]
    total: Part | None
    floor: Part | None
    cells: tuple[str, ...]
    peak_bytes: int | None = None
    batch_size: int | None = None
    status: str = OK
    error: str = ""

    @property
    def sde(self) -> str:
        """Its name."""
        return self.planned.cell.sde

    @property
    def panel(self) -> tuple[str, str]:
        """Rows of one panel or table: SDE, and the condition in words."""
        return self.sde, str(self.planned.cell.condition)

    @property
    def name(self) -> str:
        """Solver and evaluations asked for."""
        return f"{spec_of(self.planned.cell.solver)}, {self.planned.budget}"


@dataclass
class BudgetOutcome:
    """What was measured.

    Attributes:
        rows: those that are whole, in the order of the plan.
        networks: errors by time, of each SDE that a network was trained under.
        references: panel -> equation -> how far fine solutions are off, D.
    """

    plan: BudgetPlan
    folder: RunFolder
    store: CellStore
    rows: list[BudgetRow] = field(default_factory=list)
    networks: list[NetworkError] = field(default_factory=list)
    references: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def failed(self) -> list[BudgetRow]:
        """Rows without figures."""
        return [row for row in self.rows if row.status != OK]


class BudgetRows:
    """Rows from records, in the order of the plan."""

    def __init__(self, outcome: BudgetOutcome) -> None:
        self._outcome = outcome
        self._plan = outcome.plan
        self._records: dict[str, Record] = {}
        self._written = -math.inf
        self._tasks = [_RowTasks(outcome.plan, planned) for planned in outcome.plan.cells]

    def add(self, record: Record) -> None:
        """A task that is finished, or has failed."""
        self._records[record.key] = record
        if time.monotonic() - self._written > _REWRITE:
            self.write()

    def ok(self, task: BudgetTask | None) -> bool:
        """Whether a task is finished and has not failed."""
        return task is not None and self._records[task.key].status == OK

    def write(self) -> None:
        """Write results.json with the rows that are whole."""
        found = [self._row(tasks) for tasks in self._tasks]
        self._outcome.rows = [row for row in found if row is not None]
        self._outcome.folder.replace([_as_row(self._plan, row) for row in self._outcome.rows])
        self._written = time.monotonic()

    def records(self) -> list[Record]:
        """The cells of the rows that are whole, row after row."""
        return [self._records[k] for row in self._outcome.rows for k in row.cells]

    def finish(self) -> None:
        """Write all rows, and read what the network's errors are."""
        self.write()
        for tasks in self._tasks:
            self._note_reference(tasks)
        for sde in dict.fromkeys(tasks.planned.cell.sde for tasks in self._tasks):
            self._note_network([t for t in self._tasks if t.planned.cell.sde == sde])

    def _row(self, tasks: _RowTasks) -> BudgetRow | None:
        shared = [self._records.get(task.key) for task in tasks.shared]
        cells = [self._records.get(task.key) for task in tasks.cells]
        lost = any(record is not None and record.status != OK for record in shared)
        if not lost and (None in cells or None in shared):
            return None
        there = [record for record in cells if record is not None]
        bad = [r for r in (*shared, *there) if r is not None and r.status != OK]
        parts = {} if bad else _parts([r for r in (*shared, *cells) if r is not None])
        return BudgetRow(
            planned=tasks.planned,
            **sums(there),
            parts={name: parts[name] for name in ORDER if name in parts},
            total=parts.get("total"),
            floor=parts.get("floor"),
            cells=tuple(record.key for record in there),
            status=bad[0].status if bad else OK,
            error=bad[0].error if bad else "",
        )

    def _note_reference(self, tasks: _RowTasks) -> None:
        record = self._records.get(self._plan.fine_task(tasks.planned, 0).key)
        if record is None or "reference" not in record.metrics:
            return
        cell = tasks.planned.cell
        panel = cell.sde, str(cell.condition)
        off = math.sqrt(abs(record.metrics["reference"]))  # a tiny one is negative by chance
        self._outcome.references.setdefault(panel, {})[equation_of(cell.solver)] = off

    def _note_network(self, here: list[_RowTasks]) -> None:
        by_time = self._plan.by_time_task(here[0].planned)
        if by_time is None:
            return
        name, sde = self._plan.subject.name, by_time.sde
        stored = self._outcome.store.tensors(by_time.key) if self.ok(by_time) else None
        if stored is None:
            self._outcome.problems.append(f"{by_time}: {self._records[by_time.key].error}")
            return
        error = unpacked(stored["error"])
        lines = []
        for task in dict.fromkeys(self._plan.amplified_task(tasks.planned) for tasks in here):
            moved = self._moved(task)
            if task is not None and task.budget is not None and moved is not None:
                lines.append(amplified(task.solver, task.budget, moved[:-1], moved[-1], error))
        self._outcome.networks.append(
            NetworkError(name, sde, unpacked(stored["loss"]), error, tuple(lines))
        )

    def _moved(self, task: BudgetTask | None) -> tuple[float, ...] | None:
        if task is None or task.key not in self._records:
            return None
        if not self.ok(task):
            self._outcome.problems.append(f"{task}: {self._records[task.key].error}")
            return None
        stored = self._outcome.store.tensors(task.key)
        return None if stored is None else tuple(stored["moved"].tolist())


class _RowTasks:
    """The tasks that a row is made of."""

    def __init__(self, plan: BudgetPlan, planned: PlannedCell) -> None:
        repeats = range(plan.options.repeats)
        shared = [task(planned, r) for r in repeats for task in (plan.floor_task, plan.fine_task)]
        self.planned = planned
        self.shared = [task for task in shared if task is not None]
        self.cells = [plan.cell_task(planned, r) for r in repeats]


def _parts(records: list[Record]) -> dict[str, Part]:
    """Part by part, repeat by repeat."""
    squared: dict[str, dict[int, float]] = {}
    for record in records:
        for name, value in record.metrics.items():
            squared.setdefault(name, {})[record.repeat] = value
    return {name: Part(tuple(v for _, v in sorted(by.items()))) for name, by in squared.items()}


def part_figures(every: Mapping[str, Part]) -> dict[str, Any]:
    """What a row says of its parts beside their means."""
    return {
        "by_repeat": {name: part.squared for name, part in every.items()},
        "intervals": {name: t_interval(part.squared) for name, part in every.items()},
        "parts": {
            name: {"value": part.value, "interval": part.interval, "resolved": part.resolved}
            for name, part in every.items()
        },
    }


def _as_row(plan: BudgetPlan, found: BudgetRow) -> Row:
    """A row of results.json: parts squared as metrics, and rooted under ``parts``."""
    planned, options = found.planned, plan.options
    cell, condition = planned.cell, planned.cell.condition
    ends = {"total": found.total, "floor": found.floor}
    every = {**found.parts, **{name: part for name, part in ends.items() if part is not None}}
    extra: dict[str, Any] = {
        "budget": planned.budget,
        "spec": spec_of(cell.solver),
        "label": condition.label,
        "guided_by": condition.guided_by,
        "classes": condition.classes,
        "primary": plan.primary(planned),
        "truth": plan.truth(planned),
        "grid": options.grid or planned.subject.sdes[cell.sde].default_grid,
        "denoise": options.denoise,
        "seed": options.seed,
        "samples": plan.samples * options.repeats,
        "repeats": options.repeats,
        "depends_on_batch": getattr(cell.solver, "depends_on_batch", False),
        "peak_bytes": found.peak_bytes,
        "batch_size": found.batch_size,
        "cells": list(found.cells),
        **part_figures(every),
        "status": found.status,
        "error": found.error,
    }
    return Row(
        solver=name_of(type(cell.solver)),
        settings=settings_of(cell.solver),
        sde=cell.sde,
        target=plan.subject.name,
        guidance=condition.guidance,
        scale=condition.scale,
        steps=planned.steps,
        nfe=found.nfe,
        network_passes=found.network_passes,
        seconds=found.seconds,
        metrics={name: estimate(part.squared) for name, part in every.items()},
        extra=extra,
    )
