"""``sde-diffusion error-budget``."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from experiments.failures import PARTLY, guarded
from experiments.options import (
    OUT_HELP,
    SOLVER_HELP,
    Batch,
    CellTimeout,
    Denoise,
    Device,
    Experiment,
    Force,
    Grid,
    Jobs,
    Repeats,
    Scheduler,
    Seed,
    WriteExperiment,
    given_names,
    numbers,
    whole_numbers,
)
from experiments.worker_start import prepare_workers


@guarded
def error_budget(
    context: typer.Context,
    experiment: Experiment = None,
    target: Annotated[
        str | None,
        typer.Option(help="An exact target; with --model: what it was trained on samples of."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder of a trained model (or a shipped one's name), folder of diffusers', or "
            "package.module:factory."
        ),
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
    guidance: Annotated[
        list[str] | None, typer.Option(help="none, classifier or cfg; repeatable. Default: none.")
    ] = None,
    scale: Annotated[
        list[str] | None,
        typer.Option(help="γ: 0 unconditional, 1 conditional; repeatable or 1,3. Default: 1."),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(
            help="A class, all (each in turn) or none. Default: all wherever guided and for "
            "conditional networks whose target is not named, none for targets."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Real data to compare a model's samples with: .npy or image folder."),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Samples in a repeat. Default: 1000.")] = None,
    repeats: Repeats = 3,
    buckets: Annotated[
        int, typer.Option(help="Ranges of times that a network's error is measured in.")
    ] = 8,
    seed: Seed = 0,
    batch_size: Batch = None,
    grid: Grid = None,
    denoise: Denoise = False,
    device: Device = "cpu",
    out: Annotated[
        str | None, typer.Option(help=OUT_HELP + " Default: runs/error-budget-…, by the options.")
    ] = None,
    jobs: Jobs = None,
    scheduler: Scheduler = None,
    cell_timeout: CellTimeout = None,
    force: Force = False,
    write_experiment: WriteExperiment = None,
) -> None:
    """Where a sampler's error comes from: truncation, prior, score, discretisation, Monte Carlo.

    On an exact target every part is measured by itself; on a network trained on samples of one
    also its score error, by time, and what each solver makes of it; on any other network the
    discretisation, and the rest as one figure against data. Guided samples at γ other than 0 and 1
    have a discretisation, a score error, and no truncation or prior mismatch. Writes results.json,
    cells.parquet, error_budget.png and, for a network, network_error.png; docs/error-budget.md
    defines the parts. The same command goes on where it was stopped. Exit code 3: some cells
    failed, and say why.

    [bold]Examples[/bold]

      sde-diffusion error-budget --target moons --sde vp

      sde-diffusion error-budget --model runs/mine --target ring --solver ddim --nfe 10,20

      sde-diffusion error-budget --model digits-vp --samples 100

      sde-diffusion error-budget --target ring --guidance cfg --scale 1,3 --label 2

      sde-diffusion error-budget examples/error_budget.toml --nfe 100
    """
    started = time.monotonic()
    prepare_workers(jobs, scheduler, device)  # what follows imports torch and all
    from experiments.budget_plan import BUDGETS, FILE, SOLVERS, BudgetOptions
    from experiments.run_error_budget import run_error_budget
    from experiments.timing import Timing

    options, sources = FILE.combined(
        BudgetOptions(
            targets=(target,) if target else (),
            models=(model,) if model else (),
            sdes=sde or (),
            solvers=solver or SOLVERS,
            budgets=whole_numbers("--nfe", nfe) or BUDGETS,
            guidances=guidance or ("none",),
            scales=numbers("--scale", scale),
            label=label,
            data=data,
            samples=samples,
            repeats=repeats,
            seed=seed,
            batch_size=batch_size,
            grid=grid,
            denoise=denoise,
            device=device,
            buckets=buckets,
            out=out,
            jobs=jobs,
            scheduler=scheduler,
            cell_timeout=cell_timeout,
            force=force,
        ),
        experiment,
        given_names(context),
    )
    with FILE.naming_keys(sources):
        failed = run_error_budget(options, write_experiment, Timing(started=started))
    if failed:
        raise typer.Exit(PARTLY)
