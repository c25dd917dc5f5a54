"""A recipe's figures on the console."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from experiments.canvas import in_order
from experiments.recipe_cells import COMPARISON, SWEEP
from experiments.recipe_run import Cooked
from experiments.tables import number

__all__ = ["recipe_tables"]

Rows = Sequence[Mapping[str, Any]]
_WORDS = {
    "frechet": "Fréchet",
    "accuracy": "accuracy",
    "own_accuracy": "its own",
    "variance": "variance",
    "recall": "recall",
}


def recipe_tables(cooked: Cooked) -> list[Table]:
    """One table of solvers for each model, and one of guidance scales."""
    tables = []
    for part in (COMPARISON, SWEEP):
        rows = [row for row in cooked.rows if row["part"] == part]
        for target in in_order([row["target"] for row in rows]):
            here = [row for row in rows if row["target"] == target]
            tables.append(_table(target, part, here, cooked))
    return tables


def _table(target: str, part: str, rows: Rows, cooked: Cooked) -> Table:
    # A classifier that did not guide has no say on unguided samples.
    shown = [name for name in _WORDS if part == SWEEP or name != "own_accuracy"]
    metrics = [name for name in shown if any(name in row["metrics"] for row in rows)]
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, title_justify="left")
    table.title = f"{target}: {rows[0]['samples']:,} samples, {rows[0]['repeats']} repeats"
    first = "solver" if part == COMPARISON else f"guidance, {rows[0]['spec']}"
    table.add_column(first, overflow="fold", min_width=30)
    table.add_column("NFE", justify="right")
    for name in metrics:
        table.add_column(_WORDS[name], justify="right", no_wrap=True)
    for row in rows:
        what = row["solver_label"] if part == COMPARISON else row["guided_by"]
        found = [row["metrics"].get(name) for name in metrics]
        table.add_row(what, f"{row['nfe']:g}", *(number(**f) if f else "" for f in found))
    table.add_section()
    floor = [cooked.floor.get(name) for name in metrics]
    table.add_row("held-out data", "", *(number(*f) if f else "" for f in floor), style="italic")
    return table
