"""``sde-diffusion compare``."""

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
    parts,
    whole_numbers,
)
from experiments.worker_start import prepare_workers


@guarded
def compare(
    context: typer.Context,
    experiment: Experiment = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="An exact target (a name, empirical:DATA or FILE.toml), or digits; repeatable. "
            "Default: ring, digits."
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder of a trained model (or a shipped one's name), folder of diffusers', or "
            "package.module:factory; repeatable."
        ),
    ] = None,
    sde: Annotated[
        list[str] | None,
        typer.Option(help="vp, ve, subvp, cosine, edm; repeatable. Default: vp, ve."),
    ] = None,
    solver: Annotated[
        list[str] | None,
        typer.Option(help=SOLVER_HELP + " Default: the four families the project is named for."),
    ] = None,
    nfe: Annotated[
        list[str] | None,
        typer.Option(
            help="Score evaluations per sample; repeatable or 10,20. Default: 10,20,50,100."
        ),
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
            help="A class, all (each in turn) or none. Default: all for conditional networks and "
            "wherever guided, none for exact targets."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Real data to compare a model's samples with: .npy or image folder."),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            help="What a network's samples are compared in: raw, random, inception, a model's "
            "folder (its judge) or package.module:function. Default: the model's own judge."
        ),
    ] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            help="Of networks: frechet, kid, precision, recall, density, coverage, accuracy; "
            "repeatable or a,b; the first stands for quality. Default: frechet,accuracy."
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            help="Samples in a repeat. Default: 2000 of exact targets, 400 of large ones, 100 of "
            "networks."
        ),
    ] = None,
    repeats: Repeats = 4,
    seed: Seed = 0,
    batch_size: Batch = None,
    device: Device = "cpu",
    grid: Grid = None,
    denoise: Denoise = False,
    out: Annotated[
        str | None, typer.Option(help=OUT_HELP + " Default: runs/compare-…, by the options.")
    ] = None,
    jobs: Jobs = None,
    scheduler: Scheduler = None,
    cell_timeout: CellTimeout = None,
    force: Force = False,
    until_resolved: Annotated[
        bool,
        typer.Option(
            "--until-resolved",
            help="Add repeats until the best of every column is known, or the budget spent.",
        ),
    ] = False,
    budget_seconds: Annotated[
        float | None, typer.Option(help="Seconds that --until-resolved may take.")
    ] = None,
    max_repeats: Annotated[
        int | None,
        typer.Option(help="Repeats that --until-resolved comes to at most. Default: 30."),
    ] = None,
    throughput: Annotated[
        bool,
        typer.Option(
            "--throughput", help="Also seconds per sample at the best batch size, measured after."
        ),
    ] = False,
    write_experiment: WriteExperiment = None,
) -> None:
    """Compare solvers × SDEs × evaluations × guidance, at equal numbers of evaluations.

    A solver that costs two evaluations a step gets half the steps. Writes results.json,
    cells.parquet and three pictures, and prints a table with standard errors and the floor: what
    true samples score. The same command goes on where it was stopped. Exit code 3: some cells
    failed, and say why.

    [bold]Examples[/bold]

      sde-diffusion compare

      sde-diffusion compare --target moons --sde vp --nfe 8,16,32 --solver ddim
      --solver probability_flow:method=rk4

      sde-diffusion compare --target ring --guidance cfg --guidance classifier --scale 1,3 --label 2

      sde-diffusion compare --model runs/mine --data faces/ --nfe 20,50

      sde-diffusion compare examples/compare.toml --seed 1
    """
    started = time.monotonic()
    prepare_workers(jobs, scheduler, device)  # what follows imports torch and all
    from experiments.commands import run_compare
    from experiments.planning import BUDGETS, FILE, SOLVERS, CompareOptions
    from experiments.timing import Timing

    options, sources = FILE.combined(
        CompareOptions(
            targets=target or (),
            models=model or (),
            sdes=sde or (),
            solvers=solver or SOLVERS,
            budgets=whole_numbers("--nfe", nfe) or BUDGETS,
            guidances=guidance or ("none",),
            scales=numbers("--scale", scale),
            label=label,
            data=data,
            features=features,
            metrics=parts(metrics),
            samples=samples,
            repeats=repeats,
            seed=seed,
            batch_size=batch_size,
            device=device,
            grid=grid,
            denoise=denoise,
            out=out,
            jobs=jobs,
            scheduler=scheduler,
            cell_timeout=cell_timeout,
            force=force,
            until_resolved=until_resolved,
            budget_seconds=budget_seconds,
            max_repeats=max_repeats,
            throughput=throughput,
        ),
        experiment,
        given_names(context),
    )
    with FILE.naming_keys(sources):
        failed = run_compare(options, write_experiment, Timing(started=started))
    if failed:
        raise typer.Exit(PARTLY)
