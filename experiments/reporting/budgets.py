"""Error budgets as stacked bars: of rows with ``parts``, those of ``sde-diffusion error-budget``."""

from __future__ import annotations

from typing import Any

from experiments.budget_pictures import PART_WORDS
from experiments.canvas import COLOURS
from experiments.quality import Row, Rows
from experiments.reporting.charts import Chart, by_panel, title_of
from experiments.runs import sampler


def budget_charts(rows: Rows) -> list[Chart]:
    """A chart for each target and SDE, a bar for each sampler and number of evaluations."""
    shown = [row for row in rows if row.get("parts")]
    return [_chart(title_of(*panel, shown), here) for panel, here in by_panel(shown).items()]


def _chart(title: str, rows: Rows) -> Chart:
    names = [f"{sampler(row)}, {row['nfe']:.4g}" for row in rows]
    traces = [
        _bar(words, names, [_value(row, part) for row in rows], f"@{k % len(COLOURS)}")
        for k, (part, words) in enumerate(PART_WORDS.items())
        if any(part in row["parts"] for row in rows)
    ]
    if any("floor" in row["parts"] for row in rows):
        floor = _bar("Monte Carlo (floor)", names, [_value(row, "floor") for row in rows], "@grey")
        floor["marker"]["pattern"] = {"shape": "/", "fgcolor": "@grey", "bgcolor": "@back"}
        traces.append(floor)
    if any("total" in row["parts"] for row in rows):
        traces.append(_total(names, rows))
    layout = {
        "barmode": "stack",
        "bargap": 0.3,
        "height": 170 + 30 * len(names),
        "xaxis": {"title": {"text": "energy distance, rooted"}, "rangemode": "tozero"},
        "yaxis": {"autorange": "reversed", "automargin": True},
        # Below the axis, in as many rows as a narrow screen needs.
        "legend": {"orientation": "h", "yref": "container", "y": 0.01, "yanchor": "bottom"},
        "margin": {"b": 130},
    }
    largest = "; ".join(f"{n}: {_largest(row)}" for n, row in zip(names, rows, strict=True))
    words = f"{title}, where the error comes from. The largest part: {largest}"
    return Chart(title, words, {"data": traces, "layout": layout})


def _largest(row: Row) -> str:
    known = {part: _value(row, part) or 0.0 for part in PART_WORDS if part in row["parts"]}
    return PART_WORDS[max(known, key=lambda part: known[part])] if known else "none"


def _bar(name: str, y: list[str], x: list[float | None], colour: str) -> dict[str, Any]:
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "y": y,
        "x": x,
        "marker": {"color": colour},
        "hovertemplate": "%{x:.3g}<extra>%{fullData.name}</extra>",
    }


def _total(names: list[str], rows: Rows) -> dict[str, Any]:
    values = [_value(row, "total") for row in rows]
    ends = [(row["parts"].get("total") or {}).get("interval") for row in rows]
    known = [
        (v or 0.0, *(end or (v or 0.0, v or 0.0))) for v, end in zip(values, ends, strict=True)
    ]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "measured, floor off (95 %)",
        "y": names,
        "x": values,
        "error_x": {
            "type": "data",
            "array": [max(0.0, high - v) for v, _, high in known],
            "arrayminus": [max(0.0, v - low) for v, low, _ in known],
            "thickness": 1.2,
            "width": 3,
        },
        "marker": {"color": "@ink", "symbol": "diamond", "size": 8},
        "hovertemplate": "%{x:.3g}<extra>%{fullData.name}</extra>",
    }


def _value(row: Row, part: str) -> float | None:
    found = row["parts"].get(part)
    return None if found is None else found["value"]
