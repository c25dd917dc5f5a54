"""``sde-diffusion report``."""

from __future__ import annotations

from typing import Annotated

import typer

from experiments.failures import guarded


@guarded
def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run.")],
    out: Annotated[
        str | None, typer.Option(help="The HTML file to write. Default: report.html in RUN.")
    ] = None,
    trajectories: Annotated[
        bool,
        typer.Option(help="Sample each target once more, for the slider from noise to data."),
    ] = True,
) -> None:
    """One HTML page of a run, with everything in it: it needs no network and no server.

    Summary, sortable table, quality against evaluations and seconds with intervals and Pareto
    front, samples, a slider from noise to data, environment and command. Certificates too, where
    orders.json lies in the folder. Needs the extra report.

    [bold]Examples[/bold]

      sde-diffusion report runs/mine

      sde-diffusion report runs/mine --out mine.html --no-trajectories
    """
    from experiments.reporting.page import check_report, write_report
    from experiments.runs import load_run
    from experiments.tables import make_console

    found = load_run(run)
    check_report(found, out)
    path = write_report(found, out, trajectories=trajectories)
    size = path.stat().st_size / 2**20
    make_console().print(f"wrote {path} ({size:.1f} MiB); open it in a browser")
