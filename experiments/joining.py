"""Rows of one sampler under one condition, from several runs, as one row of all their repeats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor

from experiments.budget_parts import Part
from experiments.budget_rows import part_figures
from experiments.estimates import estimate
from experiments.intervals import PairedBootstrap
from experiments.records import OK, Record
from experiments.results import plain
from experiments.rows import estimates, repeat_figures, sums
from experiments.runs import identity, in_words

Row = Mapping[str, Any]


class Cells(Protocol):
    """The cells of all runs."""

    @property
    def records(self) -> Mapping[str, Record]:
        """By key."""

    def tensors(self, key: str) -> Mapping[str, Tensor] | None:
        """What is stored beside a record."""


def joined(rows: Sequence[Row], cells: Cells) -> dict[str, Any]:
    """Rows of ``compare`` or ``guidance`` as one.

    Raises:
        ValueError: they hold the same repeats under different keys.
    """
    records = _repeats(rows, cells.records)
    bad = [record for record in records if record.status != OK]
    by_key = _by_key(rows, "floor_by_repeat")
    floors = [by_key[record.key] for record in records if record.key in by_key]
    floor: Any = max(rows, key=lambda row: int(row["repeats"]))["floor"]
    if len(floors) == len(records):
        floor = {name: found._asdict() for name, found in estimates(floors).items()}
    else:
        floors = []
    row = _taken_together(rows, records, bad[0].status if bad else OK, bad[0].error if bad else "")
    if bad:
        figures: dict[str, Any] = {"by_repeat": {}, "floor_by_repeat": {}, "intervals": {}}
        return row | figures | {"metrics": {}, "floor": plain(floor), "seconds_interval": None}
    names = [name for name in records[0].metrics if all(name in r.metrics for r in records)]
    records = [replace(r, metrics={name: r.metrics[name] for name in names}) for r in records]
    bootstrap = PairedBootstrap(records[0].seed)
    metrics = {n: e._asdict() for n, e in estimates([r.metrics for r in records]).items()}
    more = repeat_figures(records, floors, cells.tensors, bootstrap)
    merged: dict[str, Any] = plain({**row, **more, "metrics": metrics, "floor": floor})
    return merged


def joined_budgets(rows: Sequence[Row], cells: Cells) -> dict[str, Any]:
    """Rows of ``error-budget`` as one, from what they say of each repeat: parts rest on more than
    a repeat's cell.

    Raises:
        ValueError: as `joined`.
    """
    records = _repeats(rows, cells.records)
    squares = _by_key([row for row in rows if row["status"] == OK], "by_repeat")
    every: dict[str, Part] = {}
    status, error = OK, ""
    if records and all(record.key in squares for record in records):
        found = [squares[record.key] for record in records]
        names = [name for name in found[0] if all(name in one for one in found)]
        every = {name: Part(tuple(one[name] for one in found)) for name in names}
    else:
        failed = next(row for row in rows if row["status"] != OK)
        status, error = failed["status"], failed["error"]
    metrics = {name: estimate(part.squared)._asdict() for name, part in every.items()}
    row = _taken_together(rows, records, status, error)
    merged: dict[str, Any] = plain({**row, **part_figures(every), "metrics": metrics})
    return merged


def _repeats(rows: Sequence[Row], records: Mapping[str, Record]) -> list[Record]:
    """The rows' cells, each once."""
    keys = dict.fromkeys(key for row in rows for key in row["cells"])
    found = sorted((records[key] for key in keys), key=lambda cell: (cell.seed, cell.repeat))
    if len({(cell.seed, cell.repeat) for cell in found}) < len(found):
        raise ValueError(
            f"{in_words(identity(rows[0]))}: both runs hold the same repeats under different keys, "
            "so that the solver, its target or the program changed between them; compare them: "
            "sde-diffusion diff"
        )
    return found


def _by_key(rows: Sequence[Row], name: str) -> dict[str, dict[str, float]]:
    """What rows say of each repeat, by its cell."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        for figure, values in (row.get(name) or {}).items():
            if len(values) == len(row["cells"]):
                for key, value in zip(row["cells"], values, strict=True):
                    found.setdefault(key, {})[figure] = value
    return found


def _taken_together(
    rows: Sequence[Row], records: Sequence[Record], status: str, error: str
) -> dict[str, Any]:
    """The first row with the counts of all."""
    known = bool(records)  # where what cells rest on had failed, there may be none
    return {
        **rows[0],
        **sums(records),
        "samples": sum(record.samples for record in records) if known else rows[0]["samples"],
        "repeats": len(records) if known else rows[0]["repeats"],
        "cells": [record.key for record in records],
        "status": status,
        "error": error,
    }
