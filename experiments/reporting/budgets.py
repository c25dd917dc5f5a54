"""Error budgets as stacked bars, of rows with ``parts``: what ``error-budget`` writes."""

from __future__ import annotations

from typing import Any

from experiments.budget_pictures import PART_WORDS
from experiments.canvas import COLOURS
from experiments.quality import Row, Rows, sde_title
from experiments.reporting.charts import Chart, by_panel, title_of
from experiments.runs import sampler


def budget_charts(rows: Rows) -> list[Chart]:
    """A chart for each target and SDE, a bar for each sampler and number of evaluations."""
    shown = [row for row in rows if row.get("parts")]
    return [_chart(title_of(*panel, shown), here) for panel, here in by_panel(shown).items()]


def largest_table(rows: Rows) -> dict[str, Any]:
    """The largest part of each row, and what was measured against the data."""
    return {
        "heads": ["target and SDE", "sampler", "NFE", "largest part", "of", "measured"],
        "rows": [
            [
                _where(row),
                sampler(row),
                f"{row['nfe']:.4g}",
                PART_WORDS.get(part := _largest(row), part),
                _shown(row, part),
                _shown(row, "total"),
            ]
            for row in rows
        ],
    }


def _where(row: Row) -> str:
    parts = [row["target"], sde_title(row["sde"])]
    guided = row.get("guided_by", "unguided")
    parts += [] if guided == "unguided" else [guided]
    return " · ".join(parts + [words for words in [row.get("classes")] if words])


def _shown(row: Row, part: str) -> str:
    found = row["parts"].get(part)
    if found is None:
        return "–"
    low, high = found.get("interval") or (None, None)
    if not found.get("resolved", True) and high is not None:
        return f"< {high:.2g}"
    interval = "" if low is None or high is None else f" ({low:.2g}–{high:.2g})"
    return f"{found['value']:.2g}{interval}"


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
    largest = "; ".join(
        f"{n}: {PART_WORDS.get(p := _largest(row), p)}" for n, row in zip(names, rows, strict=True)
    )
    words = f"{title}, where the error comes from. The largest part: {largest}"
    return Chart(title, words, {"data": traces, "layout": layout})


def _largest(row: Row) -> str:
    known = {part: _value(row, part) or 0.0 for part in PART_WORDS if part in row["parts"]}
    return max(known, key=lambda part: known[part]) if known else "none"


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
