"""What changed between two runs, beyond noise.

Rows are matched by what they are of. Where both runs hold a repeat's records with the same seed, it
started from the same noise and met the same true samples, so the difference is taken repeat by
repeat; otherwise as of independent means (Welch 1947). Intervals are Student's, 95 %. Which of many
differences are beyond noise is decided by Benjamini and Hochberg 1995, so that at most 5 % of those
named are expected to be none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student

from experiments.records import OK, Record
from experiments.runs import Identity, Run, identity

Fact = tuple[Identity, str, str, str]
RATE = 0.05  # false among those named; 1 - RATE: of the intervals
ROUNDING = 1e-6  # relative: sums in another order, on another processor
# What must agree for two figures of one name to mean the same.
_SIZES = ("samples", "truth", "primary", "denoise")
_PAIRED = "rms"  # beside a target's primary metric: far less noisy, and of ODE solvers only
# Where a run was put and how it was computed: no difference between what it says.
_PLACES = {"out", "jobs", "scheduler", "force", "cell_timeout"}


@dataclass(frozen=True)
class Change:
    """B minus A in one metric of one row.

    Attributes:
        what: the row.
        metric: its name.
        a, b: the figures.
        difference: b - a.
        low, high: 95 % interval of it; None where a single repeat says nothing of the noise.
        p: of a difference as large by noise alone; None as above.
        repeats: pairs of repeats; 0: not paired.
        beyond: whether it is beyond noise.
    """

    what: Identity
    metric: str
    a: float
    b: float
    difference: float
    low: float | None
    high: float | None
    p: float | None
    repeats: int
    beyond: bool = False


@dataclass(frozen=True)
class Differences:
    """Everything in which B differs from A.

    Attributes:
        changes: one for each row and metric that both have, the surest first.
        facts: what changed without noise in it: (row, what, in A, in B).
        incomparable: rows that were judged differently, and how.
        only_a, only_b: rows of one run.
        settings: (key, in A, in B) of configuration and environment.
    """

    changes: list[Change]
    facts: list[Fact]
    incomparable: list[tuple[Identity, str]]
    only_a: list[Identity]
    only_b: list[Identity]
    settings: list[tuple[str, str, str]]

    @property
    def changed(self) -> bool:
        """Whether a figure, a count of evaluations or a status changed, beyond noise."""
        return bool(self.facts) or any(change.beyond for change in self.changes)


def differences(a: Run, b: Run) -> Differences:
    """Compare two runs, row by row.

    Raises:
        ValueError: they are of different experiments, or of neither compare nor steps.
    """
    kinds = [str(run.results.get("experiment")) for run in (a, b)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"{str(a.path)!r} is a run of {kinds[0]} and {str(b.path)!r} one of {kinds[1]}; "
            "name two runs of one command"
        )
    rows_a = {identity(row): row for row in a.rows}
    rows_b = {identity(row): row for row in b.rows}
    changes: list[Change] = []
    facts: list[Fact] = []
    incomparable: list[tuple[Identity, str]] = []
    for what in rows_a:
        if what not in rows_b:
            continue
        row_a, row_b = rows_a[what], rows_b[what]
        facts += _facts(what, row_a, row_b)
        unlike = _unlike(row_a, row_b)
        if unlike:
            incomparable.append((what, unlike))
            continue
        changes += _changes(what, row_a, row_b, a.cells_of(row_a), b.cells_of(row_b))
    return Differences(
        changes=sorted(_judged(changes), key=_surest),
        facts=facts,
        incomparable=incomparable,
        only_a=[what for what in rows_a if what not in rows_b],
        only_b=[what for what in rows_b if what not in rows_a],
        settings=_settings(a.results, b.results),
    )


def _facts(what: Identity, a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Fact]:
    found: list[Fact] = []
    status = a.get("status", OK), b.get("status", OK)
    if status[0] != status[1]:
        found.append((what, "status", str(status[0]), str(status[1])))
    elif status[0] == OK:
        for name in ("nfe", "network_passes"):
            # An adaptive solver's evaluations are a mean over samples, and have noise.
            if a["steps"] is not None and not math.isclose(a[name], b[name], rel_tol=ROUNDING):
                found.append((what, name, f"{a[name]:g}", f"{b[name]:g}"))
    for name in sorted({*a["settings"], *b["settings"]}):
        values = a["settings"].get(name), b["settings"].get(name)
        if values[0] != values[1]:
            found.append((what, f"setting {name}", str(values[0]), str(values[1])))
    return found


def _unlike(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    sizes = [dict(row) for row in (a, b)]
    for row in sizes:  # in a repeat: all figures are of repeats
        if row.get("samples"):
            row["samples"] = row["samples"] // row.get("repeats", 1)
    unlike = [name for name in _SIZES if sizes[0].get(name) != sizes[1].get(name)]
    return "; ".join(f"{name} {sizes[0].get(name)} and {sizes[1].get(name)}" for name in unlike)


def _changes(
    what: Identity,
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    cells_a: Sequence[Record],
    cells_b: Sequence[Record],
) -> list[Change]:
    found = []
    primary = a.get("primary")
    for name, one in a["metrics"].items():
        other = b["metrics"].get(name)
        if primary and name not in (primary, _PAIRED):
            continue
        if other is None or one["value"] is None or other["value"] is None:
            continue
        pairs = _pairs(name, cells_a, cells_b)
        if len(pairs) > 1 or (pairs and len(pairs) == len(cells_a) == len(cells_b)):
            found.append(_paired(what, name, pairs))
        else:
            counts = int(a.get("repeats") or 0), int(b.get("repeats") or 0)
            found.append(_independent(what, name, one, other, counts))
    return found


def _pairs(
    name: str, cells_a: Sequence[Record], cells_b: Sequence[Record]
) -> list[tuple[float, float]]:
    """Figures of the repeats that started from the same noise."""
    values = [
        {(cell.seed, cell.repeat): cell.metrics[name] for cell in cells if name in cell.metrics}
        for cells in (cells_a, cells_b)
    ]
    return [(values[0][key], values[1][key]) for key in sorted(values[0]) if key in values[1]]


def _paired(what: Identity, name: str, pairs: Sequence[tuple[float, float]]) -> Change:
    a, b = np.asarray(pairs, dtype=np.float64).T
    d = b - a
    count = len(d)
    mean = float(d.mean())
    spread = float(d.std(ddof=1) / math.sqrt(count)) if count > 1 else None
    return _change(what, name, float(a.mean()), float(b.mean()), mean, spread, count - 1, count)


def _independent(
    what: Identity,
    name: str,
    a: Mapping[str, float],
    b: Mapping[str, float],
    repeats: tuple[int, int],
) -> Change:
    squares = [(found.get("stderr") or 0.0) ** 2 for found in (a, b)]
    known = all(found.get("stderr") is not None for found in (a, b)) and min(repeats) > 1
    total = sum(squares)
    freedom = 1.0
    if known and total > 0:  # Welch 1947, eq. (28)
        parts = (s**2 / (n - 1) for s, n in zip(squares, repeats, strict=True))
        freedom = total**2 / sum(parts)
    difference = b["value"] - a["value"]
    spread = math.sqrt(total) if known else None
    return _change(what, name, a["value"], b["value"], difference, spread, freedom, 0)


def _change(
    what: Identity,
    name: str,
    a: float,
    b: float,
    difference: float,
    stderr: float | None,
    freedom: float,
    pairs: int,
) -> Change:
    if abs(difference) <= ROUNDING * max(abs(a), abs(b)):
        return Change(what, name, a, b, difference, difference, difference, 1.0, pairs)
    if stderr is None:
        return Change(what, name, a, b, difference, None, None, None, pairs)
    reach = float(student.ppf(1 - RATE / 2, freedom)) * stderr
    p = 2 * float(student.sf(abs(difference) / stderr, freedom)) if stderr > 0 else 0.0
    low, high = difference - reach, difference + reach
    return Change(what, name, a, b, difference, low, high, p, pairs)


def _judged(changes: Sequence[Change]) -> list[Change]:
    """Which are beyond noise: Benjamini and Hochberg 1995, procedure (1)."""
    known = sorted(change.p for change in changes if change.p is not None)
    limit = max(
        (p for k, p in enumerate(known, 1) if p <= RATE * k / len(known)),
        default=-1.0,
    )
    return [
        Change(**{**vars(change), "beyond": change.p is not None and change.p <= limit})
        for change in changes
    ]


def _surest(change: Change) -> tuple[bool, float, float]:
    p = 2.0 if change.p is None else change.p
    relative = abs(change.difference) / max(abs(change.a), abs(change.b), 1e-300)
    return not change.beyond, p, -relative


def _settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    flat = [
        {**_flat("config", run.get("config", {})), **_flat("environment", run["environment"])}
        for run in (a, b)
    ]
    keys = [*flat[0], *(key for key in flat[1] if key not in flat[0])]
    return [
        (key, str(flat[0].get(key, "·")), str(flat[1].get(key, "·")))
        for key in keys
        if flat[0].get(key) != flat[1].get(key) and key.partition(".")[2] not in _PLACES
    ]


def _flat(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        found: dict[str, Any] = {}
        for key, item in value.items():
            found |= _flat(f"{name}.{key}", item)
        return found
    return {name: value}
