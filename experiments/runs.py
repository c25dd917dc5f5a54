"""A run as other commands read it: results.json, and the records of its cells by key."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.conditions import interval_name
from experiments.records import OK, Record
from experiments.results import load_results
from experiments.store import CellStore

Identity = tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    Attributes:
        path: the folder.
        results: as `load_results` reads it.
        records: key -> record, of every cell, fine solution and floor in the folder; empty where
            only a results.json is left, or an older program wrote it.
    """

    path: Path
    results: Mapping[str, Any]
    records: Mapping[str, Record]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of results.json."""
        return list(self.results["rows"])

    def cells_of(self, row: Mapping[str, Any]) -> list[Record]:
        """The finished repeats of a row, in its order; empty where they are not at hand."""
        found = [self.records.get(key) for key in row.get("cells", ())]
        return [record for record in found if record is not None and record.status == OK]


def load_run(path: str | os.PathLike[str]) -> Run:
    """A run folder of ``compare`` or ``steps``, or its results.json.

    Raises:
        ValueError: there is none, it is damaged, or it is newer than this program.
    """
    results = load_results(path)
    given = Path(path).expanduser()
    folder = given if given.is_dir() else given.parent
    return Run(folder, results, {record.key: record for record in CellStore(folder).all()})


def identity(row: Mapping[str, Any]) -> Identity:
    """What a row is of, in words: target, SDE, sampler, evaluations asked for, guidance, class.

    Two runs' rows with one identity are compared, whatever their seeds, sizes and versions.
    """
    budget = row.get("budget")
    if budget is not None:
        count = f"NFE {budget}"
    else:
        count = "own steps" if row["steps"] is None else f"{row['steps']} steps"
    scale = "" if row["scale"] is None else f" γ={row['scale']:g}"
    interval = row.get("interval")
    where = "" if interval is None else f" in {interval_name(interval)}"
    guidance = "" if row["guidance"] == "none" else f"{row['guidance']}{scale}{where}"
    label = row.get("label")
    return (
        str(row["target"]),
        str(row["sde"]),
        sampler(row),
        count,
        guidance,
        "" if label is None else "all classes" if label == "all" else f"class {label}",
    )


def sampler(row: Mapping[str, Any]) -> str:
    """A row's solver as typed."""
    if row.get("spec"):
        return str(row["spec"])
    settings = ",".join(f"{name}={value}" for name, value in sorted(row["settings"].items()))
    return f"{row['solver']}:{settings}" if settings else str(row["solver"])


def in_words(what: Identity) -> str:
    """An identity on one line."""
    return " · ".join(part for part in what if part)
