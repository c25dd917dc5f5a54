"""Rows of a guidance run that differ in their scale only, and where on them a solver breaks."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from experiments.breaking import Breaking, breaking_scale
from experiments.records import Record

Interval = tuple[float, float] | None
Row = Mapping[str, Any]
Repeat = tuple[int, int]  # seed, number


class Cells(Protocol):
    """Finished cells, as `experiments.store.CellStore` has them."""

    def get(self, key: str) -> Record | None:
        """The record of a cell; None where it has failed."""

    def tensors(self, key: str) -> Mapping[str, Tensor] | None:
        """What is stored beside it."""


@dataclass(frozen=True)
class Line:
    """A solver at a number of evaluations, guided in one way, at every scale.

    Attributes:
        places: of its rows among all.
    """

    target: str
    sde: str
    guidance: str
    interval: Interval
    solver: str
    budget: int | None
    scales: tuple[float, ...]
    breaking: Breaking | None
    places: tuple[int, ...] = ()


def lines_of(
    rows: Sequence[Row], store: Cells, *, tolerance: float, seed: int, noisy: Collection[str]
) -> list[Line]:
    """The lines of a run.

    Where the scales of a line have not the same repeats (of merged runs), those that all have
    count: they started from the same noise.

    Args:
        rows: as in results.json.
        store: holds their cells.
        tolerance: a solver breaks where its error exceeds so many of the data's deviations.
        seed: of the bootstrap.
        noisy: solvers with noise of their own, as typed; they are compared with nothing.
    """
    lines = []
    for interval, places in _members(rows):
        last = rows[places[-1]]
        breaking = None
        strong = [i for i in places if rows[i]["scale"] >= 1]
        if strong and last["spec"] not in noisy:
            distances = _together([_distances(rows[i], store) for i in strong])
            if distances is not None:
                scales = [float(rows[i]["scale"]) for i in strong]
                breaking = breaking_scale(scales, distances, tolerance, seed=seed)
        lines.append(
            Line(
                target=last["target"],
                sde=last["sde"],
                guidance=last["guidance"],
                interval=interval,
                solver=last["spec"],
                budget=last["budget"],
                scales=tuple(float(rows[i]["scale"]) for i in places),
                breaking=breaking,
                places=tuple(places),
            )
        )
    return lines


def with_breaks(rows: Sequence[Row], lines: Sequence[Line]) -> list[dict[str, Any]]:
    """The rows with ``breaks_at``; JSON has no infinity: null, and the side the scale lies on."""
    found = [dict(row) for row in rows]
    for line in lines:
        for place in line.places:
            found[place]["breaks_at"] = None if line.breaking is None else _plain(line.breaking)
    return found


def _members(rows: Sequence[Row]) -> Iterator[tuple[Interval, list[int]]]:
    """Each interval's rows by increasing scale; γ = 1 is in every interval."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    names = ("target", "sde", "guidance", "label", "spec", "budget", "grid", "denoise")
    for place, row in enumerate(rows):
        size = row["samples"] // row["repeats"]
        alike.setdefault((*(row[name] for name in names), size), []).append(place)
    for places in alike.values():
        places.sort(key=lambda i: float(rows[i]["scale"]))
        intervals = list(dict.fromkeys(_interval(rows[i]) for i in places))
        everywhere = [i for i in places if _interval(rows[i]) is None]
        if len(intervals) > 1 and all(rows[i]["scale"] == 1 for i in everywhere):
            intervals.remove(None)
        for interval in intervals:
            yield (
                interval,
                [i for i in places if rows[i]["scale"] == 1 or _interval(rows[i]) == interval],
            )


def _interval(row: Row) -> Interval:
    ends = row["interval"]
    return None if ends is None else (ends[0], ends[1])


def _distances(row: Row, store: Cells) -> dict[Repeat, np.ndarray] | None:
    """Of each repeat from the fine solution, in the data's deviations; None where one failed."""
    found = {}
    for key in row["cells"]:
        record, tensors = store.get(key), store.tensors(key)
        if record is None or tensors is None or "distance" not in tensors:
            return None
        rms, relative = (record.metrics.get(name) for name in ("rms", "relative"))
        deviation = rms / relative if rms and relative else 1.0  # none to know of distances of zero
        found[record.seed, record.repeat] = tensors["distance"].double().numpy() / deviation
    return found


def _together(
    found: Sequence[Mapping[Repeat, np.ndarray] | None],
) -> list[np.ndarray | None] | None:
    """Each scale's distances in the repeats that all scales have; None where there are none."""
    known = [one.keys() for one in found if one is not None]
    shared = sorted(set.intersection(*map(set, known))) if known else []
    if known and not shared:
        return None
    return [None if one is None else np.concatenate([one[r] for r in shared]) for one in found]


def _plain(breaking: Breaking) -> Mapping[str, Any]:
    values = {k: v if math.isfinite(v) else None for k, v in breaking._asdict().items()}
    side = {-math.inf: "below", math.inf: "above"}
    return {
        **values,
        **{f"{k}_side": side.get(v, "within") for k, v in breaking._asdict().items()},
    }
