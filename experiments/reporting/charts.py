"""Plotly figures of rows, as the JSON that the page draws.

Colours are names that the page resolves for light or dark: ``@0`` to ``@6`` are those of
`experiments.canvas`, ``@grey``, ``@band`` and ``@ink`` its greys and text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.canvas import COLOURS, in_order
from experiments.metrics import METRICS
from experiments.reporting.findings import (
    SDE_TITLES,
    Rows,
    figure,
    interval,
    law_of,
    pareto,
    primary_of,
    seconds_of,
    sign_of,
)
from experiments.runs import sampler
from experiments.tables import number

MARKERS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x")
DASHES = ("solid", "dash", "dot")
# Of an error budget (rows with ``error_budget``: part -> estimate), as they are stacked.
PARTS = {
    "prior": "prior mismatch at T",
    "truncation": "truncation at t_min",
    "discretisation": "discretisation (solver)",
    "score": "score error (network)",
    "monte_carlo": "Monte Carlo",
}
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


def quality_charts(rows: Rows, cost: str) -> list[Chart]:
    """Quality against ``nfe`` or ``seconds``: a chart for each law and SDE, with its front."""
    charts = []
    names = samplers_of(rows)
    for (law, sde), here in _panels(rows).items():
        metric = primary_of(here[0], rows)
        known = [row for row in here if figure(row, metric) is not None and _spent(row, cost) > 0]
        if not known:
            continue
        traces = _floor(known, metric, cost)
        front = pareto(known, metric, lambda row: _spent(row, cost))
        traces.append(_front(front, metric, cost))
        for k, name in enumerate(names):
            line = sorted((r for r in known if sampler(r) == name), key=lambda r: _spent(r, cost))
            if line:
                traces.append(_line(line, name, k, metric, cost))
        info = METRICS.get(metric)
        label = metric if info is None else info.label
        title = _title(law, sde, rows)
        best = front[-1]
        words = (
            f"{title}: {label} against {_COSTS[cost]}; best {sampler(best)} at "
            f"{_spent(best, cost):.3g}, {number(figure(best, metric))}"
        )
        values = [figure(row, metric) or 0.0 for row in known]
        logarithmic = sign_of(metric) > 0 and min(values) > 0
        reached = [y for trace in traces for y in _reach(trace) if y > 0]
        layout = {
            "height": _HEIGHT,
            "xaxis": {"type": "log", "title": {"text": _COSTS[cost]}, **_ticks(known, cost)},
            "yaxis": {
                "type": "log" if logarithmic else "linear",
                "title": {"text": label},
                **(_decades(reached) if logarithmic else {}),
            },
            "showlegend": False,
            "hovermode": "closest",
        }
        charts.append(Chart(title, words, {"data": traces, "layout": layout}))
    return charts


def budget_charts(rows: Rows) -> list[Chart]:
    """Stacked error budgets, where rows have one; a chart for each law and SDE."""
    charts = []
    for (law, sde), here in _panels([row for row in rows if row.get("error_budget")]).items():
        names = [f"{sampler(row)} @ {row['nfe']:.4g}" for row in here]
        parts = in_order([*PARTS, *(part for row in here for part in row["error_budget"])])
        traces = [
            {
                "type": "bar",
                "orientation": "h",
                "name": PARTS.get(part, part),
                "y": names,
                "x": [(row["error_budget"].get(part) or {}).get("value") for row in here],
                "marker": {"color": f"@{k % len(COLOURS)}"},
            }
            for k, part in enumerate(parts)
            if any(part in row["error_budget"] for row in here)
        ]
        layout = {
            "barmode": "stack",
            "height": 120 + 26 * len(names),
            "xaxis": {"title": {"text": "share of the error"}},
            "yaxis": {"autorange": "reversed", "automargin": True},
            "legend": {"orientation": "h", "y": -0.25},
        }
        title = _title(law, sde, rows)
        charts.append(
            Chart(title, f"{title}: where the error comes from", {"data": traces, "layout": layout})
        )
    return charts


_COSTS = {"nfe": "score evaluations per sample (NFE)", "seconds": "seconds per 1,000 samples"}
Panel = tuple[tuple[str, str, str], str]


def _panels(rows: Rows) -> dict[Panel, list[Mapping[str, Any]]]:
    found: dict[Panel, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault((law_of(row), str(row["sde"])), []).append(row)
    return found


def _title(law: tuple[str, str, str], sde: str, rows: Rows) -> str:
    target, guided, truth = law
    laws = {law_of(row) for row in rows}
    twins = len([other for other in laws if other[:2] == law[:2]]) > 1
    parts = [target, SDE_TITLES.get(sde, sde), guided, truth if twins else ""]
    return " · ".join(part for part in parts if part)


def _line(line: Rows, name: str, k: int, metric: str, cost: str) -> dict[str, Any]:
    values = [float(figure(row, metric) or 0.0) for row in line]
    ranges = [interval(row["metrics"][metric]) for row in line]
    up, down = [], []
    for value, found in zip(values, ranges, strict=True):
        low, high = found or (value, value)
        up.append(high - value)
        # A logarithmic axis has no place for what reaches below zero.
        down.append(min(value - low, 0.9 * value) if value > 0 else value - low)
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "meta": "sampler",
        "x": [_spent(row, cost) for row in line],
        "y": values,
        "error_y": {"type": "data", "array": up, "arrayminus": down, "thickness": 1.2, "width": 3},
        "line": {"color": f"@{k % len(COLOURS)}", "width": 1.6, "dash": DASHES[k // 7 % 3]},
        "marker": {"symbol": MARKERS[k % len(MARKERS)], "size": 7},
        "text": [
            f"{number(value, row['metrics'][metric].get('stderr'))}<br>"
            f"{row['nfe']:.4g} evaluations, {seconds_of(row):.2g} s"
            for value, row in zip(values, line, strict=True)
        ],
        "hovertemplate": "%{text}<extra>%{fullData.name}</extra>",
    }


def _spent(row: Mapping[str, Any], cost: str) -> float:
    return seconds_of(row) if cost == "seconds" else float(row[cost])


def _front(front: Rows, metric: str, cost: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "Pareto front",
        "x": [_spent(row, cost) for row in front],
        "y": [figure(row, metric) for row in front],
        "line": {"color": "@band", "width": 9, "shape": "hv"},
        "hoverinfo": "skip",
    }


def _floor(rows: Rows, metric: str, cost: str) -> list[dict[str, Any]]:
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


def _ticks(rows: Rows, cost: str) -> dict[str, Any]:
    """Evaluations at the numbers that were run, where there is room for them."""
    values = sorted({_spent(row, cost) for row in rows}, reverse=True)
    if cost != "nfe":
        return _decades(values)
    shown: list[float] = []
    for value in values:
        if not shown or shown[-1] / value > 1.35:
            shown.append(value)
    return {"tickvals": shown, "ticktext": [f"{value:.4g}" for value in shown]}


def _decades(values: Sequence[float]) -> dict[str, Any]:
    """Ticks of a logarithmic axis with whole numbers at them: Plotly's own say 5 for 0.005."""
    low, high = min(values), max(values)
    span = math.log10(high / low)
    steps: tuple[float, ...] = (1, 2, 5) if span < 3 else (1,)
    if span < 0.7:
        steps = (1, 1.5, 2, 3, 5, 7)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks = [step * 10.0**k for k in range(first, last + 1) for step in steps]
    return {"tickvals": ticks, "ticktext": [f"{tick:.4g}" for tick in ticks], "tickangle": 0}
