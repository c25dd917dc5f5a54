"""Tables of the page: the rows of a run, its advice with the evidence, certificates, versions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.advice import Evidence, Panel
from experiments.budget_pictures import PART_WORDS
from experiments.certify.orders import ORDERS
from experiments.metrics import METRICS
from experiments.quality import Row, Rows, figure_of, interval_of, primary_of, sde_title
from experiments.records import OK
from experiments.runs import identity, sampler
from experiments.tables import number


def advice_panel(panel: Panel) -> dict[str, Any]:
    """The advice's own lines, and what they stand on."""
    return {
        "lines": [line.strip() for line in panel.lines],
        "fronts": [
            (title, [_evidence(found) for found in front])
            for title, front in (
                ("Pareto front against evaluations", panel.front_nfe),
                ("Pareto front against seconds", panel.front_seconds),
            )
        ],
    }


def _evidence(found: Evidence) -> list[str]:
    interval = (
        "–" if found.interval is None else f"{found.interval[0]:.3g} to {found.interval[1]:.3g}"
    )
    return [
        found.solver,
        found.grid,
        f"{found.nfe:.4g}",
        f"{found.seconds:.2g}",
        f"{found.metric} {found.value:.3g}",
        interval,
    ]


def rows_table(rows: Rows) -> dict[str, Any]:
    """All rows; a cell is what is shown and what it is sorted by."""
    present = {name for row in rows for name in row["metrics"]}
    metrics = [name for name in METRICS if name in present]
    metrics += sorted(present - set(metrics))
    ranked = any(row.get("rank") for row in rows)
    heads = [("target", False), ("SDE", False), ("sampler", False), ("guidance", False)]
    heads += [("grid", False)] if any(row.get("grid") for row in rows) else []
    heads += [("NFE", True), ("passes", True), ("seconds", True), ("peak MiB", True)]
    heads += [("rank", True), ("95 % interval", True)] if ranked else []
    squared = any(row.get("parts") for row in rows)
    heads += [(_label(name) + (", squared" if squared else ""), True) for name in metrics]
    with_grid = ("grid", False) in heads
    return {
        # A hyphen that does not break: Wasserstein-2 stays on one line.
        "heads": [(head.replace("-", "\u2011"), n) for head, n in [*heads, ("status", False)]],
        "rows": [
            [
                _text(row["target"]),
                _text(sde_title(row["sde"])),
                _text(sampler(row)),
                _text(", ".join(part for part in identity(row)[4:] if part) or "none"),
                *([_text(row.get("grid") or "its own")] if with_grid else []),
                _number(row["nfe"], f"{row['nfe']:.4g}"),
                _number(row["network_passes"], f"{row['network_passes']:.4g}"),
                _number(row["seconds"], f"{row['seconds']:.2g}"),
                _peak(row.get("peak_bytes")),
                *([_rank(row), _interval(row, rows)] if ranked else []),
                *(_metric(row["metrics"].get(name)) for name in metrics),
                _text(row.get("status", OK)),
            ]
            for row in rows
        ],
    }


def _label(metric: str) -> str:
    return METRICS[metric].label if metric in METRICS else PART_WORDS.get(metric, metric)


def _text(text: Any) -> dict[str, str]:
    return {"shown": str(text), "value": str(text)}


def _number(value: float | None, shown: str) -> dict[str, str]:
    return {"shown": shown, "value": "" if value is None else repr(float(value))}


def _peak(found: int | None) -> dict[str, str]:
    return _number(None, "–") if found is None else _number(found, f"{found / 2**20:.3g}")


def _rank(row: Row) -> dict[str, str]:
    rank = row.get("rank")
    if rank is None:
        return _number(None, "–")
    best, worst = rank
    return _number(0.5 * (best + worst), f"{best}" if best == worst else f"{best}–{worst}")


def _interval(row: Row, rows: Rows) -> dict[str, str]:
    """Of the metric that stands for quality; sorted by its lower end."""
    metric = primary_of(row, rows)
    found = interval_of(row, metric) if figure_of(row, metric) is not None else None
    if found is None:
        return _number(None, "–")
    return _number(found[0], f"{metric} {found[0]:.3g} to {found[1]:.3g}")


def _metric(found: Mapping[str, Any] | None) -> dict[str, str]:
    if found is None or found["value"] is None:
        return _number(None, "–")
    return _number(found["value"], number(found["value"], found.get("stderr")))


def orders_table(folder: Path) -> dict[str, Any] | None:
    """The certificates of an orders.json in the folder; None where there is none to read."""
    try:
        found = json.loads((folder / ORDERS).read_text(encoding="utf-8"))
        own = [one for one in found["certificates"] if not one.get("peer")]
        return {
            "passed": found["passed"],
            "certified": len(own),
            "failed": [one["name"] for one in own if not one["passed"]],
            "rows": [
                (
                    certificate["name"],
                    certificate["kind"],
                    f"{certificate['order']:g}",
                    [
                        (check["name"], check["declared"], check["measured"], check["passed"])
                        for check in certificate["checks"]
                    ],
                    certificate["passed"],
                )
                for certificate in found["certificates"]
            ],
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None


def facts(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a reader must know to repeat the run."""
    known = [(key.replace("_", " "), str(v)) for key, v in environment.items() if key != "versions"]
    return known + [(name, str(v)) for name, v in environment["versions"].items() if v]
