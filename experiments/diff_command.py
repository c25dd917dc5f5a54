"""``sde-diffusion diff``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from experiments.failures import FAILED, guarded

if TYPE_CHECKING:
    from rich.table import Table

    from experiments.differences import Change, Differences

FEW = 12  # changes within noise that are listed without --all


@guarded
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="Folder of a run.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Folder of another.")],
    everything: Annotated[
        bool, typer.Option("--all", help="List what is within noise, all of it.")
    ] = False,
    fail_on_change: Annotated[
        bool, typer.Option("--fail-on-change", help="Exit code 1 where something changed.")
    ] = False,
) -> None:
    """What changed from run A to run B, beyond noise.

    Rows are matched by target, SDE, solver, evaluations, guidance and class; repeats of one seed
    are paired. Then what is within noise, what only one run has, and in what settings and
    environment the runs differ.

    [bold]Examples[/bold]

      sde-diffusion diff runs/before runs/after

      sde-diffusion diff runs/before runs/after --fail-on-change
    """
    from experiments.differences import differences
    from experiments.runs import load_run

    found = differences(load_run(a), load_run(b))
    _show(found, everything)
    if fail_on_change and found.changed:
        raise typer.Exit(FAILED)


def _show(found: Differences, everything: bool) -> None:
    from experiments.runs import in_words
    from experiments.tables import make_console

    console = make_console()
    beyond = [change for change in found.changes if change.beyond]
    within = [change for change in found.changes if not change.beyond]
    same = [change for change in within if change.low == change.high == change.difference]
    within = [change for change in within if change not in same]
    if found.facts:
        rows = [(in_words(what), *fact) for what, *fact in found.facts]
        console.print(_table("changed, no noise in it", ("row", "what", "A", "B"), rows))
    if beyond:
        console.print(_changes("changed, beyond noise", beyond))
    if not found.changed:
        console.print("nothing changed, beyond noise")
    if within:
        shown = within if everything else within[:FEW]
        console.print(_changes("within noise", shown))
        if len(shown) < len(within):
            console.print(f"… and {len(within) - len(shown)} more: --all", style="dim")
    if same:
        console.print(f"{len(same)} figures are the same, to rounding")
    if found.incomparable:
        rows = [(in_words(what), why) for what, why in found.incomparable]
        console.print(_table("not comparable", ("row", "A and B"), rows))
    for name, only in (("A", found.only_a), ("B", found.only_b)):
        if only:
            console.print(_table(f"only in {name}", ("row",), [(in_words(what),) for what in only]))
    if found.settings:
        console.print(_table("settings and environment", ("setting", "A", "B"), found.settings))


def _changes(title: str, changes: list[Change]) -> Table:
    from experiments.runs import in_words
    from experiments.tables import number

    rows = []
    for change in changes:
        interval = "one repeat: noise unknown"
        if change.low is not None and change.high is not None:
            interval = f"[{change.low:+.3g}, {change.high:+.3g}]"
        rows.append(
            (
                in_words(change.what),
                change.metric,
                number(change.a),
                number(change.b),
                f"{change.difference:+.3g}",
                interval,
                f"{change.repeats} pairs" if change.repeats else "no",
            )
        )
    return _table(title, ("row", "metric", "A", "B", "B − A", "95 % interval", "paired"), rows)


def _table(title: str, headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.title = Text(title, style="bold")
    table.title_justify = "left"
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
