"""Which sampler to use, in words, from the rows of a comparison: only what its repeats resolve.

For each target, SDE and guidance: what is best at each number of evaluations, where one sampler
takes over from another, the Pareto front of quality against evaluations and against seconds, and
the knee, the evaluations beyond which little is gained, as far as the repeats can tell. What cannot
be told is said not to be known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from experiments.intervals import LEVEL, Difference, paired_difference
from experiments.quality import Row, Rows, figure_of, seconds_of, sign_of
from experiments.records import OK

Cost = Literal["nfe", "seconds"]
WORTH = 0.5  # a figure that more evaluations may halve is not at its knee


@dataclass(frozen=True)
class Evidence:
    """What a line of advice stands on.

    Attributes:
        solver, budget, grid: of the row.
        nfe, seconds: what it cost: evaluations per sample, wall seconds of 1,000 samples.
        metric, value, interval: its figure; the interval None where there is one repeat.
        above_floor: interval of what it is above the floor; None where that is not known.
        rank: ranks in its column that the repeats leave open; None where it is not ranked.
    """

    solver: str
    budget: int | None
    grid: str
    nfe: float
    seconds: float
    metric: str
    value: float
    interval: tuple[float, float] | None
    above_floor: tuple[float, float] | None
    rank: tuple[int, int] | None


@dataclass(frozen=True)
class Recommendation:
    """A sampler for a range of evaluations: from ``low`` to ``high``, both measured."""

    low: int
    high: int
    evidence: tuple[Evidence, ...]

    @property
    def solver(self) -> str:
        return self.evidence[0].solver

    @property
    def grid(self) -> str:
        return self.evidence[0].grid


@dataclass(frozen=True)
class Panel:
    """Advice for one target, SDE and guidance.

    Attributes:
        recommended: where a best is resolved, by increasing evaluations.
        open: numbers of evaluations at which it is not, with those that may be best.
        front_nfe, front_seconds: rows that no cheaper row is known to be as good as or better than,
            and each better than the one before it beyond noise.
        knee: the last row of the front by evaluations, where dearer ones were tried and the best of
            them gains less than half, at 95 %; None where that is not so, or not known.
        beyond: the dearer row with the best figure; None where none was tried.
        gain_beyond: the most it may gain over the last row of the front, as a share of that one's
            figure: the upper end of the 95 % interval; infinite where it is not known.
        at_floor: whether the knee is at the floor: not told from true samples.
    """

    target: str
    sde: str
    guided_by: str
    recommended: tuple[Recommendation, ...]
    open: Mapping[int, tuple[str, ...]]
    front_nfe: tuple[Evidence, ...]
    front_seconds: tuple[Evidence, ...]
    knee: Evidence | None
    beyond: Evidence | None
    gain_beyond: float
    at_floor: bool
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Advice:
    """Advice in words, and what it stands on.

    Attributes:
        lines: for the console and the report; every statement resolved at 95 %.
        panels: one for each target, SDE and guidance.
    """

    lines: tuple[str, ...]
    panels: tuple[Panel, ...]


def advise(rows: Rows) -> Advice:
    """What the rows of results.json say about which sampler to use.

    Rows of older runs, without values by repeat and ranks, resolve nothing.

    Args:
        rows: as in results.json of ``compare``; failed ones are left out.
    """
    panels = [_panel(*key, here) for key, here in panels_of(rows).items()]
    lines = tuple(line for panel in panels for line in panel.lines)
    return Advice(lines or ("nothing to advise on: no row is finished",), tuple(panels))


def panels_of(rows: Rows) -> dict[tuple[str, str, str], list[Row]]:
    """The rows that have a figure, by target, SDE and guidance: what is advised on together."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.get("status", OK) == OK and _value(row) is not None:
            found.setdefault(_panel_key(row), []).append(row)
    return found


def pareto_front(rows: Rows, cost: Cost = "nfe") -> list[Row]:
    """Rows by increasing cost, each better than all that stand before it beyond noise.

    Args:
        rows: of one target, SDE and guidance.
        cost: "nfe", the evaluations that were allowed (a sampler with two a step may have used one
            less), or "seconds" of as many samples.
    """
    front: list[Row] = []
    spent = seconds_of if cost == "seconds" else _evaluations
    for row in sorted(rows, key=lambda row: (spent(row), _sign(row) * (_value(row) or 0.0))):
        if not front or _better(row, front[-1], len(rows)):
            # At the same cost the better one stands for both.
            if front and spent(front[-1]) == spent(row):
                front.pop()
            front.append(row)
    return front


def _panel(target: str, sde: str, guided_by: str, rows: Rows) -> Panel:
    recommended, still_open = _by_budget(rows)
    front = pareto_front(rows)
    beyond, gain = _beyond(front[-1], rows)
    knee = front[-1] if beyond is not None and gain <= WORTH else None
    panel = Panel(
        target=target,
        sde=sde,
        guided_by=guided_by,
        recommended=tuple(recommended),
        open=still_open,
        front_nfe=tuple(map(_evidence, front)),
        front_seconds=tuple(map(_evidence, pareto_front(rows, "seconds"))),
        knee=None if knee is None else _evidence(knee),
        beyond=None if beyond is None else _evidence(beyond),
        gain_beyond=gain,
        at_floor=knee is not None and _at_floor(knee),
        lines=(),
    )
    words = _words(panel, rows)
    guided = "" if guided_by == "unguided" else f", {guided_by}"
    lines = (f"{target} · {sde}{guided}: {words[0]}", *(f"  {line}" for line in words[1:]))
    return replace(panel, lines=lines)


def _by_budget(rows: Rows) -> tuple[list[Recommendation], dict[int, tuple[str, ...]]]:
    """Stretches of numbers of evaluations with one resolved best, and those without."""
    found: list[Recommendation] = []
    still_open: dict[int, tuple[str, ...]] = {}
    previous = None
    for budget in sorted({row["budget"] for row in rows if row["budget"] is not None}):
        here = [row for row in rows if row["budget"] == budget and row.get("rank") is not None]
        best = [row for row in here if row["rank"][1] == 1]
        if not best:
            may = [row["spec"] for row in here if row["rank"][0] == 1]
            # Nothing is known where all may be best: then nobody need be named.
            still_open[budget] = tuple(may) if 0 < len(may) < len(here) else ()
            previous = None
            continue
        evidence = _evidence(best[0])
        if previous == (evidence.solver, evidence.grid):
            last = found.pop()
            found.append(Recommendation(last.low, budget, (*last.evidence, evidence)))
        else:
            found.append(Recommendation(budget, budget, (evidence,)))
        previous = evidence.solver, evidence.grid
    return found, still_open


def _beyond(row: Row, rows: Rows) -> tuple[Row | None, float]:
    """The dearer row with the best figure, and the most that it may gain, as a share."""
    dearer = [other for other in rows if _evaluations(other) > _evaluations(row)]
    if not dearer:
        return None, 0.0
    best = min(dearer, key=lambda other: _sign(other) * (_value(other) or 0.0))
    found, value = difference(row, best).interval, _value(row)
    if found is None or not value:
        return best, math.inf
    most = found[1] if _sign(row) > 0 else -found[0]
    return best, max(0.0, most) / abs(value)


def _words(panel: Panel, rows: Rows) -> list[str]:
    repeats = min(row.get("repeats", 1) for row in rows)
    lines = [_use(one, panel, place) for place, one in enumerate(panel.recommended)]
    lines += _open_words(panel)
    if not panel.recommended and not any(panel.open.values()):
        several = len({row["spec"] for row in rows}) > 1
        nothing = f"no best sampler is resolved by {repeats} repeats; --until-resolved adds more"
        lines = [nothing if several else "one sampler, nothing to choose between"]
    lines += [knee] if (knee := _knee_words(panel)) else []
    if len(panel.front_nfe) > 1:
        steps = " → ".join(f"{e.solver} at {_count(e)}" for e in panel.front_nfe)
        lines.append(f"by evaluations, each better than the one before: {steps}")
    if len(panel.front_seconds) > 1:
        steps = " → ".join(
            f"{e.solver} at {_count(e)} in {e.seconds:.2g} s" for e in panel.front_seconds
        )
        lines.append(f"by seconds for 1,000 samples, each better than the one before: {steps}")
    return lines


def _knee_words(panel: Panel) -> str | None:
    last, beyond = panel.front_nfe[-1], panel.beyond
    if panel.knee is not None:
        floor = ", not told from true samples" if panel.at_floor else ""
        return (
            f"the knee is at {_count(last)} evaluations, {last.solver}{floor}: beyond it at most "
            f"{panel.gain_beyond:.0%} is gained (95 %) {_shown(last)}"
        )
    if beyond is not None:
        much = "gains" if panel.gain_beyond > 1 else f"gains up to {panel.gain_beyond:.0%}"
        return (
            f"no knee is resolved: it may be that {beyond.solver} at {_count(beyond)} evaluations "
            f"{much} over {last.solver} at {_count(last)}; more repeats tell"
        )
    if len(panel.front_nfe) > 1:
        return f"no knee: {_count(last)} evaluations, the most tried, still gain"
    return None


def _count(found: Evidence) -> str:
    return f"{found.nfe if found.budget is None else found.budget:.4g}"


def _use(one: Recommendation, panel: Panel, place: int) -> str:
    """``under 20 evaluations use X with grid Y``, as far as was measured."""
    only = len(panel.recommended) == 1 and not panel.open
    first, last = place == 0 and not panel.open, place == len(panel.recommended) - 1
    if only and one.low != one.high:
        where = f"at every number of evaluations tried ({one.low} to {one.high})"
    elif first and not last:
        where = f"under {panel.recommended[1].low} evaluations"
    elif last and place > 0 and not any(budget > one.low for budget in panel.open):
        where = f"from {one.low} evaluations on (tried to {one.high})"
    elif one.low == one.high:
        where = f"at {one.low} evaluations"
    else:
        where = f"from {one.low} to {one.high} evaluations"
    return f"{where} use {one.solver} with grid {one.grid} {_shown(one.evidence[-1])}"


def _open_words(panel: Panel) -> list[str]:
    return [
        f"at {budget} evaluations it is one of {', '.join(names)}; which is not resolved"
        if names
        else f"at {budget} evaluations no best is resolved"
        for budget, names in panel.open.items()
        if panel.recommended or any(panel.open.values())
    ]


def _shown(found: Evidence) -> str:
    interval = ""
    if found.interval is not None:
        interval = f", 95 %: {found.interval[0]:.3g} to {found.interval[1]:.3g}"
    at = "" if found.budget is None else f" at {found.budget}"
    return f"({found.metric} {found.value:.3g}{at}{interval})"


def _better(row: Mapping[str, Any], other: Mapping[str, Any], rows: int) -> bool:
    """Whether the first is resolved to be better, as one of all that a front may compare."""
    found = difference(row, other)
    # Any row may be compared with any that stands before it: Bonferroni over the pairs.
    pairs = max(1, rows * (rows - 1) // 2)
    return _sign(row) * found.value < 0 and found.p <= (1 - LEVEL) / pairs


def difference(row: Mapping[str, Any], other: Mapping[str, Any]) -> Difference:
    """The primary metric of one row less that of another, paired by repeat.

    Less their floors where those differ. Not known (p = 1) of rows without values by repeat.
    """
    metric = row["primary"]
    series = []
    for one in (row, other):
        values = (one.get("by_repeat") or {}).get(metric) or []
        floors = (one.get("floor_by_repeat") or {}).get(metric) or []
        series.append((_numbers(values), _numbers(floors)))
    (a, floor_a), (b, floor_b) = series
    shared = min(len(floor_a), len(floor_b))
    if floor_a[:shared] != floor_b[:shared]:
        a = [x - f for x, f in zip(a, floor_a, strict=False)]
        b = [x - f for x, f in zip(b, floor_b, strict=False)]
    return paired_difference(a, b)


def _at_floor(row: Mapping[str, Any]) -> bool:
    """Whether its excess over the floor is known and holds zero."""
    interval = _evidence(row).above_floor
    return interval is not None and interval[0] <= 0


def _evidence(row: Mapping[str, Any]) -> Evidence:
    metric = row["primary"]
    intervals = row.get("intervals") or {}
    rank = row.get("rank")
    return Evidence(
        solver=row["spec"],
        budget=row["budget"],
        grid=str(row.get("grid") or "its own"),
        nfe=row["nfe"],
        seconds=seconds_of(row),
        metric=metric,
        value=_value(row) or 0.0,
        interval=_ends(intervals.get(metric)),
        above_floor=_ends(intervals.get(f"{metric}_above_floor")),
        rank=None if rank is None else (rank[0], rank[1]),
    )


def _ends(interval: Sequence[float | None] | None) -> tuple[float, float] | None:
    if interval is None or interval[0] is None or interval[1] is None:
        return None
    return interval[0], interval[1]


def _value(row: Row) -> float | None:
    return figure_of(row, row.get("primary", ""))


def _sign(row: Row) -> int:
    return sign_of(row["primary"])


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _evaluations(row: Row) -> float:
    return float(row["nfe"] if row.get("budget") is None else row["budget"])


def _panel_key(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["target"], row["sde"], str(row.get("guided_by", "unguided"))
