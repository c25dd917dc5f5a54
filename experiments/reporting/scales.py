"""What guidance does at each scale: rows of ``sde-diffusion guidance``, and sweeps of recipes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from experiments.breaking import Breaking
from experiments.canvas import in_order
from experiments.conditions import interval_name
from experiments.guidance_report import breaking_text
from experiments.metrics import METRICS
from experiments.quality import Row, Rows, figure_of, interval_of, sde_title
from experiments.reporting.charts import DASHES, Chart, decades, sampler_trace, samplers_of
from experiments.runs import sampler

METRIC_ORDER = ("accuracy", "frechet", "energy", "recall", "variance", "saturation", "relative")
_LOGARITHMIC = ("frechet", "energy", "relative")
_HEIGHT = 300


def scale_rows(rows: Rows) -> list[Row]:
    """Guided rows, where there are several scales of one guidance."""
    guided = [row for row in rows if row.get("scale") is not None and row["metrics"]]
    scales: dict[str, set[float]] = {}
    for row in guided:
        scales.setdefault(row["guidance"], set()).add(row["scale"])
    return [row for row in guided if len(scales[row["guidance"]]) > 1]


def scale_charts(rows: Rows) -> list[Chart]:
    """A chart for each guidance and metric: a line for each sampler, number of evaluations and
    interval, over the scale."""
    names = samplers_of(rows)
    charts = []
    present = [m for m in METRIC_ORDER if any(m in row["metrics"] for row in rows)]
    places = dict.fromkeys((r["target"], r["sde"], r["guidance"]) for r in rows)
    for target, sde, guidance in places:
        here = [
            r for r in rows if (r["target"], r["sde"], r["guidance"]) == (target, sde, guidance)
        ]
        for metric in present:
            label = METRICS[metric].label if metric in METRICS else metric
            title = f"{target} · {sde_title(sde)} · {guidance}: {label}"
            charts.append(_chart(title, here, metric, names))
    return charts


def breaks_table(rows: Rows) -> dict[str, Any]:
    """From which scale on each sampler without noise of its own breaks, in the console's words."""
    known = [row for row in rows if row.get("breaks_at")]
    scales = sorted({row["scale"] for row in known})
    # γ = 1 belongs to the lines of all intervals; it says nothing of them alone.
    told = [row for row in known if row["scale"] != 1 or scales == [1]]
    budgets = in_order([_budget(row) for row in told])
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in told:
        where = "" if row.get("interval") is None else f" in {interval_name(row['interval'])}"
        place = f"{row['target']} · {sde_title(row['sde'])} · {row['guidance']}{where}"
        text = breaking_text(_breaking(row["breaks_at"]), scales)
        lines.setdefault((place, sampler(row)), {})[_budget(row)] = text
    return {
        "heads": ["guidance", "sampler", *budgets],
        "rows": [
            [*line, *(at.get(budget, "") for budget in budgets)] for line, at in lines.items()
        ],
    }


def _chart(title: str, rows: Rows, metric: str, names: list[str]) -> Chart:
    budgets = in_order([_budget(row) for row in rows])
    # γ = 1 is in every interval: what it is of is known from the other scales.
    intervals = list(dict.fromkeys(_interval(r) for r in rows if r["scale"] != 1)) or [None]
    traces = []
    for name in in_order([sampler(row) for row in rows]):
        for budget in budgets:
            for interval in intervals:
                line = [
                    row
                    for row in sorted(rows, key=lambda row: row["scale"])
                    if (sampler(row), _budget(row)) == (name, budget)
                    and (row["scale"] == 1 or _interval(row) == interval)
                    and figure_of(row, metric) is not None
                ]
                if line:
                    dash = DASHES[budgets.index(budget) % len(DASHES)]
                    traces.append(_line(line, name, names.index(name), metric, dash, budget))
    values = [y for trace in traces for y in trace["y"]]
    logarithmic = metric in _LOGARITHMIC and min(values, default=0.0) > 0
    scales = sorted({row["scale"] for row in rows})
    layout = {
        "height": _HEIGHT,
        "xaxis": {
            "type": "log" if scales[0] > 0 else "linear",
            "title": {"text": "scale γ"},
            "tickvals": scales,
            "ticktext": [f"{scale:g}" for scale in scales],
        },
        "yaxis": {
            "type": "log" if logarithmic else "linear",
            **(decades(values) if logarithmic else {}),
        },
        "showlegend": False,
        "hovermode": "closest",
    }
    return Chart(title, f"{title} against the scale", {"data": traces, "layout": layout})


def _line(line: Rows, name: str, k: int, metric: str, dash: str, budget: str) -> dict[str, Any]:
    values = [figure_of(row, metric) or 0.0 for row in line]
    words = [
        f"{value:.3g} at γ = {row['scale']:g}, {budget}"
        for value, row in zip(values, line, strict=True)
    ]
    intervals = [interval_of(row, metric) for row in line]
    return sampler_trace(name, k, [row["scale"] for row in line], values, intervals, words, dash)


def _budget(row: Row) -> str:
    return "own steps" if row.get("budget") is None else f"{row['budget']} NFE"


def _interval(row: Row) -> tuple[float, ...] | None:
    return tuple(row["interval"]) if row.get("interval") else None


def _breaking(found: Mapping[str, Any]) -> Breaking:
    """JSON has no infinity: null, and the side on which the scale lies."""
    sides = {"below": -math.inf, "above": math.inf}
    return Breaking(*(sides.get(found[f"{k}_side"], found[k]) for k in Breaking._fields))
