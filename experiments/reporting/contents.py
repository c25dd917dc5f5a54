"""What stands on the page of a run, section by section, as its template takes it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.advice import advise
from experiments.canvas import COLOURS, in_order
from experiments.metrics import METRICS
from experiments.quality import Row, Rows, figure_of, primary_of, sign_of
from experiments.records import OK
from experiments.reporting.budgets import budget_charts, largest_table
from experiments.reporting.charts import MARKERS, Chart, dash_of, quality_charts, samplers_of
from experiments.reporting.pictures import galleries, journey_figure, journeys, plans_of
from experiments.reporting.scales import breaks_table, scale_charts, scale_rows
from experiments.reporting.slopes import slope_charts, slope_rows, slope_table
from experiments.reporting.tables import advice_panel, facts, orders_table, rows_table
from experiments.results import plain
from experiments.runs import Run, identity, in_words, sampler
from experiments.tables import number

# Pictures whose figures are in no results file: the page shows them as they are.
_DRAWN = {
    "error-budget": ("network_error.png",),
    "recipe": ("samples-*.png", "strip-*.png"),
}


class Contents:
    """The sections of a run and of others that are shown with it.

    Args:
        run: whose page it is.
        more: runs whose error budget, orders and slopes stand on it too.
        trajectories: also sample a trajectory for each target, and true samples, anew.

    Attributes:
        figures: name -> Plotly's figure, or the frames of a slider, that the page draws.
    """

    def __init__(self, run: Run, more: Sequence[Run] = (), *, trajectories: bool = True) -> None:
        self.run, self.runs, self.trajectories = run, (run, *more), trajectories
        self.figures: dict[str, Any] = {}

    def sections(self) -> dict[str, Any]:
        """The template's names."""
        results, rows = self.run.results, self.run.rows
        experiment = results["experiment"]
        budgets = [row for run in self.runs for row in run.rows if row.get("parts")]
        slopes = [row for run in self.runs for row in slope_rows(run.rows)]
        scales = scale_rows(rows) if experiment in ("guidance", "recipe") else []
        # A sweep of scales at one number of evaluations is no curve over them.
        curves = [row for row in rows if row.get("part") != "sweep"]
        curves = curves if experiment in ("compare", "guidance", "recipe") else []
        targets = in_order([row["target"] for row in rows])
        return {
            "title": f"{experiment}: {', '.join(targets)}" if targets else experiment,
            "results": results,
            "summary": _summary(rows),
            "failed": [
                (in_words(identity(row)), row["status"], row.get("error", ""))
                for row in rows
                if row.get("status", OK) != OK
            ],
            "advice": _advice(experiment, rows),
            "said": verdicts(experiment, rows, self.run.path),
            "breaks": breaks_table(rows) if experiment == "guidance" else None,
            "tolerance": results["config"].get("tolerance"),
            "samplers": _key(rows),
            "slope_samplers": _key(slopes),
            "table": rows_table(rows) if rows else None,
            "by_nfe": self._placed(quality_charts(curves, "nfe")),
            "by_seconds": self._placed(quality_charts(curves, "seconds")),
            "scales": self._placed(scale_charts(scales)) if scales else [],
            "budgets": self._placed(budget_charts(budgets)),
            "slopes": self._placed(slope_charts(slopes)),
            "largest": largest_table(budgets) if budgets else None,
            "slope_table": slope_table(slopes) if slopes else None,
            "orders": [found for run in self.runs if (found := orders_table(run.path))],
            "drawn": _drawn(self.runs),
            **self._samples(),
            "environment": facts(results["environment"]),
            "also": [run.results["command"] for run in self.runs[1:]],
            "config": json.dumps(results["config"], indent=1, ensure_ascii=False),
        }

    def _samples(self) -> dict[str, Any]:
        """What was sampled, and what is sampled anew."""
        plans, failures = plans_of(self.run) if self.trajectories else ([], [])
        walked, more = journeys(self.run, plans)
        return {
            "galleries": [
                (
                    gallery.title,
                    [
                        {
                            "title": panel.title,
                            "note": panel.note,
                            "image": panel.image,
                            "figure": panel.figure and self._kept(panel.figure),
                        }
                        for panel in gallery.panels
                    ],
                )
                for gallery in galleries(self.run, plans)
            ],
            "journeys": [
                {
                    "title": journey.title,
                    "moments": journey.moments,
                    "image": journey.images[-1] if journey.images else "",
                    "figure": self._kept(journey_figure(journey)) if journey.frames else "",
                    "frames": self._kept(asdict(journey)),
                }
                for journey in walked
            ],
            "journey_failures": [*failures, *more],
        }

    def _placed(self, charts: Iterable[Chart]) -> list[dict[str, str]]:
        return [
            {"title": chart.title, "words": chart.words, "id": self._kept(chart.figure)}
            for chart in charts
        ]

    def _kept(self, figure: Mapping[str, Any]) -> str:
        name = f"f{len(self.figures)}"
        self.figures[name] = plain(figure)
        return name


def _advice(experiment: str, rows: Rows) -> list[dict[str, Any]]:
    """As the console prints it, of the experiment whose console does."""
    if experiment != "compare":
        return []
    found = advise(rows)
    return [advice_panel(panel) for panel in found.panels] or [
        {"lines": list(found.lines), "fronts": []}
    ]


def verdicts(experiment: str, rows: Rows, folder: Path) -> list[str]:
    """What a run without advice comes to."""
    if experiment == "orders" and (found := orders_table(folder)) is not None:
        failed = found["failed"]
        verdict = "all pass" if not failed else f"{len(failed)} fail: {', '.join(failed)}"
        return [f"{found['certified']} certified, {verdict}."]
    if experiment != "recipe":
        return []
    lines = []
    for target in in_order([row["target"] for row in rows]):
        known = [row for row in rows if row["target"] == target and _figure(row) is not None]
        if known:
            row = min(known, key=lambda row: sign_of(row["primary"]) * (_figure(row) or 0.0))
            label = METRICS[row["primary"]].label
            floor = row["floor"].get(row["primary"])
            beside = f"; true samples: {number(**floor)}" if floor else ""
            lines.append(
                f"{target}, nearest to the data by {label}: {in_words(identity(row)[2:])}, "
                f"{number(**row['metrics'][row['primary']])}{beside}."
            )
    return lines


def _figure(row: Row) -> float | None:
    return figure_of(row, primary_of(row))


def _summary(rows: Rows) -> str:
    sizes = in_order(
        [
            f"{row['samples'] // row['repeats']:,} samples × {row['repeats']} repeats"
            for row in rows
            if row.get("samples") and row.get("repeats")
        ]
    )
    counted = {
        "target": len({row["target"] for row in rows}),
        "SDE": len({row["sde"] for row in rows}),
        "sampler": len({sampler(row) for row in rows}),
        "row": len(rows),
    }
    words = [f"{n} {name}{'' if n == 1 else 's'}" for name, n in counted.items() if n]
    return ", ".join([*words, *sizes])


def _key(rows: Rows) -> list[dict[str, Any]]:
    """Every sampler's look."""
    return [
        {
            "name": name,
            "colour": k % len(COLOURS),
            "marker": MARKERS[k % len(MARKERS)],
            "dash": dash_of(k),
        }
        for k, name in enumerate(samplers_of(rows))
    ]


def _drawn(runs: Iterable[Run]) -> list[tuple[str, str]]:
    """Names and pictures of the run folders that show what is nowhere else."""
    paths: list[Path] = []
    for run in runs:
        for pattern in _DRAWN.get(run.results["experiment"], ()):
            paths += sorted(run.path.glob(pattern))
    return [
        (path.name, "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode())
        for path in paths
    ]
