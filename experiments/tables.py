"""Results on the console."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.canvas import in_order
from experiments.metrics import METRICS
from experiments.quality import sde_title

Rows = Sequence[Mapping[str, Any]]
Found = Mapping[str, Any]  # {"value": ..., "stderr": ...}

BEST, TIED, FLOOR, FAINT = "bold green", "green", "italic", "dim"
_SECONDARY = {"accuracy": "label accuracy", "rms": "RMS to fine ODE"}


def make_console(*, error: bool = False) -> Console:
    """The terminal, or a file: a hundred characters wide there, since nobody can widen it."""
    console = Console(stderr=error, highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console = Console(stderr=error, highlight=False, width=max(console.width, 110))
    return console


def wrote(console: Console, folder: Path, names: list[str], started: float) -> None:
    """The last line of a command: which files, and how long it took."""
    seconds = time.monotonic() - started
    files = f" {', '.join(names)}  in {seconds:.0f} s"
    console.print(Text.assemble("wrote ", (f"{folder}/", "bold"), files))


def comparison_tables(rows: Rows) -> list[Table]:
    """One table for each target: solvers down, numbers of evaluations across, SDE after SDE."""
    return [
        _target_table(target, [row for row in rows if row["target"] == target])
        for target in in_order([row["target"] for row in rows])
    ]


def legend(rows: Rows) -> Text:
    """What the colours and columns mean."""
    text = Text()
    text.append("bold", style=BEST)
    text.append(": the best of its column; ")
    text.append("green", style=TIED)
    text.append(
        ": may be (differences by repeat, 5 % error for a column). ± one standard error over "
        "repeats; results.json has 95 % intervals."
    )
    if any(row.get("budget") is None for row in rows):
        text.append(" own steps: the solver chooses them; measured evaluations after @.")
    return text


def number(value: float | None, stderr: float | None = None) -> str:
    """``0.0123 ± 0.0004``: the standard error's first digit (two after a 1), the value as far."""
    if value is None or not math.isfinite(value):
        return "not finite"
    # Repetitions that agree differ by rounding at most, which is no standard error.
    if stderr is None or not math.isfinite(stderr) or stderr <= 1e-12 * abs(value):
        return f"{value:.3g}"
    largest = math.floor(math.log10(max(abs(value), stderr)))
    if largest < -4 or largest > 5:
        return f"{value:.1e} ± {stderr:.0e}"
    first = math.floor(math.log10(stderr))
    digits = max(0, -first + (stderr < 1.95 * 10.0**first))
    return f"{value:.{digits}f} ± {stderr:.{digits}f}"


def _target_table(target: str, rows: Rows) -> Table:
    primary = str(rows[0].get("primary", "energy"))
    info = METRICS[primary]
    budgets = sorted({row["budget"] for row in rows if row["budget"] is not None})
    own = any(row["budget"] is None for row in rows)
    better = "lower" if info.lower_is_better else "higher"
    table = Table(
        title=Text.assemble(
            (target, "bold"),
            f"  {info.label}, {info.unit}; {better} is better",
        ),
        caption=_caption(rows),
        title_justify="left",
        caption_justify="left",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("evaluations")
    for budget in budgets:
        table.add_column(str(budget), justify="right")
    if own:
        table.add_column("own steps", justify="right")
    table.add_column("seconds", justify="right", no_wrap=True)
    several = len({row["guided_by"] for row in rows}) > 1
    for sde, guided_by in dict.fromkeys((str(r["sde"]), str(r["guided_by"])) for r in rows):
        here = [row for row in rows if (row["sde"], row["guided_by"]) == (sde, guided_by)]
        table.add_section()
        title = sde_title(sde) + (f" · {guided_by}" if several else "")
        table.add_row(Text(title, style="bold"))
        _add_solvers(table, here, primary, budgets, own)
        _add_floors(table, here, primary, budgets, own)
    return table


def _add_solvers(table: Table, rows: Rows, primary: str, budgets: Sequence[int], own: bool) -> None:
    told = {b: any((r.get("rank") or [1])[0] > 1 for r in _at(rows, b)) for b in budgets}
    for spec in in_order([row["spec"] for row in rows]):
        line = [row for row in rows if row["spec"] == spec]
        cells: list[Text] = [Text(f"  {spec}")]
        for budget in budgets:
            found = _at(line, budget)
            cells.append(_cell(found[0], primary, told[budget]) if found else Text("·", FAINT))
        if own:
            cells.append(_own(line, primary))
        slowest = max(line, key=lambda row: (row["nfe"], row["seconds"]))
        cells.append(Text(f"{slowest['seconds']:.2g}", style=FAINT))
        table.add_row(*cells)
        for name, words in _SECONDARY.items():
            if any(name in row["metrics"] for row in line):
                _add_secondary(table, line, name, words, budgets, own)


def _add_secondary(
    table: Table, line: Rows, name: str, words: str, budgets: Sequence[int], own: bool
) -> None:
    def shown(found: Rows) -> Text:
        estimate = found[0]["metrics"].get(name) if found else None
        return Text("" if estimate is None else number(estimate["value"]), style=FAINT)

    cells = [Text(f"    {words}", style=FAINT), *(shown(_at(line, b)) for b in budgets)]
    if own:
        cells.append(shown([row for row in line if row["budget"] is None]))
    table.add_row(*cells)


def _add_floors(table: Table, rows: Rows, primary: str, budgets: Sequence[int], own: bool) -> None:
    """The floor: one line, or one for each law where they differ."""
    shown: dict[str, Found] = {}
    for row in rows:
        found = row["floor"].get(primary)
        if found is not None:
            shown.setdefault(_floor_words(row, rows), row["floor"])
    for words, floor in shown.items():
        times = len(budgets) + own
        text = Text(number(**floor[primary]), style=FLOOR)
        table.add_row(Text(f"  {words}", style=FLOOR), *[text] * times)
        if "accuracy" in floor:
            accuracy = Text(number(floor["accuracy"]["value"]), style=FAINT)
            table.add_row(Text("    label accuracy", style=FAINT), *[accuracy] * times)
    if not shown:
        table.add_row(Text("  no floor: the data is not at hand (--data)", style=FLOOR))


def _floor_words(row: Mapping[str, Any], rows: Rows) -> str:
    if len({r["truth"] for r in rows}) == 1:
        return "floor: true vs true"
    return f"floor: {'ODE vs ODE' if 'ODE' in row['truth'] else 'SDE vs SDE'}"


def _cell(row: Mapping[str, Any], metric: str, told: bool) -> Text:
    """A figure; ``told``: whether anything is known of who is best in its column."""
    found = row["metrics"].get(metric)
    if found is None:
        return Text("failed", style="red")
    best, worst = row.get("rank") or (0, 0)
    style = (BEST if worst == 1 else TIED) if best == 1 and told else ""
    return Text(number(**found), style=style)


def _own(line: Rows, metric: str) -> Text:
    found = [row for row in line if row["budget"] is None]
    if not found:
        return Text("·", style=FAINT)
    row = found[0]
    return Text(f"{number(**row['metrics'][metric])} @ {row['nfe']:.4g}")


def _at(rows: Rows, budget: int) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["budget"] == budget]


def _caption(rows: Iterable[Mapping[str, Any]]) -> Text:
    rows = list(rows)
    first = rows[0]
    counts = sorted({row["repeats"] for row in rows})
    repeats = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    truths = in_order([row["truth"] for row in rows])
    classes = in_order([row["classes"] for row in rows if row["classes"]])
    of = f" ({', '.join(classes)})" if classes else ""
    sampled = in_order([row["guided_by"] for row in rows])
    guided = f", {sampled[0]}" if len(sampled) == 1 and sampled[0] != "unguided" else ""
    size = first["samples"] // first["repeats"]
    return Text(
        f"{size:,} samples × {repeats} repeats{of}{guided}, against "
        f"{'; or '.join(truths)}. Seconds: all samples at the most evaluations.",
        style=FAINT,
    )
