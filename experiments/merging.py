"""Two runs in one folder: the union of their cells.

A cell that both hold, by its key, must have the same figures in both; rows of one sampler under one
condition become one row of all repeats.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from experiments.folders import prepare_out
from experiments.guidance_lines import lines_of, with_breaks
from experiments.joining import joined, joined_budgets
from experiments.records import OK, Record
from experiments.resolving import ranked
from experiments.results import RESULTS, SCHEMA_VERSION, plain, write_whole
from experiments.runs import Identity, Run, identity
from experiments.store import CellStore

MERGED = ("compare", "guidance", "error-budget")
ROUNDING = 1e-5  # relative: single precision, on another processor
_NAMED = 5  # conflicts that are named


@dataclass(frozen=True)
class _Both:
    """The cells of both runs; of a key that both hold, the finished one."""

    a: Run
    b: Run
    records: Mapping[str, Record]

    def get(self, key: str) -> Record | None:
        record = self.records.get(key)
        return record if record is not None and record.status == OK else None

    def tensors(self, key: str) -> dict[str, Tensor] | None:
        run = self.a if self.a.records.get(key) == self.records[key] else self.b
        return CellStore(run.path).tensors(key)


def merge(a: Run, b: Run, out: str, command: str) -> Path:
    """Write the union of two runs of one command to a folder; returns it.

    Args:
        command: the command line, for results.json.

    Raises:
        ValueError: runs that cannot be merged, a run without cells, cells of one key with different
            figures, repeats that were computed by different programs, or ``out`` holds something
            else. Nothing was written.
    """
    _check(a, b, out)
    cells = _Both(a, b, _union(a, b))
    experiment = a.results["experiment"]
    if experiment == "error-budget":
        rows = _rows(a, b, cells, joined_budgets)
    else:
        rows = ranked(_rows(a, b, cells, joined))  # a column may have more rows than in either
    if experiment == "guidance":
        rows = _with_breaks(rows, a, b, cells)
    path = prepare_out(out)
    store = CellStore(path)
    for key, record in cells.records.items():
        store.put(record, cells.tensors(key))
    store.write_table([cells.records[key] for row in rows for key in row["cells"]])
    write_whole(
        path / RESULTS,
        json.dumps(_results(a, b, rows, command), indent=1, ensure_ascii=False, allow_nan=False)
        + "\n",
    )
    return path


def _check(a: Run, b: Run, out: str) -> None:
    for run in (a, b):
        experiment = run.results.get("experiment")
        if experiment not in MERGED:
            raise ValueError(
                f"{str(run.path)!r} is a run of {experiment}, which has no cells to merge; name "
                f"two runs of {', '.join(MERGED[:-1])} or {MERGED[-1]}"
            )
        if not run.records:
            raise ValueError(
                f"{str(run.path)!r} has no cells to merge: an older program wrote it; run it again"
            )
        if Path(out).expanduser().resolve() == run.path.resolve():
            raise ValueError(f"--out {out!r} is one of the runs; name another folder")
        if experiment == "error-budget" and any(map(_deals_data, _configs(run))):
            raise ValueError(
                f"{str(run.path)!r} is of a network whose target is not known: its real data is "
                "dealt out among the repeats, so that each repeat depends on how many there are, "
                "and repeats of two runs cannot be taken together; run once with more --repeats"
            )
    kinds = [run.results["experiment"] for run in (a, b)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"{str(a.path)!r} is a run of {kinds[0]} and {str(b.path)!r} one of {kinds[1]}: their "
            "rows are of different kinds; name two runs of one command"
        )
    tolerances = sorted({c["tolerance"] for run in (a, b) for c in _configs(run) if _breaks(c)})
    if len(tolerances) > 1:
        raise ValueError(
            f"--tolerance is {tolerances[0]:g} in one run and {tolerances[1]:g} in another, and "
            "where solvers break rests on it; run one of them again with the other's: its cells "
            "are not computed again"
        )


def _configs(run: Run) -> list[Mapping[str, Any]]:
    """Of the runs that a run was merged from; of another its own."""
    return _leaves(run.results["config"])


def _leaves(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if "merged" not in config:
        return [config]
    return [leaf for source in config["merged"] for leaf in _leaves(source["config"])]


def _deals_data(config: Mapping[str, Any]) -> bool:
    return bool(config.get("models")) and not config.get("targets")


def _breaks(config: Mapping[str, Any]) -> bool:
    return "tolerance" in config


def _with_breaks(
    rows: Sequence[Mapping[str, Any]], a: Run, b: Run, cells: _Both
) -> list[dict[str, Any]]:
    """Where solvers break on scales that may come from either run."""
    compared = {
        row["spec"]
        for row in (*a.rows, *b.rows)
        if row.get("breaks_at") is not None or "relative" in row["metrics"]
    }
    lines = lines_of(
        rows,
        cells,
        tolerance=_configs(a)[0]["tolerance"],
        seed=rows[0]["seed"],
        noisy={row["spec"] for row in rows} - compared,
    )
    found: list[dict[str, Any]] = plain(with_breaks(rows, lines))
    return found


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


def _rows(
    a: Run,
    b: Run,
    cells: _Both,
    join: Callable[[Sequence[Mapping[str, Any]], _Both], dict[str, Any]],
) -> list[dict[str, Any]]:
    """A's rows, then those that only B has, each with all repeats of either."""
    alike: dict[Identity, list[dict[str, Any]]] = {}
    for row in (*a.rows, *b.rows):
        alike.setdefault(_identity(row), []).append(row)
    return [rows[0] if _one(rows) else join(rows, cells) for rows in alike.values()]


def _identity(row: Mapping[str, Any]) -> Identity:
    """Of rows whose repeats may be taken together."""
    size = row["samples"] // row["repeats"]
    return (*identity(row), str(row["grid"]), str(row["denoise"]), f"{size} samples")


def _one(rows: Sequence[Mapping[str, Any]]) -> bool:
    return len(rows) == 1 or (rows[0]["cells"] == rows[1]["cells"] and rows[0]["status"] == OK)


def _results(a: Run, b: Run, rows: Sequence[dict[str, Any]], command: str) -> dict[str, Any]:
    """results.json: A's environment at the top, both runs' in ``config.merged``."""
    head = ("command", "started", "status", "config", "environment")
    merged = [{"path": str(run.path), **{key: run.results[key] for key in head}} for run in (a, b)]
    return {
        "schema_version": SCHEMA_VERSION,
        "experiment": a.results["experiment"],
        "command": command,
        "started": max(str(run.results["started"]) for run in (a, b)),
        "config": {"merged": merged},
        "environment": a.results["environment"],
        "status": "finished",
        "floor": {**b.results["floor"], **a.results["floor"]},
        "rows": list(rows),
    }
