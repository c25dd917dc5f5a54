"""The page: sections gathered from a run, filled into one template, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from experiments.canvas import COLOURS, in_order
from experiments.certify.orders import ORDERS
from experiments.metrics import METRICS
from experiments.records import OK
from experiments.reporting.charts import (
    DASHES,
    MARKERS,
    Chart,
    budget_charts,
    quality_charts,
    samplers_of,
)
from experiments.reporting.findings import SDE_TITLES, Finding, Rows, best_samplers
from experiments.reporting.pictures import galleries, journey_figure, journeys, plans_of
from experiments.results import plain, write_whole
from experiments.runs import Run, identity, in_words, sampler
from experiments.tables import number

PAGE = "report.html"
_PARTS = ("page.css", "page.js")
_TEMPLATE = "page.html.j2"


def check_report(run: Run, out: str | None) -> Path:
    """Where the page will be written.

    Raises:
        ValueError: the run has no rows, ``out`` is a folder, or lies in none.
        ImportError: plotly or jinja2 is missing; names the extra.
    """
    path = run.path / PAGE if out is None else Path(out).expanduser()
    if not run.rows:
        raise ValueError(
            f"{str(run.path)!r} has no finished rows to report; name the folder of a finished run"
        )
    if path.is_dir():
        raise ValueError(f"--out {str(path)!r} is a folder; name the HTML file to write")
    if not path.parent.is_dir():
        raise ValueError(f"--out {str(path)!r}: there is no folder {str(path.parent)!r}; make it")
    try:
        import jinja2  # noqa: F401
        import plotly  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"a report needs the extra report ({error.name} is missing): "
            'python -m pip install "sde-diffusion[report]"'
        ) from None
    return path


def write_report(run: Run, out: str | None = None, *, trajectories: bool = True) -> Path:
    """Write the report of a run as one HTML page that fetches nothing; returns its path.

    Args:
        out: the file; None: report.html in the run's folder.
        trajectories: also sample a trajectory for each target, and true samples, anew.

    Raises:
        ValueError, ImportError: see `check_report`.
    """
    path = check_report(run, out)
    write_whole(path, render(run, trajectories=trajectories))
    return path


def render(run: Run, *, trajectories: bool = True) -> str:
    """The page as text."""
    import jinja2
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_read),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    figures: dict[str, Any] = {}
    context = _context(run, trajectories, figures)
    return environment.get_template(_TEMPLATE).render(
        **context,
        data=_embedded(figures),
        plotly=get_plotlyjs(),
        **{name.replace("page.", ""): _read(name) for name in _PARTS},
    )


def _context(run: Run, trajectories: bool, figures: dict[str, Any]) -> dict[str, Any]:
    results, rows = run.results, run.rows
    names = samplers_of(rows)
    plans, failures = plans_of(run) if trajectories else ([], [])
    walked, more = journeys(run, plans)
    return {
        "title": f"{results['experiment']}: {', '.join(in_order([r['target'] for r in rows]))}",
        "results": results,
        "summary": _summary(rows),
        "findings": [_finding(finding) for finding in best_samplers(rows)],
        "failed": [
            (in_words(identity(row)), row["status"], row.get("error", ""))
            for row in rows
            if row.get("status", OK) != OK
        ],
        "samplers": [
            {"name": name, "colour": k % len(COLOURS), "marker": MARKERS[k % len(MARKERS)]}
            | {"dash": DASHES[k // len(COLOURS) % len(DASHES)]}
            for k, name in enumerate(names)
        ],
        "table": _table(rows),
        "by_nfe": [_placed(chart, figures) for chart in quality_charts(rows, "nfe")],
        "by_seconds": [_placed(chart, figures) for chart in quality_charts(rows, "seconds")],
        "budgets": [_placed(chart, figures) for chart in budget_charts(rows)],
        "orders": _orders(run.path),
        "galleries": [
            (
                gallery.title,
                [
                    {
                        "title": panel.title,
                        "note": panel.note,
                        "image": panel.image,
                        "figure": panel.figure and _kept(panel.figure, figures),
                    }
                    for panel in gallery.panels
                ],
            )
            for gallery in galleries(run, plans)
        ],
        "journeys": [
            {
                "title": journey.title,
                "moments": journey.moments,
                "image": journey.images[-1] if journey.images else "",
                "figure": _kept(journey_figure(journey), figures) if journey.frames else "",
                "frames": _kept(asdict(journey), figures),
            }
            for journey in walked
        ],
        "journey_failures": [*failures, *more],
        "environment": _facts(results["environment"]),
        "config": json.dumps(results["config"], indent=1, ensure_ascii=False),
    }


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
    words = [f"{n} {name}{'' if n == 1 else 's'}" for name, n in counted.items()]
    return ", ".join([*words, *sizes])


def _finding(finding: Finding) -> dict[str, Any]:
    info = METRICS.get(finding.metric)
    return {
        "where": f"{finding.target}, {finding.budget} evaluations",
        "resolved": finding.resolved,
        "best": finding.best,
        "metric": finding.metric if info is None else info.label,
        "ties": ", ".join(finding.ties),
    }


def _table(rows: Rows) -> dict[str, Any]:
    present = {name for row in rows for name in row["metrics"]}
    metrics = [name for name in METRICS if name in present]
    metrics += sorted(present - set(metrics))
    heads = [("target", False), ("SDE", False), ("sampler", False), ("guidance", False)]
    heads += [("NFE", True), ("passes", True), ("seconds", True), ("peak MiB", True)]
    heads += [(METRICS[name].label if name in METRICS else name, True) for name in metrics]
    return {
        # A hyphen that does not break: Wasserstein-2 stays on one line.
        "heads": [(head.replace("-", "\u2011"), n) for head, n in [*heads, ("status", False)]],
        "rows": [
            [
                _text(row["target"]),
                _text(SDE_TITLES.get(row["sde"], row["sde"])),
                _text(sampler(row)),
                _text(", ".join(part for part in identity(row)[4:] if part) or "none"),
                _number(row["nfe"], f"{row['nfe']:.4g}"),
                _number(row["network_passes"], f"{row['network_passes']:.4g}"),
                _number(row["seconds"], f"{row['seconds']:.2g}"),
                _peak(row.get("peak_bytes")),
                *(_metric(row["metrics"].get(name)) for name in metrics),
                _text(row.get("status", OK)),
            ]
            for row in rows
        ],
    }


def _text(text: Any) -> dict[str, str]:
    return {"shown": str(text), "value": str(text)}


def _number(value: float | None, shown: str) -> dict[str, str]:
    return {"shown": shown, "value": "" if value is None else repr(float(value))}


def _peak(found: int | None) -> dict[str, str]:
    return _number(None, "–") if found is None else _number(found, f"{found / 2**20:.3g}")


def _metric(found: Mapping[str, Any] | None) -> dict[str, str]:
    if found is None or found["value"] is None:
        return _number(None, "–")
    return _number(found["value"], number(found["value"], found.get("stderr")))


def _orders(folder: Path) -> dict[str, Any] | None:
    """The certificates of an orders.json in the folder; None where there is none to read."""
    try:
        found = json.loads((folder / ORDERS).read_text(encoding="utf-8"))
        return {
            "passed": found["passed"],
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


def _facts(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts = [(key.replace("_", " "), str(v)) for key, v in environment.items() if key != "versions"]
    return facts + [(name, str(v)) for name, v in environment["versions"].items() if v]


def _placed(chart: Chart, figures: dict[str, Any]) -> dict[str, str]:
    return {"title": chart.title, "words": chart.words, "id": _kept(chart.figure, figures)}


def _kept(figure: Mapping[str, Any], figures: dict[str, Any]) -> str:
    name = f"f{len(figures)}"
    figures[name] = plain(figure)
    return name


def _embedded(value: Any) -> str:
    """JSON that no text in it can end early: as it stands inside a script element."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _read(name: str) -> str:
    return resources.files("experiments.reporting").joinpath(name).read_text("utf-8")
