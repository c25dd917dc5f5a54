"""Two runs in one folder: the union of their cells.

A cell that both hold, by its key, must have the same figures in both; rows of one sampler under one
condition become one row of all repeats.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.estimates import estimate
from experiments.folders import prepare_out
from experiments.records import OK, Record
from experiments.resolving import ranked
from experiments.results import RESULTS, SCHEMA_VERSION, plain, write_whole
from experiments.runs import Identity, Run, identity, in_words
from experiments.store import CellStore

ROUNDING = 1e-5  # relative: single precision, on another processor
_NAMED = 5  # conflicts that are named


def merge(a: Run, b: Run, out: str, command: str) -> Path:
    """Write the union of two runs of ``compare`` to a folder; returns it.

    Args:
        command: the command line, for results.json.

    Raises:
        ValueError: a run without cells, cells of one key with different figures, repeats that were
            computed by different programs, or ``out`` holds something else. Nothing was written.
    """
    for run in (a, b):
        if run.results.get("experiment") != "compare" or not run.records:
            raise ValueError(
                f"{str(run.path)!r} has no cells to merge: it is not a run of compare, or an older "
                "program's; run the comparison again"
            )
        if Path(out).expanduser().resolve() == run.path.resolve():
            raise ValueError(f"--out {out!r} is one of the runs; name another folder")
    records = _union(a, b)
    rows = ranked(_rows(a, b, records))  # a column may have more rows than it had in either
    path = prepare_out(out)
    store = CellStore(path)
    for key, record in records.items():
        source = a if a.records.get(key) == record else b
        store.put(record, CellStore(source.path).tensors(key))
    store.write_table([records[key] for row in rows for key in row["cells"]])
    write_whole(
        path / RESULTS,
        json.dumps(_results(a, b, rows, command), indent=1, ensure_ascii=False, allow_nan=False)
        + "\n",
    )
    return path


def _union(a: Run, b: Run) -> dict[str, Record]:
    found = dict(a.records)
    conflicts = []
    for key, record in b.records.items():
        other = found.get(key)
        if other is None or other.status != OK:
            found[key] = record
        elif record.status == OK and not _agree(other, record):
            conflicts.append(f"{_name(record)} ({key})")
    if conflicts:
        more = f" and {len(conflicts) - _NAMED} more" if len(conflicts) > _NAMED else ""
        raise ValueError(
            f"{len(conflicts)} cells of one key have different figures in {str(a.path)!r} and "
            f"{str(b.path)!r}: {'; '.join(conflicts[:_NAMED])}{more}; see sde-diffusion diff, and "
            "compute one of the runs again with --force"
        )
    return found


def _agree(a: Record, b: Record) -> bool:
    """Whether all that the key determines is the same, to rounding."""
    pairs = [(a.nfe, b.nfe), (a.network_passes, b.network_passes)]
    pairs += [(a.metrics.get(name), b.metrics.get(name)) for name in {*a.metrics, *b.metrics}]
    return all(
        x == y if x is None or y is None else math.isclose(x, y, rel_tol=ROUNDING) for x, y in pairs
    )


def _name(record: Record) -> str:
    count = "own steps" if record.budget is None else f"NFE {record.budget}"
    return f"{record.target} · {record.sde} · {record.spec} · {count} · repeat {record.repeat}"


def _rows(a: Run, b: Run, records: Mapping[str, Record]) -> list[dict[str, Any]]:
    """A's rows, then those that only B has, each with all repeats of either."""
    alike: dict[Identity, list[dict[str, Any]]] = {}
    for row in (*a.rows, *b.rows):
        alike.setdefault(_identity(row), []).append(row)
    return [rows[0] if _one(rows) else _joined(rows, records) for rows in alike.values()]


def _identity(row: Mapping[str, Any]) -> Identity:
    """Of rows whose repeats may be taken together."""
    size = row["samples"] // row["repeats"]
    return (*identity(row), str(row["grid"]), str(row["denoise"]), f"{size} samples")


def _one(rows: Sequence[Mapping[str, Any]]) -> bool:
    return len(rows) == 1 or (rows[0]["cells"] == rows[1]["cells"] and rows[0]["status"] == OK)


def _joined(rows: Sequence[Mapping[str, Any]], records: Mapping[str, Record]) -> dict[str, Any]:
    keys = list(dict.fromkeys(key for row in rows for key in row["cells"]))
    cells = sorted((records[key] for key in keys), key=lambda cell: (cell.seed, cell.repeat))
    where = {(cell.seed, cell.repeat) for cell in cells}
    if len(where) < len(cells):
        raise ValueError(
            f"{in_words(identity(rows[0]))}: both runs hold the same repeats under different keys, "
            "so that the solver, its target or the program changed between them; compare them: "
            "sde-diffusion diff"
        )
    bad = [cell for cell in cells if cell.status != OK]
    count = len(cells)
    names = [name for name in cells[0].metrics if all(name in cell.metrics for cell in cells)]
    metrics = {} if bad else {n: estimate(cell.metrics[n] for cell in cells) for n in names}
    largest = max(rows, key=lambda row: int(row["repeats"]))
    merged = {
        **rows[0],
        "nfe": sum(cell.nfe or 0.0 for cell in cells) / count,
        "network_passes": sum(cell.network_passes or 0.0 for cell in cells) / count,
        "seconds": sum(cell.seconds or 0.0 for cell in cells),
        "metrics": {name: found._asdict() for name, found in metrics.items()},
        "floor": largest["floor"],
        "samples": sum(cell.samples for cell in cells),
        "repeats": count,
        "peak_bytes": max((cell.peak_bytes or 0 for cell in cells), default=0) or None,
        "batch_size": min((cell.batch_size or 0 for cell in cells), default=0) or None,
        "cells": [cell.key for cell in cells],
        "status": bad[0].status if bad else OK,
        "error": bad[0].error if bad else "",
    }
    row: dict[str, Any] = plain(merged)
    return row


def _results(a: Run, b: Run, rows: Sequence[dict[str, Any]], command: str) -> dict[str, Any]:
    """results.json: A's environment at the top, both runs' in ``config.merged``."""
    head = ("command", "started", "status", "config", "environment")
    merged = [{"path": str(run.path), **{key: run.results[key] for key in head}} for run in (a, b)]
    return {
        "schema_version": SCHEMA_VERSION,
        "experiment": "compare",
        "command": command,
        "started": max(str(run.results["started"]) for run in (a, b)),
        "config": {"merged": merged},
        "environment": a.results["environment"],
        "status": "finished",
        "floor": {**b.results["floor"], **a.results["floor"]},
        "rows": list(rows),
    }
