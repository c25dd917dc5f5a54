"""``sde-diffusion report``."""

from __future__ import annotations

from typing import Annotated

import typer

from experiments.failures import guarded


@guarded
def report(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="Folder of a run of compare, guidance, steps, error-budget, recipe or orders.",
        ),
    ],
    out: Annotated[
        str | None, typer.Option(help="The HTML file to write. Default: report.html in RUN.")
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            help="Another run, whose error budget, slopes or certificates stand on the page too; "
            "repeatable.",
        ),
    ] = None,
    trajectories: Annotated[
        bool,
        typer.Option(help="Sample each target once more, for the slider from noise to data."),
    ] = True,
) -> None:
    """One HTML page of a run, with everything in it: it needs no network and no server.

    Summary and advice, sortable table, quality against evaluations and seconds with intervals and
    Pareto front, error budget, slopes, certificates, samples, a slider from noise to data,
    environment and command: whatever the run has of it, and the runs given with it. Needs the
    extra report.

    [bold]Examples[/bold]

      sde-diffusion report runs/mine

      sde-diffusion report runs/mine --with runs/error-budget-ring --with runs/orders

      sde-diffusion report runs/mine --out mine.html --no-trajectories
    """
    from experiments.reporting.page import check_report, write_report
    from experiments.reporting.sources import load_source
    from experiments.tables import make_console

    found, more = load_source(run), [load_source(path) for path in also or ()]
    check_report(found, out)
    path = write_report(found, out, more=more, trajectories=trajectories)
    size = path.stat().st_size / 2**20
    make_console().print(f"wrote {path} ({size:.1f} MiB); open it in a browser")
