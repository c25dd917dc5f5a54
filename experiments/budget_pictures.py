"""An error budget as stacked bars and tables; a network's error by time as curves."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from matplotlib.axes import Axes
from rich import box
from rich.table import Table
from rich.text import Text

from experiments.budget_problem import ORDER
from experiments.canvas import COLOURS, GREY, Look, in_order, picture
from experiments.error_budget import BudgetOutcome, BudgetRow, Part
from experiments.network_error import NetworkError
from experiments.tables import FAINT, FLOOR

PART_WORDS = {
    "truncation": "truncation at t_min",
    "prior_mismatch": "prior mismatch at T",
    "score_error": "score error",
    "rest": "the rest (network, prior)",
    "discretisation": "discretisation",
}
_COLOURS = dict(
    zip(ORDER, (COLOURS[2], COLOURS[4], COLOURS[3], COLOURS[5], COLOURS[0]), strict=True)
)


def budget_bars(path: str | os.PathLike[str], name: str, rows: Sequence[BudgetRow]) -> None:
    """Stacked bars: a panel for each SDE, a bar for each solver and number of evaluations.

    Args:
        path: the PNG to write.
        name: of the target or the model.
        rows: at least one.
    """
    sdes = in_order([row.sde for row in rows])
    most = max(sum(row.sde == sde for row in rows) for sde in sdes)
    height = (1.2 + 0.24 * most) * len(sdes) + 0.7
    with picture(path, height=height) as figure:
        axes = figure.subplots(len(sdes), 1, squeeze=False, sharex=True)[:, 0]
        for ax, sde in zip(axes, sdes, strict=True):
            here = [row for row in rows if row.sde == sde]
            _bars(ax, here)
            ax.set_title(f"{name} · {sde}", loc="left")
        axes[-1].set_xlabel(
            "Energy distance, rooted (the parts add up to at least the distance from the data)"
        )
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)


def _bars(ax: Axes, rows: Sequence[BudgetRow]) -> None:
    places = list(range(len(rows)))
    left = [0.0] * len(rows)
    for name in ORDER:
        parts = [row.parts.get(name) for row in rows]
        if not any(parts):
            continue
        widths = [0.0 if part is None else part.value for part in parts]
        ax.barh(places, widths, 0.68, left, color=_COLOURS[name], label=PART_WORDS[name])
        left = [a + b for a, b in zip(left, widths, strict=True)]
    floors = [0.0 if row.floor is None else row.floor.value for row in rows]
    if any(floors):
        style = {"facecolor": "none", "edgecolor": GREY, "hatch": "////", "linewidth": 0.5}
        label = "Monte Carlo (floor)"
        ax.barh(places, floors, 0.68, left, label=label, **style)  # type: ignore[arg-type]
    totals = [(i, row.total) for i, row in enumerate(rows) if row.total is not None]
    if totals:
        ends = [part.interval or (part.value, part.value) for _, part in totals]
        values = [part.value for _, part in totals]
        spread = [
            [max(0.0, v - low) for v, (low, _) in zip(values, ends, strict=True)],
            [max(0.0, high - v) for v, (_, high) in zip(values, ends, strict=True)],
        ]
        ax.errorbar(
            values,
            [i for i, _ in totals],
            xerr=spread,
            fmt="D",
            color="black",
            markersize=4,
            elinewidth=0.9,
            capsize=2.5,
            label="measured, floor off (95 %)",
        )
    ax.set_yticks(places, [f"{row.solver}, {row.budget}" for row in rows])
    ax.invert_yaxis()
    ax.set_xlim(left=0)
    ax.grid(axis="y", visible=False)


def network_curves(path: str | os.PathLike[str], found: NetworkError) -> None:
    """A network's error by log-SNR and, where the exact score is known, what solvers make of it."""
    rows = 2 if found.amplified else 1
    with picture(path, height=2.9 * rows + 0.4) as figure:
        axes = figure.subplots(rows, 1, squeeze=False, sharex=True)[:, 0]
        for buckets, label, colour in (
            (found.loss, "denoising score matching loss", GREY),
            (found.error, "error against the exact score", COLOURS[0]),
        ):
            if not buckets:
                continue
            x = [0.5 * (b.half_log_snr_low + b.half_log_snr_high) for b in buckets]
            axes[0].errorbar(
                x,
                [b.mean for b in buckets],
                yerr=[b.stderr for b in buckets],
                color=colour,
                marker="o",
                markersize=4,
                capsize=2,
                label=label,
            )
        axes[0].set_yscale("log")
        axes[0].set_ylabel("mean square, of ε per dimension")
        axes[0].set_title(f"{found.name} · {found.sde}", loc="left")
        axes[0].legend()
        if found.amplified:
            x = [0.5 * (b.half_log_snr_low + b.half_log_snr_high) for b in found.error]
            for k, line in enumerate(found.amplified):
                look = Look(k)
                axes[1].plot(
                    x,
                    [moved or math.nan for moved in line.displacement],  # none: no step there
                    color=look.colour,
                    marker=look.marker,
                    linestyle=look.dash,
                    markersize=4,
                    label=f"{line.solver}, {line.budget}",
                )
            axes[1].set_yscale("log")
            axes[1].set_ylabel("RMS displacement of samples")
            axes[1].set_title(
                "the network's score in one range only, exact outside; no point: no step there",
                loc="left",
            )
            axes[1].legend(ncols=3, fontsize=7.5)
        axes[-1].set_xlabel("half log-SNR, log(α/σ): noise at the left, data at the right")


def budget_tables(outcome: BudgetOutcome) -> list[Table]:
    """One table for each SDE, and one of the network's error by time."""
    tables = []
    for sde in in_order([row.sde for row in outcome.rows]):
        rows = [row for row in outcome.rows if row.sde == sde]
        names = [name for name in ORDER if any(name in row.parts for row in rows)]
        table = _table(f"{sde}  error budget: energy distance, rooted, with 95 % intervals")
        table.add_column("solver, evaluations", no_wrap=True)
        for name in [*names, "total", "floor"]:
            table.add_column(name.replace("_", " "), justify="right")
        for row in rows:
            cells = [_shown(row.parts.get(name)) for name in names]
            floor = Text("·" if row.floor is None else f"{row.floor.value:.2g}", style=FLOOR)
            table.add_row(f"{row.solver}, {row.budget}", *cells, _shown(row.total), floor)
        accuracy = ", ".join(
            f"{kind.upper()} {value:.1g}" for kind, value in outcome.references.get(sde, {}).items()
        )
        table.caption = Text(
            f"<: not told from zero, the interval's upper end. Fine solutions are off by about "
            f"{accuracy}. docs/error-budget.md",
            style=FAINT,
        )
        tables.append(table)
    return tables + [_network_table(found) for found in outcome.networks]


def _network_table(found: NetworkError) -> Table:
    table = _table(f"{found.name}  the network's error by time")
    table.add_column("half log-SNR", no_wrap=True)
    for name, there in (("loss", found.loss), ("score error", found.error)):
        if there:
            table.add_column(name, justify="right")
    for line in found.amplified:
        table.add_column(f"{line.solver}, {line.budget}", justify="right")
    for place, bucket in enumerate(found.loss):
        cells = [f"{bucket.half_log_snr_low:.1f} to {bucket.half_log_snr_high:.1f}"]
        cells.append(f"{bucket.mean:.3g}")
        if found.error:
            cells.append(f"{found.error[place].mean:.2g}")
        cells += [f"×{line.factor[place]:.2g}" for line in found.amplified]
        table.add_row(*cells)
    words = "Mean squares of ε per dimension."
    if found.amplified:
        words += " ×: RMS displacement of samples over the network's RMS error in that range."
    table.caption = Text(words, style=FAINT)
    return table


def _table(title: str) -> Table:
    return Table(
        title=Text(title, style="bold"),
        title_justify="left",
        caption_justify="left",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )


def _shown(part: Part | None) -> Text:
    if part is None:
        return Text("·", style=FAINT)
    interval = part.interval
    if interval is None:
        return Text(f"{part.value:.2g}")
    if not part.resolved:
        return Text(f"< {interval.high:.1g}", style=FAINT)
    return Text(f"{part.value:.3g} ({interval.low:.2g}–{interval.high:.2g})")
