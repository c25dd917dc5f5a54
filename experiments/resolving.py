"""What the repeats of a comparison can tell: intervals of rows, ranks in a column, more repeats.

A column is what a reader compares: the same target, SDE, guidance and number of evaluations, one
row for each solver. Rows of a column meet the same noise and the same true samples, repeat by
repeat.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from experiments.intervals import (
    LEVEL,
    Interval,
    PairedBootstrap,
    paired_difference,
    rank_ranges,
    t_interval,
)
from experiments.metrics import METRICS
from experiments.records import OK
from experiments.results import Row, plain

ABOVE_FLOOR = "_above_floor"
GROWTH = 1.5  # repeats at a look, times those at the look before
MAX_REPEATS = 30  # of --until-resolved, where no budget is named
_BY_SAMPLE = ("rms", "median")

Column = tuple[str, str, str, int | None]
ByRepeat = Mapping[str, Sequence[float]]


def by_repeat(metrics: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Name -> one value for each repeat; NaN where a repeat lacks it."""
    names = metrics[0] if metrics else {}
    return {
        name: [math.nan if (v := one.get(name)) is None else v for one in metrics] for name in names
    }


def row_intervals(
    values: ByRepeat,
    floor: ByRepeat,
    distances: Sequence[np.ndarray],
    bootstrap: PairedBootstrap,
) -> dict[str, Interval | None]:
    """Of every figure, and of what is above the floor (``energy_above_floor``).

    Args:
        values, floor: as from `by_repeat`.
        distances: of each sample from the fine solution, (n,) for each repeat; empty: not known.
    """
    found: dict[str, Interval | None] = {}
    for name, figures in values.items():
        if name in _BY_SAMPLE:
            of_samples = bootstrap.rms if name == "rms" else bootstrap.median
            found[name] = of_samples(distances) if len(distances) else t_interval(figures)
            continue
        found[name] = t_interval(figures)
        if name in floor:
            found[name + ABOVE_FLOOR] = paired_difference(figures, floor[name]).interval
    return found


def column_of(row: Mapping[str, Any]) -> Column:
    """The column a row of results.json stands in."""
    return row["target"], row["sde"], row["guided_by"], row["budget"]


def with_ranks(rows: Sequence[Row], error: float = 1 - LEVEL) -> list[Row]:
    """The rows with ``rank`` and ``versus_best``, both of the primary metric in their column.

    ``rank`` is ``[best, worst]`` that it may have by `rank_ranges`; ``versus_best`` the difference
    from the row whose figure is best, paired by repeat: its ``spec``, ``value``, and ``interval``,
    which holds for all pairs of the column at once (Bonferroni). None where a row failed, has no
    column (a solver with steps of its own) or stands alone. Figures are taken less the floor where
    samplers have floors of their own (the guided ODE and the guided SDE).

    Args:
        error: probability that anything wrong is said of a column.
    """
    found = _standings([row.as_dict() for row in rows], error)
    return [
        replace(row, extra={**row.extra, **standing})
        for row, standing in zip(rows, found, strict=True)
    ]


def ranked(rows: Sequence[Mapping[str, Any]], error: float = 1 - LEVEL) -> list[dict[str, Any]]:
    """`with_ranks` for rows as they stand in results.json; those of older runs are not ranked."""
    found = _standings(rows, error)
    return [{**row, **plain(standing)} for row, standing in zip(rows, found, strict=True)]


def unresolved(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """Columns whose best is not known, and which more repeats may tell.

    Args:
        rows: with ``rank``.
    """
    found = []
    for column in dict.fromkeys(column_of(row) for row in rows):
        here = [row for row in rows if column_of(row) == column and row.get("rank") is not None]
        top = [row for row in here if row["rank"][0] == 1]
        figures = [row["by_repeat"].get(row["primary"]) for row in top]
        # The same sampler under two names never comes apart.
        if len(top) > 1 and any(one != figures[0] for one in figures):
            found.append(column)
    return found


def more_repeats(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[Column],
    seconds_of: Mapping[Column, float],
    *,
    max_repeats: int | None,
    seconds_left: float | None,
) -> dict[Column, int]:
    """Repeats of each column at the next look; columns with no more to spend are left out.

    Args:
        seconds_of: what a repeat of a column takes.
        max_repeats, seconds_left: what may be spent; None: not limited by it.
    """
    now_at = {c: min(r["repeats"] for r in rows if column_of(r) == c) for c in columns}
    limit = math.inf if max_repeats is None else max_repeats
    wanted = {c: int(min(math.ceil(GROWTH * now), limit)) for c, now in now_at.items()}
    wanted = {c: count for c, count in wanted.items() if count > now_at[c]}
    if seconds_left is None:
        return wanted
    cost = sum((wanted[c] - now_at[c]) * seconds_of.get(c, 0.0) for c in wanted)
    share = 1.0 if cost <= 0 else min(1.0, max(0.0, seconds_left) / cost)
    fitting = {c: now_at[c] + math.floor(share * (wanted[c] - now_at[c])) for c in wanted}
    return {c: count for c, count in fitting.items() if count > now_at[c]}


def _standings(rows: Sequence[Mapping[str, Any]], error: float) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"rank": None, "versus_best": None} for _ in rows]
    columns: dict[Column, list[int]] = {}
    for place, row in enumerate(rows):
        known = row["status"] == OK and row["budget"] is not None
        if known and (row.get("by_repeat") or {}).get(row["primary"]):
            columns.setdefault(column_of(row), []).append(place)
    for places in columns.values():
        if len(places) < 2:
            continue
        here = [rows[place] for place in places]
        lower = METRICS[here[0]["primary"]].lower_is_better
        figures = _comparable(here, here[0]["primary"])
        ranks = rank_ranges(figures, lower_is_better=lower, error=error)
        best = min(range(len(here)), key=lambda i: (1 if lower else -1) * np.mean(figures[i]))
        level = 1 - error / (len(here) * (len(here) - 1) / 2)
        for place, rank, figure in zip(places, ranks, figures, strict=True):
            apart = paired_difference(figure, figures[best], level)
            versus = {
                "spec": here[best]["spec"],
                "value": apart.value,
                "interval": apart.interval,
            }
            found[place] = {"rank": list(rank), "versus_best": versus}
    return found


def _comparable(rows: Sequence[Mapping[str, Any]], metric: str) -> list[list[float]]:
    """The figures of rows by repeat, less their floors where these differ."""
    values = [_numbers(row["by_repeat"][metric]) for row in rows]
    floors = [_numbers(row["floor_by_repeat"].get(metric) or []) for row in rows]
    if all(floor == floors[0] for floor in floors):
        return values
    return [
        [v - f for v, f in zip(value, floor, strict=False)]
        for value, floor in zip(values, floors, strict=True)
    ]


def _numbers(values: Sequence[float | None]) -> list[float]:
    """As in results.json, where null is not finite."""
    return [math.nan if value is None else value for value in values]
