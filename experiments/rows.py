"""Rows of a comparison: the repeats of a cell taken together, written as they become whole."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from experiments.cells import Task
from experiments.computing import Progress
from experiments.costs import Costs
from experiments.estimates import Estimate, estimate
from experiments.intervals import LEVEL, PairedBootstrap, error_at_look, t_interval
from experiments.planning import (
    Plan,
    PlannedCell,
)
from experiments.records import OK, Record
from experiments.resolving import (
    Column,
    by_repeat,
    row_intervals,
    with_ranks,
)
from experiments.results import Row, RunFolder
from experiments.spec import spec_of
from experiments.store import CellStore
from experiments.work import Done
from solvers.catalogue import name_of, settings_of

_REWRITE = 1.0  # seconds between two writes of results.json, at least
_SHARE = 0.02  # of the run's time that writes may take


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


class Rows:
    """Rows from records, in the order of the plan, written as they become whole."""

    def __init__(self, outcome: Outcome) -> None:
        self._outcome = outcome
        self._records: dict[str, Record] = {}
        self._rows: dict[int, Row] = {}
        self._due = -math.inf  # when results.json is to be written again
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
            if time.monotonic() > self._due:
                self.write()

    def write(self) -> None:
        """Write results.json with the rows that are whole."""
        began = time.monotonic()
        plan = self._outcome.plan
        order = sorted(self._rows)
        self._outcome.finished = [plan.cells[i] for i in order]
        self._outcome.folder.replace(with_ranks([self._rows[i] for i in order], self._error))
        now = time.monotonic()
        self._due = now + max(_REWRITE, (now - began) / _SHARE)

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
        floor = estimates(floors)
        self._outcome.folder.floor.setdefault(planned.subject.name, floor)
        row = make_row(plan, planned, records, floor)
        if row.metrics:
            tensors_of = self._outcome.store.tensors
            more = repeat_figures(records, floors, tensors_of, self._bootstrap)
            row = replace(row, extra={**row.extra, **more})
        return row


def repeat_figures(
    records: Sequence[Record],
    floors: Sequence[Mapping[str, float]],
    tensors_of: Callable[[str], Mapping[str, Tensor] | None],
    bootstrap: PairedBootstrap,
) -> dict[str, Any]:
    """What a row says of its repeats beside their means: figures one by one, and intervals.

    Args:
        records: its cells, all finished.
        floors: what true samples score, repeat by repeat; empty: not known.
        tensors_of: what is stored beside a record, by its key.
    """
    values, floor = by_repeat([record.metrics for record in records]), by_repeat(floors)
    kept = [tensors_of(record.key) or {} for record in records] if "rms" in values else []
    distances = [one["distance"].numpy() for one in kept if "distance" in one]
    if len(distances) < len(records):
        distances = []
    seconds = t_interval([record.seconds or 0.0 for record in records])
    total = None if seconds is None else [max(0.0, len(records) * end) for end in seconds]
    return {
        "by_repeat": values,
        "floor_by_repeat": floor,
        "intervals": row_intervals(values, floor, distances, bootstrap),
        "seconds_interval": total,
    }


def sums(records: Sequence[Record]) -> dict[str, Any]:
    """What a row says of its cells, whatever they measured."""
    count = max(1, len(records))
    return {
        "nfe": sum(record.nfe or 0.0 for record in records) / count,
        "network_passes": sum(record.network_passes or 0.0 for record in records) / count,
        "seconds": sum(record.seconds or 0.0 for record in records),
        "peak_bytes": max((record.peak_bytes or 0 for record in records), default=0) or None,
        "batch_size": min((record.batch_size or 0 for record in records), default=0) or None,
    }


def _floors(outcome: Outcome, planned: PlannedCell) -> list[Mapping[str, float]]:
    """What true samples score, repeat by repeat, as far as there are any."""
    plan, found = outcome.plan, []
    for repeat in range(plan.repeats_of(planned)):
        record = outcome.store.get(plan.floor_task(planned, repeat).key)
        if record is not None and record.metrics:
            found.append(record.metrics)
    return found


def estimates(metrics: Sequence[Mapping[str, float]]) -> dict[str, Estimate]:
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
    count, costs = len(records), sums(records)
    return Row(
        solver=name_of(type(cell.solver)),
        settings=settings_of(cell.solver),
        sde=cell.sde,
        target=planned.subject.name,
        guidance=cell.condition.guidance,
        scale=cell.condition.scale,
        steps=planned.steps,
        nfe=costs["nfe"],
        network_passes=costs["network_passes"],
        seconds=costs["seconds"],
        metrics={} if failed else estimates([record.metrics for record in records]),
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
            "peak_bytes": costs["peak_bytes"],
            "batch_size": costs["batch_size"],
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
