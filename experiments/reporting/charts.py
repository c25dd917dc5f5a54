"""Plotly figures of rows, as the JSON that the page draws.

Colours are names that the page resolves for light or dark: ``@0`` to ``@6`` are those of
`experiments.canvas`, ``@grey``, ``@band`` and ``@ink`` its greys and text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.advice import Cost, panels_of, pareto_front
from experiments.canvas import COLOURS, in_order
from experiments.metrics import METRICS
from experiments.quality import (
    Interval,
    Law,
    Row,
    Rows,
    figure_of,
    interval_of,
    law_of,
    primary_of,
    sde_title,
    seconds_of,
    sign_of,
)
from experiments.runs import sampler
from experiments.tables import number

MARKERS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x")
DASHES = ("solid", "dash", "dot")
_HEIGHT = 340


@dataclass(frozen=True)
class Chart:
    """One chart: its heading, what a screen reader says, and Plotly's ``data`` and ``layout``."""

    title: str
    words: str
    figure: dict[str, Any]


def samplers_of(rows: Rows) -> list[str]:
    """The lines of all charts; the k-th has the k-th colour."""
    return in_order([sampler(row) for row in rows])


def quality_charts(rows: Rows, cost: Cost) -> list[Chart]:
    """Quality against ``nfe`` or ``seconds``: a chart for each law and SDE, with the front that
    the advice names."""
    charts = []
    fronts = [row for here in panels_of(rows).values() for row in pareto_front(here, cost)]
    names = samplers_of(rows)
    for (law, sde), here in by_panel(rows).items():
        metric = primary_of(here[0], rows)
        known = [
            row for row in here if figure_of(row, metric) is not None and _spent(row, cost) > 0
        ]
        if not known:
            continue
        traces = _floor(known, metric, cost)
        traces.append(_front(undominated(known, metric, cost), known, metric, cost))
        resolved = [row for row in known if any(row is one for one in fronts)]
        traces.append(_rings(resolved, metric, cost))
        for k, name in enumerate(names):
            line = sorted((r for r in known if sampler(r) == name), key=lambda r: _spent(r, cost))
            if line:
                traces.append(_line(line, name, k, metric, cost))
        info = METRICS.get(metric)
        label = metric if info is None else info.label
        title = title_of(law, sde, rows)
        best = min(known, key=lambda row: sign_of(metric) * (figure_of(row, metric) or 0.0))
        words = (
            f"{title}: {label} against {_COSTS[cost]}; best {sampler(best)} at "
            f"{_spent(best, cost):.3g}, {number(figure_of(best, metric))}"
        )
        values = [figure_of(row, metric) or 0.0 for row in known]
        logarithmic = sign_of(metric) > 0 and min(values) > 0
        reached = [y for trace in traces for y in _reach(trace) if y > 0]
        layout = {
            "height": _HEIGHT,
            "xaxis": {"type": "log", "title": {"text": _COSTS[cost]}, **_ticks(known, cost)},
            "yaxis": {
                "type": "log" if logarithmic else "linear",
                "title": {"text": label},
                **(decades(reached) if logarithmic else {}),
            },
            "showlegend": False,
            "hovermode": "closest",
        }
        charts.append(Chart(title, words, {"data": traces, "layout": layout}))
    return charts


_COSTS = {"nfe": "score evaluations per sample (NFE)", "seconds": "seconds per 1,000 samples"}


def by_panel(rows: Rows) -> dict[tuple[Law, str], list[Row]]:
    """Rows by law and SDE, a chart each."""
    found: dict[tuple[Law, str], list[Row]] = {}
    for row in rows:
        found.setdefault((law_of(row), str(row["sde"])), []).append(row)
    return found


def title_of(law: Law, sde: str, rows: Rows) -> str:
    """A chart's heading: target, SDE, guidance, and what it is compared with where that differs."""
    target, guided, truth = law
    laws = {law_of(row) for row in rows}
    twins = len([other for other in laws if other[:2] == law[:2]]) > 1
    parts = [target, sde_title(sde), guided, truth if twins else ""]
    return " · ".join(part for part in parts if part)


def _line(line: Rows, name: str, k: int, metric: str, cost: Cost) -> dict[str, Any]:
    words = []
    for row in line:
        low_high = interval_of(row, metric)
        found = "" if low_high is None else f"<br>{low_high[0]:.3g} to {low_high[1]:.3g}"
        words.append(
            f"{number(**row['metrics'][metric])}{found}<br>{row['nfe']:.4g} evaluations, "
            f"{seconds_of(row):.2g} s for 1,000 samples"
        )
    return sampler_trace(
        name,
        k,
        [_spent(row, cost) for row in line],
        [figure_of(row, metric) or 0.0 for row in line],
        [interval_of(row, metric) for row in line],
        words,
    )


def sampler_trace(
    name: str,
    k: int,
    x: Sequence[float],
    y: Sequence[float],
    intervals: Sequence[Interval | None],
    words: Sequence[str],
    dash: str | None = None,
) -> dict[str, Any]:
    """A sampler's line with its intervals; the key above the charts hides it by its name."""
    up, down = [], []
    for value, found in zip(y, intervals, strict=True):
        low, high = found or (value, value)
        up.append(max(0.0, high - value))
        # A logarithmic axis has no place for what reaches below zero.
        below = max(0.0, value - low)
        down.append(min(below, 0.9 * value) if value > 0 else below)
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "meta": "sampler",
        "x": list(x),
        "y": list(y),
        "error_y": {"type": "data", "array": up, "arrayminus": down, "thickness": 1.2, "width": 3},
        "line": {"color": f"@{k % len(COLOURS)}", "width": 1.6, "dash": dash or dash_of(k)},
        "marker": {"symbol": MARKERS[k % len(MARKERS)], "size": 7},
        "text": list(words),
        "hovertemplate": "%{text}<extra>%{fullData.name}</extra>",
    }


def dash_of(k: int) -> str:
    """Of the k-th sampler: another where the colours start again."""
    return DASHES[k // len(COLOURS) % len(DASHES)]


def _spent(row: Row, cost: Cost) -> float:
    return seconds_of(row) if cost == "seconds" else float(row[cost])


def undominated(rows: Rows, metric: str, cost: Cost) -> list[Row]:
    """The rows whose figure no cheaper row's is as good as, cheapest first, noise or not."""
    sign = sign_of(metric)
    front: list[Row] = []
    best = math.inf
    for row in sorted(rows, key=lambda r: (_spent(r, cost), sign * (figure_of(r, metric) or 0.0))):
        if (value := sign * (figure_of(row, metric) or 0.0)) < best:
            front.append(row)
            best = value
    return front


def _front(front: Rows, rows: Rows, metric: str, cost: Cost) -> dict[str, Any]:
    """Steps down, and level from the last on."""
    most = max(_spent(row, cost) for row in rows)
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "Pareto front",
        "x": [*(_spent(row, cost) for row in front), most],
        "y": [figure_of(row, metric) for row in [*front, front[-1]]],
        "line": {"color": "@band", "width": 9, "shape": "hv"},
        "hoverinfo": "skip",
    }


def _rings(rows: Rows, metric: str, cost: Cost) -> dict[str, Any]:
    """Around the rows of the front that the repeats resolve."""
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "resolved front",
        "x": [_spent(row, cost) for row in rows],
        "y": [figure_of(row, metric) for row in rows],
        "marker": {
            "symbol": "circle-open",
            "size": 16,
            "color": "@ink",
            "line": {"width": 1.4, "color": "@ink"},
        },
        "hoverinfo": "skip",
    }


def _floor(rows: Rows, metric: str, cost: Cost) -> list[dict[str, Any]]:
    found = (rows[0].get("floor") or {}).get(metric)
    if not found or found.get("value") is None:
        return []
    ends = [min(_spent(row, cost) for row in rows), max(_spent(row, cost) for row in rows)]
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "floor",
            "x": ends,
            "y": [found["value"]] * 2,
            "line": {"color": "@grey", "width": 1.2, "dash": "dash"},
            "hovertemplate": f"floor: {number(**found)}<extra></extra>",
        }
    ]


def _reach(trace: Mapping[str, Any]) -> list[float]:
    """All heights of a trace, bars included."""
    found = [float(y) for y in trace["y"]]
    bars = trace.get("error_y")
    if bars is not None:
        found += [y + up for y, up in zip(trace["y"], bars["array"], strict=True)]
        found += [y - down for y, down in zip(trace["y"], bars["arrayminus"], strict=True)]
    return found


def _ticks(rows: Rows, cost: Cost) -> dict[str, Any]:
    """Evaluations at the numbers that were run, where there is room for them."""
    values = sorted({_spent(row, cost) for row in rows}, reverse=True)
    if cost != "nfe":
        return decades(values)
    shown: list[float] = []
    for value in values:
        if not shown or shown[-1] / value > 1.35:
            shown.append(value)
    return {"tickvals": shown, "ticktext": [f"{value:.4g}" for value in shown]}


def decades(values: Sequence[float]) -> dict[str, Any]:
    """Ticks of a logarithmic axis with whole numbers at them: Plotly's own say 5 for 0.005."""
    low, high = min(values), max(values)
    span = math.log10(high / low)
    steps: tuple[float, ...] = (1, 2, 5) if span < 3 else (1,)
    if span < 0.7:
        steps = (1, 1.5, 2, 3, 5, 7)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks = [step * 10.0**k for k in range(first, last + 1) for step in steps]
    return {"tickvals": ticks, "ticktext": [f"{tick:.4g}" for tick in ticks], "tickangle": 0}
