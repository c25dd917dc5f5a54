"""``sde-diffusion merge``."""

from __future__ import annotations

from typing import Annotated

import typer

from experiments.failures import guarded
from experiments.options import OUT_HELP


@guarded
def merge(
    a: Annotated[
        str,
        typer.Argument(metavar="A", help="Folder of a run of compare, guidance or error-budget."),
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="Folder of another of the same command.")],
    out: Annotated[str, typer.Option(help=OUT_HELP)],
) -> None:
    """Two runs in one folder: the union of their cells, all repeats of a row taken together.

    Of compare, guidance or error-budget, both of the same. A cell that both hold must have the same
    figures in both.

    [bold]Example[/bold]

      sde-diffusion merge runs/monday runs/tuesday --out runs/both
    """
    from experiments.merging import merge as merged
    from experiments.results import command_line
    from experiments.runs import load_run
    from experiments.tables import make_console

    path = merged(load_run(a), load_run(b), out, command_line())
    rows = load_run(path).rows
    make_console().print(f"wrote {path}/ results.json, cells.parquet: {len(rows)} rows")
