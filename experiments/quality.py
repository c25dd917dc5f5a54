"""What a row of results.json says of its sampler: its quality, what that cost, and of what law."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.metrics import METRICS

Row = Mapping[str, Any]
Rows = Sequence[Row]
Interval = tuple[float, float]
Law = tuple[str, str, str]
SDE_TITLES = {
    "vp": "VP",
    "ve": "VE",
    "sub_vp": "sub-VP",
    "subvp": "sub-VP",
    "cosine": "cosine VP",
    "edm": "EDM",
    "tabulatedvp": "DDPM chain",
}
_PREFERRED = ("frechet", "energy", "sliced_w2", "w2", "rms")
_REACH = 2.0  # standard errors, for rows without intervals


def primary_of(row: Row, rows: Rows = ()) -> str:
    """The metric that stands for a row's quality; of older rows, what their target has."""
    return str(row.get("primary") or primary_metric(rows, row["target"]) or "")


def primary_metric(rows: Rows, target: str) -> str | None:
    """The metric that stands for a target's quality."""
    present = {name for row in rows if row["target"] == target for name in row["metrics"]}
    for name in (*_PREFERRED, *sorted(present)):
        if name in present:
            return name
    return None


def figure_of(row: Row, metric: str | None) -> float | None:
    """A row's finite figure, or None."""
    found = (row.get("metrics") or {}).get(metric or "")
    value = None if found is None else found["value"]
    return float(value) if value is not None and math.isfinite(value) else None


def interval_of(row: Row, metric: str) -> Interval | None:
    """The row's own 95 % interval, else two standard errors to either side, else None."""
    own = (row.get("intervals") or {}).get(metric)
    if own is not None and own[0] is not None and own[1] is not None:
        return float(own[0]), float(own[1])
    value, found = figure_of(row, metric), row["metrics"].get(metric) or {}
    if value is None or found.get("stderr") is None:
        return None
    reach = _REACH * float(found["stderr"])
    return value - reach, value + reach


def sign_of(metric: str) -> int:
    """1 where lower is better, -1 where higher is."""
    return 1 if metric not in METRICS or METRICS[metric].lower_is_better else -1


def seconds_of(row: Row) -> float:
    """Seconds of sampling for 1,000 samples: rows may have different numbers of them."""
    return float(row["seconds"]) * 1000 / (row.get("samples") or 1000)


def sde_title(sde: str) -> str:
    """An SDE's name for a reader."""
    return SDE_TITLES.get(sde, sde)


def law_of(row: Row) -> Law:
    """Target, guidance in words where there is one, and what the row is compared with.

    Samples of different laws have no best among them.
    """
    guided = str(row.get("guided_by", "unguided"))
    classes = str(row.get("classes") or "")
    words = [] if guided == "unguided" else [guided]
    if classes and classes != "all classes in turn":
        words.append(classes)
    return str(row["target"]), ", ".join(words), str(row.get("truth", ""))
