"""Curves from the rows of results.json: quality against cost, error against steps."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from experiments.asymptotics import ErrorLaw
from experiments.canvas import GREY, Look, in_order, picture
from experiments.law_pictures import draw_law, hollow, law_text, shade_region
from experiments.metrics import METRICS, MetricInfo
from experiments.quality import Rows, figure_of, primary_metric, sde_title
from experiments.slopes import Slope, fit_slope

Floor = Mapping[str, Mapping[str, Mapping[str, float | None]]]


def quality_vs_nfe(
    path: str | os.PathLike[str],
    rows: Rows,
    floor: Floor | None = None,
    *,
    metrics: Mapping[str, str] | None = None,
) -> None:
    """Log–log curves of quality against score evaluations: a panel per target and SDE.

    Args:
        path: the PNG to write.
        rows: as in results.json; rows without a finite value of the metric are left out.
        floor: as in results.json; drawn as a band of one standard error around a dashed line.
        metrics: target -> metric; by default the first of Fréchet, energy, sliced W2, ... it has.
    Raises:
        ValueError: no row can be drawn.
    """
    _quality(path, rows, floor or {}, metrics or {}, "nfe", "Score evaluations per sample (NFE)")


def quality_vs_seconds(
    path: str | os.PathLike[str],
    rows: Rows,
    floor: Floor | None = None,
    *,
    metrics: Mapping[str, str] | None = None,
) -> None:
    """Log–log curves of quality against wall seconds of sampling; see :func:`quality_vs_nfe`."""
    sizes = {row.get("samples") for row in rows}
    size = sizes.pop() if len(sizes) == 1 else None
    label = f"Wall time to draw {size:,} samples (s)" if size else "Wall time of sampling (s)"
    _quality(path, rows, floor or {}, metrics or {}, "seconds", label)


def error_vs_steps(
    path: str | os.PathLike[str],
    rows: Rows,
    *,
    metric: str = "rms",
    rounding: float = 0.0,
    laws: Mapping[tuple[str, str, str], ErrorLaw] | None = None,
) -> None:
    """Error against step count, with the fitted order of each sampler in the panel's legend.

    Args:
        path: the PNG to write.
        rows: as in results.json, with ``steps`` and ``metric``.
        metric: whose value is the error.
        rounding: error below which only rounding is measured; such grids are not fitted. A row's
            own ``error_floor`` may be higher.
        laws: (target, SDE, sampler) -> its law, drawn with its band instead of a fitted line; grids
            outside its region are hollow, and the region of all samplers is shaded.
    Raises:
        ValueError: no row can be drawn.
    """
    drawn = [row for row in rows if row.get("steps") and figure_of(row, metric) is not None]
    solvers, targets, sdes = _axes_of(drawn, metric)
    each = 3.3 + 0.19 * (len(solvers) + 1)
    legend = 0.078 * (max(map(len, solvers)) + len(": 2.00 (1.95–2.05) on 16–128")) + 0.4  # inches
    with picture(
        path, height=0.7 + each * len(targets), width=0.7 + max(4.4, legend) * len(sdes)
    ) as figure:
        grid = _panels(figure, targets, sdes)
        for i, target in enumerate(targets):
            for j, sde in enumerate(sdes):
                ax = grid[i, j]
                here = [r for r in drawn if (r["target"], r["sde"]) == (target, sde)]
                entries: list[tuple[Line2D, str]] = []
                known: list[ErrorLaw] = []
                for k, solver in enumerate(solvers):
                    line = [r for r in here if row_label(r, drawn) == solver]
                    if not line:
                        continue
                    x, y, _ = _draw(ax, line, "steps", metric, Look(k), joined=False)
                    law = (laws or {}).get((target, sde, solver))
                    if law is not None:
                        known.append(law)
                        draw_law(ax, law, Look(k), list(x))
                        hollow(ax, law, Look(k), x, y)
                        entries.append((_handle(Look(k)), f"{solver}: {law_text(law)}"))
                        continue
                    floor = max([rounding, *(r.get("error_floor") or 0.0 for r in line)])
                    slope = fit_slope([int(n) for n in x], list(y), floor=floor)
                    handle = _handle(Look(k))
                    if slope is None:
                        entries.append((handle, solver))
                        continue
                    ends = np.array([x.min(), slope.first, slope.last])
                    fit = [slope.error(n) for n in ends]
                    ax.plot(ends[1:], fit[1:], color=Look(k).colour, linewidth=1.4)
                    ax.plot(ends[:2], fit[:2], color=Look(k).colour, linewidth=0.8, dashes=(3, 2))
                    entries.append((handle, f"{solver}: {_order(slope)}"))
                shade_region(ax, known)
                _look_at_errors(ax, [figure_of(row, metric) or 0.0 for row in here])
                _finish(ax, here, "steps", METRICS.get(metric))
                ax.set_title(f"{target} · {sde_title(sde)}", loc="left")
                if entries:
                    ax.legend(
                        *zip(*entries, strict=True),
                        title="fitted order (95 %)" if known else "fitted order",
                        title_fontsize=8.5,
                        fontsize=8.5,
                        loc="upper left",
                        bbox_to_anchor=(0.0, -0.14),  # below the axis, where no curve runs
                        borderaxespad=0.0,
                        handlelength=1.2,
                    )
            grid[i, 0].set_ylabel(_metric_label(metric))
        for ax in grid[-1]:
            ax.set_xlabel("Steps")


def _look_at_errors(ax: Axes, values: Sequence[float]) -> None:
    """Half a decade around what was measured: bands of little data go on for many."""
    measured = [value for value in values if value > 0]
    if measured:
        ax.set_ylim(min(measured) / 3, max(measured) * 3)


def row_label(row: Mapping[str, Any], rows: Rows = ()) -> str:
    """A row's name in a legend: its ``label`` or solver, and the settings that tell it apart."""
    given = row.get("solver_label")
    name = str(given or row["solver"])
    if not given:
        variants = [r["settings"] for r in rows if r["solver"] == row["solver"]]
        differing = sorted(
            {k for s in variants for k in s if any(v.get(k) != s[k] for v in variants)}
        )
        shown = [f"{k}={_short(row['settings'].get(k))}" for k in differing]
        if shown:
            name += f" ({', '.join(shown)})"
    guidances = {(r["guidance"], r["scale"]) for r in rows}
    if len(guidances) > 1:
        scale = "" if row["scale"] is None else f" γ={row['scale']:g}"
        name += f", {'unguided' if row['guidance'] == 'none' else row['guidance'] + scale}"
    return name


def _quality(
    path: str | os.PathLike[str],
    rows: Rows,
    floor: Floor,
    metrics: Mapping[str, str],
    x_key: str,
    x_label: str,
) -> None:
    chosen = {
        target: metrics.get(target) or primary_metric(rows, target)
        for target in in_order([row["target"] for row in rows])
    }
    drawn = [
        row for row in rows if figure_of(row, chosen[row["target"]]) is not None and row[x_key] > 0
    ]
    solvers, targets, sdes = _axes_of(drawn, " or ".join(sorted({str(m) for m in chosen.values()})))
    with picture(path, height=0.75 + 2.75 * len(targets)) as figure:
        grid = _panels(figure, targets, sdes)
        handles: list[ErrorbarContainer | Line2D | tuple[Any, ...]] = []
        names: list[str] = []
        with_floor = False
        for i, target in enumerate(targets):
            metric = str(chosen[target])
            info = METRICS.get(metric)
            bottom = floor.get(target, {}).get(metric)
            for j, sde in enumerate(sdes):
                ax = grid[i, j]
                here = [r for r in drawn if (r["target"], r["sde"]) == (target, sde)]
                for k, solver in enumerate(solvers):
                    line = [r for r in here if row_label(r, drawn) == solver]
                    if line:
                        _draw(ax, line, x_key, metric, Look(k))
                with_floor |= _draw_floor(ax, bottom)
                _finish(ax, here, x_key, info)
                ax.set_title(f"{target} · {sde_title(sde)}", loc="left")
            grid[i, 0].set_ylabel(_metric_label(metric))
        for ax in grid[-1]:
            ax.set_xlabel(x_label)
        for k, solver in enumerate(solvers):
            look = Look(k)
            handles.append(
                Line2D([], [], color=look.colour, marker=look.marker, linestyle=look.dash)
            )
            names.append(solver)
        if with_floor:
            handles.append(
                (
                    Patch(facecolor=GREY, alpha=0.25, linewidth=0),
                    Line2D([], [], color=GREY, linestyle=(0, (4, 2)), linewidth=1),
                )
            )
            names.append("floor (true vs true)")
        _shared_legend(figure, handles, names)
        figure.supxlabel(
            "Bars and band: ± 1 standard error over repetitions.", fontsize=8, color=GREY
        )


def _handle(look: Look) -> Line2D:
    return Line2D([], [], color=look.colour, marker=look.marker, markersize=5)


def _shared_legend(figure: Figure, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Above the panels, in as few even rows as the width allows (about 110 characters)."""
    columns = len(names)
    while columns > 1 and columns * (max(map(len, names)) + 7) > 125:
        if columns == len(names) and sum(len(name) + 7 for name in names) <= 118:
            break
        columns -= 1
    columns = math.ceil(len(names) / math.ceil(len(names) / columns))
    figure.legend(
        handles,
        names,
        loc="outside upper center",
        ncols=columns,
        columnspacing=1.3,
        handlelength=1.9,
        handletextpad=0.5,
    )


def _draw(
    ax: Axes, line: Rows, x_key: str, metric: str, look: Look, *, joined: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One solver's points with error bars; returns x, value and standard error, ordered by x."""
    points = sorted(
        (
            float(r[x_key]),
            float(r["metrics"][metric]["value"]),
            r["metrics"][metric]["stderr"] or 0.0,
        )
        for r in line
    )
    x, y, bars = (np.asarray(column) for column in zip(*points, strict=True))
    lower = np.minimum(bars, 0.9 * np.abs(y))  # a bar down to zero has no end on a log axis
    ax.errorbar(
        x,
        y,
        yerr=np.stack([lower, bars]),
        color=look.colour,
        marker=look.marker,
        linestyle=look.dash if joined else "none",
        linewidth=1.6,
        markersize=4.8,
        markeredgecolor="white",
        markeredgewidth=0.5,
        elinewidth=1.0,
        capsize=2.2,
        capthick=1.0,
        zorder=3,
    )
    return x, y, bars


def _draw_floor(ax: Axes, found: Mapping[str, float | None] | None) -> bool:
    value = found.get("value") if found else None
    if found is None or value is None:
        return False
    spread = found.get("stderr") or 0.0
    ax.axhline(value, color=GREY, linestyle=(0, (4, 2)), linewidth=1.0, zorder=1)
    if spread:
        low = max(value - spread, 0.1 * abs(value))
        ax.axhspan(low, value + spread, color=GREY, alpha=0.25, linewidth=0, zorder=0.5)
    return True


def _finish(ax: Axes, rows: Rows, x_key: str, info: MetricInfo | None) -> None:
    """Scales and ticks: NFE and steps at the values that were run, 1-2-5 where a decade is wide."""
    ax.set_xscale("log")
    if info is None or info.lower_is_better:
        ax.set_yscale("log")
        low, high = ax.get_ylim()
        narrow = high / max(low, 1e-300) < 30
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,)))
        ax.yaxis.set_minor_formatter(NullFormatter())
        if low > 1e-4 and high < 1e5:
            ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    else:
        ax.set_ylim(-0.02, 1.02)
    ticks = sorted({row[x_key] for row in rows})
    if x_key != "seconds" and ticks:
        spread: list[float] = []
        for tick in reversed(ticks):  # numbers closer than 25 % would overlap
            if not spread or spread[-1] / tick > 1.35:
                spread.append(tick)
        ax.xaxis.set_major_locator(FixedLocator(spread))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    else:
        low, high = ax.get_xlim()
        if high / low < 200:
            ax.xaxis.set_major_locator(
                LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 30 else (1.0,))
            )
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))


def _panels(figure: Figure, targets: Sequence[str], sdes: Sequence[str]) -> np.ndarray:
    return np.asarray(
        figure.subplots(len(targets), len(sdes), squeeze=False, sharey="row", sharex=False)
    )


def _axes_of(rows: Rows, what: str) -> tuple[list[str], list[str], list[str]]:
    if not rows:
        raise ValueError(f"no row has a finite value of {what or 'any metric'}: nothing to draw")
    return (
        in_order([row_label(row, rows) for row in rows]),
        in_order([row["target"] for row in rows]),
        in_order([row["sde"] for row in rows]),
    )


def _metric_label(metric: str) -> str:
    info = METRICS.get(metric)
    return metric if info is None else f"{info.label}\n({info.unit})"


def _order(slope: Slope) -> str:
    if slope.stderr is None:
        return f"{slope.order:.2f}"
    error = f"± {slope.stderr:.2f}" if slope.stderr >= 0.005 else "± <0.01"
    return f"{slope.order:.2f} {error}"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
