"""The pictures of a guidance run: figures against scale, intervals, and the samples themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from experiments.canvas import COLOURS, DASHES, GREY, MARKERS, in_order, picture
from experiments.compare import Outcome, PlannedCell
from experiments.conditions import interval_name
from experiments.guidance_run import PICTURES, GuidanceOptions, Interval, Line
from experiments.metrics import METRICS
from experiments.pictures import SampleGroup, samples_figure
from experiments.spec import spec_of

__all__ = ["draw_guidance"]

Row = Mapping[str, Any]
_PANELS = ("accuracy", "frechet", "energy", "recall", "variance", "saturation", "relative")
_LOGARITHMIC = ("frechet", "energy", "relative", "variance")
_SHOWN = 300  # samples in a panel


def draw_guidance(outcome: Outcome, lines: Sequence[Line]) -> list[Path]:
    """guidance.png, guidance_samples.png, and guidance_intervals.png where there are several."""
    folder, rows = outcome.folder.path, [r for r in outcome.folder.rows if r["metrics"]]
    if not rows:
        return []
    options = outcome.plan.options
    tolerance = options.tolerance if isinstance(options, GuidanceOptions) else math.nan
    budgets = in_order([row["budget"] for row in rows])
    solvers = in_order([row["spec"] for row in rows])
    intervals = list(dict.fromkeys(line.interval for line in lines))
    first = None if None in intervals else intervals[0]

    def by_solver(row: Row) -> tuple[str, Look] | None:
        if not _in(row, first):
            return None
        k, n = solvers.index(row["spec"]), budgets.index(row["budget"])
        count = "" if row["budget"] is None else f", {row['budget']} evaluations"
        return f"{row['spec']}{count}", (COLOURS[k % 7], MARKERS[n % 7], DASHES[-1 - n % 3])

    paths = [folder / PICTURES[0]]
    _figure(paths[0], rows, [by_solver], tolerance)
    if len(intervals) > 1:
        paths.append(folder / PICTURES[1])
        _figure(
            paths[-1],
            _one_solver(rows),
            [_by_interval(i, k) for k, i in enumerate(intervals)],
            tolerance,
        )
    groups = _groups(outcome, first)
    if groups:
        paths.append(folder / PICTURES[2])
        samples_figure(paths[-1], groups, columns=max(len(g.panels) + 1 for g in groups))
    return paths


Look = tuple[str, str, Any]
LineOf = Callable[[Row], tuple[str, Look] | None]


def _by_interval(interval: Interval, k: int) -> LineOf:
    def line_of(row: Row) -> tuple[str, Look] | None:
        if not _in(row, interval):
            return None
        return interval_name(interval), (COLOURS[k % 7], MARKERS[k % 7], DASHES[0])

    return line_of


def _in(row: Row, interval: Interval) -> bool:
    """Whether a row belongs to a line; at γ = 1 to those of every interval."""
    own = row["interval"]
    return row["scale"] == 1 or (None if own is None else tuple(own)) == interval


def _one_solver(rows: Sequence[Row]) -> list[Row]:
    """The first solver's, at its most evaluations."""
    own = [row for row in rows if row["spec"] == rows[0]["spec"]]
    most = max((row["budget"] or 0) for row in own)
    return [row for row in own if (row["budget"] or 0) == most]


def _figure(path: Path, rows: Sequence[Row], lines: Sequence[LineOf], tolerance: float) -> None:
    """A row of panels per metric, a column per target, SDE and guidance."""
    present = [name for name in _PANELS if any(name in row["metrics"] for row in rows)]
    columns = list(dict.fromkeys((r["target"], r["sde"], r["guidance"]) for r in rows))
    width = max(8.0, 3.6 * len(columns))
    handles: dict[str, Line2D] = {}
    with picture(path, height=0.9 + 1.75 * len(present), width=width) as figure:
        grid = figure.subplots(
            len(present), len(columns), squeeze=False, sharey="row", sharex="col"
        )
        for j, column in enumerate(columns):
            here = [r for r in rows if (r["target"], r["sde"], r["guidance"]) == column]
            for i, name in enumerate(present):
                ax = grid[i, j]
                for line_of in lines:
                    handles |= _lines(ax, here, name, line_of)
                _references(ax, here, name, tolerance)
                _scales(ax, here)
                if name in _LOGARITHMIC:
                    ax.set_yscale("log")
                    ax.yaxis.set_minor_formatter(NullFormatter())
                    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
                else:
                    ax.set_ylim(-0.03, 1.03)
            grid[0, j].set_title(f"{column[0]} · {column[1].upper()} · {column[2]}", loc="left")
            grid[-1, j].set_xlabel("Scale γ")
        for i, name in enumerate(present):
            info = METRICS[name]
            grid[i, 0].set_ylabel(f"{info.label}\n({info.unit})", fontsize=8)
        handles["real data"] = Line2D([], [], color=GREY, linestyle=(0, (4, 2)), linewidth=1)
        handles["tolerance"] = Line2D([], [], color="black", linewidth=0.8)
        names = list(handles)
        figure.legend(
            [handles[name] for name in names],
            names,
            loc="outside upper center",
            ncols=3 if len(names) > 4 else len(names),
            fontsize=8.5,
        )


def _lines(ax: Axes, rows: Sequence[Row], name: str, line_of: LineOf) -> dict[str, Line2D]:
    found: dict[str, tuple[Look, list[tuple[float, float, float]]]] = {}
    for row in rows:
        line, value = line_of(row), row["metrics"].get(name)
        if line is None or value is None or value["value"] is None:
            continue
        point = (row["scale"], value["value"], value["stderr"] or 0.0)
        found.setdefault(line[0], (line[1], []))[1].append(point)
    handles = {}
    for label, ((colour, marker, dash), points) in found.items():
        x, y, bars = (np.asarray(column) for column in zip(*sorted(points), strict=True))
        style = {"color": colour, "marker": marker, "linestyle": dash, "markersize": 4.2}
        lower = np.minimum(bars, 0.9 * np.abs(y)) if name in _LOGARITHMIC else bars
        ax.errorbar(
            x,
            y,
            yerr=np.stack([lower, bars]),
            linewidth=1.3,
            elinewidth=0.9,
            markeredgecolor="white",
            markeredgewidth=0.4,
            **style,
        )
        handles[label] = Line2D([], [], linewidth=1.3, **style)
    return handles


def _references(ax: Axes, rows: Sequence[Row], name: str, tolerance: float) -> None:
    floor = rows[0]["floor"].get(name)
    if floor is not None and floor["value"]:
        ax.axhline(floor["value"], color=GREY, linestyle=(0, (4, 2)), linewidth=1.0, zorder=1)
    if name == "relative":
        ax.axhline(tolerance, color="black", linewidth=0.8, zorder=1)


def _scales(ax: Axes, rows: Sequence[Row]) -> None:
    scales = sorted({row["scale"] for row in rows})
    if scales[0] > 0:
        ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator(scales))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))


def _groups(outcome: Outcome, interval: Interval) -> list[SampleGroup]:
    """The first solver's samples at its fewest and most evaluations, a panel for each scale."""
    plan = outcome.plan
    first = outcome.finished[0]
    own = [
        p
        for p in outcome.finished
        if (p.subject is first.subject, p.cell.sde, p.cell.solver)
        == (True, first.cell.sde, first.cell.solver)
        and (p.cell.condition.scale == 1 or p.cell.condition.interval == interval)
    ]
    budgets = sorted({p.budget or 0 for p in own})
    groups = []
    for guidance in dict.fromkeys(p.cell.condition.guidance for p in own):
        for budget in dict.fromkeys((budgets[0], budgets[-1])):
            here = [
                p
                for p in own
                if p.cell.condition.guidance == guidance and (p.budget or 0) == budget
            ]
            judge = plan.judge(first)
            title = f"{first.subject.name} · {first.cell.sde.upper()} · {guidance} · "
            title += f"{spec_of(first.cell.solver)}, {budget} evaluations"
            truth = judge.true_samples(first.cell, 0)
            groups.append(
                SampleGroup(
                    title=title,
                    panels={_name(p): outcome.samples(p, _SHOWN) for p in here},
                    truth=None if truth is None else truth[:_SHOWN],
                    truth_name="real data",
                )
            )
    return groups


def _name(planned: PlannedCell) -> str:
    return f"γ = {planned.cell.condition.scale:g}"
