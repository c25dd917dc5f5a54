"""An error budget as stacked bars and tables; a network's error by time as curves."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from rich import box
from rich.table import Table
from rich.text import Text

from experiments.budget_parts import ORDER, Part
from experiments.budget_rows import BudgetOutcome, BudgetRow
from experiments.canvas import COLOURS, GREY, Look, picture
from experiments.network_error import NetworkError
from experiments.records import OK
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
        rows: at least one that has not failed.
    """
    panels = by_panel([row for row in rows if row.status == OK])
    sizes = [len(here) for here in panels.values()]
    height = sum(1.0 + 0.24 * size for size in sizes) + 0.9
    with picture(path, height=height) as figure:
        axes = figure.subplots(
            len(panels), 1, squeeze=False, sharex=True, height_ratios=[1 + n for n in sizes]
        )[:, 0]
        for ax, (panel, here) in zip(axes, panels.items(), strict=True):
            _bars(ax, here)
            ax.set_title(" · ".join([name, *filter(None, panel)]), loc="left")
        axes[-1].set_xlabel(
            "Energy distance, rooted (the parts add up to at least the distance from the law)"
        )
        named: dict[str, Artist] = {}
        for ax in axes:
            handles, labels = ax.get_legend_handles_labels()
            named |= dict(zip(labels, handles, strict=True))
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=3)


def by_panel(rows: Sequence[BudgetRow]) -> dict[tuple[str, str], list[BudgetRow]]:
    """The rows of each SDE and condition, in order."""
    found: dict[tuple[str, str], list[BudgetRow]] = {}
    for row in rows:
        found.setdefault(row.panel, []).append(row)
    return found


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
    ax.set_yticks(places, [row.name for row in rows])
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
    """One table for each SDE and condition, and one of the network's error by time."""
    tables = []
    for panel, rows in by_panel(outcome.rows).items():
        names = [name for name in ORDER if any(name in row.parts for row in rows)]
        where = " · ".join(filter(None, panel))
        table = _table(f"{where}  error budget: energy distance, rooted, with 95 % intervals")
        table.add_column("solver, evaluations", no_wrap=True)
        for name in [*names, "total", "floor"]:
            table.add_column(name.replace("_", " "), justify="right")
        for row in rows:
            cells = [_shown(row.parts.get(name)) for name in names]
            floor = Text("·" if row.floor is None else f"{row.floor.value:.2g}", style=FLOOR)
            if row.status != OK:
                cells, floor = [Text("")] * len(names), Text(row.status, style="red")
            table.add_row(row.name, *cells, _shown(row.total), floor)
        off = outcome.references.get(panel, {})
        accuracy = ", ".join(f"{equation} {value:.1g}" for equation, value in off.items())
        table.caption = Text(
            f"<: not told from zero, the interval's upper end. Fine solutions are off by about "
            f"{accuracy or 'an unknown amount'}. docs/error-budget.md",
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
