"""Error against steps: rows of ``sde-diffusion steps``, with the law fitted to each sampler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.asymptotics import Needed, evaluations_text
from experiments.quality import Row, Rows, figure_of, interval_of, sde_title
from experiments.reporting.charts import Chart, decades, sampler_trace, samplers_of
from experiments.runs import sampler

METRIC = "error"
_HEIGHT = 380
Lines = dict[str, dict[str, list[Row]]]


def slope_rows(rows: Rows) -> list[Row]:
    """Those of ``steps``."""
    return [row for row in rows if "declared_order" in row and figure_of(row, METRIC) is not None]


def slope_charts(rows: Rows) -> list[Chart]:
    """A chart for each target and SDE; the fitted law where there is an asymptotic region."""
    names = samplers_of(rows)
    charts = []
    for title, lines in _lines(rows).items():
        traces, values, counts = [], [], set()
        for name, line in lines.items():
            k = names.index(name)
            x = [row["steps"] for row in line]
            y = [figure_of(row, METRIC) or 0.0 for row in line]
            words = [f"{value:.3g} at {count} steps" for value, count in zip(y, x, strict=True)]
            if line[-1].get("law"):
                traces.append(_law(line[-1]["law"], name, k))
            drawn = sampler_trace(name, k, x, y, [interval_of(r, METRIC) for r in line], words)
            drawn["mode"] = "markers"
            traces.append(drawn)
            values += [value for value in y if value > 0]
            counts |= set(x)
        ticks = sorted(counts)
        layout = {
            "height": _HEIGHT,
            "xaxis": {
                "type": "log",
                "title": {"text": "steps"},
                "tickvals": ticks,
                "ticktext": [str(n) for n in ticks],
            },
            "yaxis": {"type": "log", "title": {"text": "error"}, **decades(values)},
            "showlegend": False,
            "hovermode": "closest",
        }
        orders = "; ".join(f"{n}: {_order(line[-1])}" for n, line in lines.items())
        said = f"{title}, error against steps. Orders: {orders}"
        charts.append(Chart(title, said, {"data": traces, "layout": layout}))
    return charts


def slope_table(rows: Rows) -> dict[str, Any]:
    """A line for each sampler and SDE: declared and fitted order, and evaluations for an error."""
    wanted = sorted(
        {w["error"] for row in rows for w in (row.get("law") or {}).get("wanted", ())},
        reverse=True,
    )
    heads = ["target and SDE", "sampler", "declared", "fitted (95 %)", "on steps"]
    found = []
    for title, lines in _lines(rows).items():
        for name, line in lines.items():
            law = line[-1].get("law")
            region = "no asymptotic region" if law is None else f"{law['first']}–{law['last']}"
            needed = {w["error"]: _needed(w) for w in (law or {}).get("wanted", ())}
            found.append(
                [
                    title,
                    name,
                    f"{line[-1]['declared_order']:g}",
                    _order(line[-1]),
                    region,
                    *(needed.get(error, "–") for error in wanted),
                ]
            )
    return {"heads": [*heads, *(f"NFE for {error:g}" for error in wanted)], "rows": found}


def _lines(rows: Rows) -> Lines:
    """Rows by target and SDE, then by sampler, by increasing steps."""
    found: Lines = {}
    for row in sorted(rows, key=lambda row: row["steps"]):
        title = f"{row['target']} · {sde_title(row['sde'])}"
        found.setdefault(title, {}).setdefault(sampler(row), []).append(row)
    return found


def _law(law: Mapping[str, Any], name: str, k: int) -> dict[str, Any]:
    ends = [law["first"], law["last"]]
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "meta": "sampler",
        "x": ends,
        "y": [law["constant"] * n ** -law["order"] for n in ends],
        "line": {"color": f"@{k % 7}", "width": 1.6},
        "hoverinfo": "skip",
    }


def _order(row: Row) -> str:
    law = row.get("law")
    if law is None:
        return "–"
    return f"{law['order']:.2f} ({law['order_low']:.2f}–{law['order_high']:.2f})"


def _needed(found: Mapping[str, Any]) -> str:
    """As on the console; JSON has null for infinity."""
    ends = {
        key: float("inf") if found[key] is None else found[key] for key in ("nfe", "low", "high")
    }
    return evaluations_text(Needed(**ends, how=found["how"]))
