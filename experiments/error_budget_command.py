"""``sde-diffusion error-budget``."""

from __future__ import annotations

from typing import Annotated

import typer

from experiments.failures import guarded
from experiments.options import OUT_HELP, SOLVER_HELP, Denoise, Device, Grid, Seed, whole_numbers


@guarded
def error_budget(
    target: Annotated[
        str | None,
        typer.Option(help="An exact target; with --model: what it was trained on samples of."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder of a trained model, or a shipped one's name.")
    ] = None,
    sde: Annotated[
        list[str] | None, typer.Option(help="Repeatable. Default: vp, ve, or the model's own.")
    ] = None,
    solver: Annotated[
        list[str] | None,
        typer.Option(help=SOLVER_HELP + " Default: ancestral, ddim, probability_flow."),
    ] = None,
    nfe: Annotated[
        list[str] | None,
        typer.Option(help="Score evaluations; repeatable or 10,20. Default: 10,20,50."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Samples in a repeat.")] = 1000,
    repeats: Annotated[int, typer.Option(help="Independent repeats, for intervals.")] = 3,
    buckets: Annotated[
        int, typer.Option(help="Ranges of times that a network's error is measured in.")
    ] = 8,
    seed: Seed = 0,
    grid: Grid = None,
    denoise: Denoise = False,
    device: Device = "cpu",
    out: Annotated[
        str | None, typer.Option(help=OUT_HELP + " Default: runs/error-budget-…, by the options.")
    ] = None,
) -> None:
    """Where a sampler's error comes from: truncation, prior, score, discretisation, Monte Carlo.

    On an exact target every part is measured by itself; on a network trained on samples of one
    also its score error, by time, and what each solver makes of it; on any other network the
    discretisation, and the rest as one figure against data. Writes results.json,
    error_budget.png and, for a network, network_error.png; docs/error-budget.md defines the parts.

    [bold]Examples[/bold]

      sde-diffusion error-budget --target moons --sde vp

      sde-diffusion error-budget --model runs/mine --target ring --solver ddim --nfe 10,20

      sde-diffusion error-budget --model digits-vp --samples 100
    """
    from experiments.error_budget import BUDGETS, SOLVERS, BudgetOptions
    from experiments.run_error_budget import run_error_budget

    run_error_budget(
        BudgetOptions(
            target=target or (None if model else "ring"),
            model=model,
            sdes=sde or (),
            solvers=solver or SOLVERS,
            budgets=whole_numbers("--nfe", nfe) or BUDGETS,
            samples=samples,
            repeats=repeats,
            seed=seed,
            grid=grid,
            denoise=denoise,
            device=device,
            buckets=buckets,
            out=out,
        )
    )
