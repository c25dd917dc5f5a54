"""What ``sde-diffusion guidance`` prints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from experiments.breaking import Breaking
from experiments.conditions import interval_name
from experiments.guidance_pictures import draw_guidance
from experiments.guidance_run import GuidanceOptions, Line, make_plan, run
from experiments.progress import ProgressBar
from experiments.tables import make_console, number, wrote
from experiments.timing import Timing

__all__ = ["breaking_text", "run_guidance"]

_COLUMNS = {
    "accuracy": "accuracy",
    "frechet": "Fréchet",
    "energy": "energy",
    "variance": "variance",
    "recall": "recall",
    "saturation": "saturated",
    "relative": "error",
}


def run_guidance(
    options: GuidanceOptions, write_to: str | None = None, timing: Timing | None = None
) -> int:
    """``sde-diffusion guidance``; how many rows failed.

    Args:
        write_to: only check the options and write them to this experiment file; ``-``: print it.
        timing: begun where the command began.
    """
    timing = timing or Timing()
    plan = make_plan(options)
    if write_to is not None:
        plan.file.put(options, write_to)
        return 0
    with ProgressBar() as bar:
        outcome, lines = run(plan, bar, timing)
        bar.now("pictures")
        paths = draw_guidance(outcome, lines)
    outcome.folder.timing = timing.as_dict()
    outcome.folder.write()
    console = make_console()
    rows = outcome.folder.rows
    for place in dict.fromkeys((row["target"], row["sde"]) for row in rows):
        here = [row for row in rows if (row["target"], row["sde"]) == place]
        console.print(_figures(here, f"{place[0]} · {place[1].upper()}"))
    console.print(_breaks(lines, options.tolerance))
    for row in outcome.failed:
        where = f"{row['target']} · {row['guided_by']} · {row['spec']} · {row['budget']}"
        console.print(Text.assemble((f"{row['status']}: ", "red"), f"{where}: {row['error']}"))
    files = ["results.json", "cells.parquet", *(path.name for path in paths)]
    wrote(console, outcome.folder.path, files, timing.started)
    return len(outcome.failed)


def breaking_text(breaking: Breaking | None, scales: Sequence[float]) -> str:
    """A threshold in words: "2.7 (2.6–2.8)", "> 8" where the solver holds at all scales."""
    if breaking is None:
        return "its own noise"
    if breaking.scale == math.inf:
        return f"> {max(scales):g}"
    if breaking.scale == -math.inf:
        return f"< {min(scales):g}"
    low = f"{breaking.low:.2g}" if breaking.low > -math.inf else f"<{min(scales):g}"
    high = f"{breaking.high:.2g}" if breaking.high < math.inf else f">{max(scales):g}"
    return f"{breaking.scale:.2g} ({low}–{high})"


def _figures(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.title, table.title_justify = Text(title, style="bold"), "left"
    present = [name for name in _COLUMNS if any(name in row["metrics"] for row in rows)]
    table.add_column("guidance, solver", no_wrap=True)
    table.add_column("NFE", justify="right")
    for name in present:
        table.add_column(_COLUMNS[name], justify="right", no_wrap=True)
    floor = rows[0]["floor"]
    known = [_short(floor.get(name)) for name in present]
    table.add_row(Text("real data", style="dim"), "", *known)
    for guided in dict.fromkeys(row["guided_by"] for row in rows):
        table.add_section()
        table.add_row(Text(guided, style="bold"))
        for row in (r for r in rows if r["guided_by"] == guided):
            found = row["metrics"]
            values = [_short(found.get(name)) for name in present]
            table.add_row(Text(f"  {row['spec']}"), f"{row['nfe']:.4g}", *values)
    table.caption = Text(
        "variance: within classes, real data is 1; saturated: share of values beyond the data's "
        "range; error: RMS distance to the fine guided ODE from the same noise, in deviations of "
        "the data (solvers without noise of their own).",
        style="dim",
    )
    table.caption_justify = "left"
    return table


def _short(found: Mapping[str, float | None] | None) -> str:
    return "" if found is None else number(**found).replace(" ± ", "±")


def _breaks(lines: Sequence[Line], tolerance: float) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.title = Text(f"breaks at γ: error above {tolerance:g} deviations of the data")
    table.title_justify = "left"
    table.add_column("guidance")
    table.add_column("solver")
    budgets = list(dict.fromkeys(line.budget for line in lines))
    for budget in budgets:
        table.add_column("own steps" if budget is None else f"{budget} NFE", justify="right")
    shown = [line for line in lines if line.breaking is not None]
    for place in dict.fromkeys((n.target, n.sde, n.guidance, n.interval, n.solver) for n in shown):
        at = {
            n.budget: breaking_text(n.breaking, n.scales)
            for n in shown
            if (n.target, n.sde, n.guidance, n.interval, n.solver) == place
        }
        where = "" if place[3] is None else f" in {interval_name(place[3])}"
        name = f"{place[0]} · {place[1].upper()} · {place[2]}{where}"
        table.add_row(name, place[4], *(at.get(budget, "") for budget in budgets))
    return table
