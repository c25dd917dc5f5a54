"""``sde-diffusion guidance``."""

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
    intervals,
    numbers,
    whole_numbers,
)
from experiments.worker_start import prepare_workers


@guarded
def guidance(
    context: typer.Context,
    experiment: Experiment = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="An exact target's name, or digits; repeatable. Default: digits."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Conditional: folder of a trained model or of diffusers', a shipped one's name, "
            "or package.module:factory; repeatable."
        ),
    ] = None,
    sde: Annotated[
        list[str] | None, typer.Option(help="Repeatable. Default: vp, or the model's own.")
    ] = None,
    solver: Annotated[
        list[str] | None,
        typer.Option(help=SOLVER_HELP + " Default: Heun's ODE, DPM-Solver++, ancestral."),
    ] = None,
    nfe: Annotated[
        list[str] | None,
        typer.Option(help="Score evaluations per sample; repeatable. Default: 8,16."),
    ] = None,
    guidance: Annotated[
        list[str] | None, typer.Option(help="classifier or cfg; repeatable. Default: both.")
    ] = None,
    scale: Annotated[
        list[str] | None,
        typer.Option(help="γ: 1 conditional, above 1 sharper; repeatable. Default: 1,2,4,8."),
    ] = None,
    interval: Annotated[
        list[str] | None,
        typer.Option(
            "--intervals",
            help="low:high in σ/α outside which γ is 1, or full; repeatable. Default: full.",
        ),
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="A class, or all (each in turn, the default).")
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(
            help="A solver breaks where its RMS distance to the fine guided ODE from the same "
            "noise exceeds so many of the data's own RMS deviations."
        ),
    ] = 0.25,
    data: Annotated[
        str | None, typer.Option(help="Real data of a model's classes, where it is not at hand.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(help="Samples in a repeat. Default: 2000 of exact targets, 100 of networks."),
    ] = None,
    repeats: Repeats = 3,
    seed: Seed = 0,
    batch_size: Batch = None,
    device: Device = "cpu",
    grid: Grid = "log_snr",
    denoise: Denoise = False,
    out: Annotated[
        str | None, typer.Option(help=OUT_HELP + " Default: runs/guidance-…, by the options.")
    ] = None,
    jobs: Jobs = None,
    scheduler: Scheduler = None,
    cell_timeout: CellTimeout = None,
    force: Force = False,
    write_experiment: WriteExperiment = None,
) -> None:
    """What guidance does: alignment, fidelity, diversity, saturation, and where solvers break.

    Every scale × solver × number of evaluations, for the classifier's gradient and the
    classifier-free difference. Samples are judged against real samples of their classes; solvers
    without noise also against the fine guided ODE from the same noise. Writes results.json,
    cells.parquet and pictures; the same command goes on where it was stopped. Exit code 3: some
    cells failed, and say why.

    [bold]Examples[/bold]

      sde-diffusion guidance

      sde-diffusion guidance --target ring --scale 1,2,3,5,8 --nfe 8,16,32

      sde-diffusion guidance --guidance cfg --nfe 16 --intervals full,0.3:3,1:10

      sde-diffusion guidance examples/guidance.toml --seed 1
    """
    started = time.monotonic()
    prepare_workers(jobs, scheduler, device)  # what follows imports torch and all
    from experiments.guidance_report import run_guidance
    from experiments.guidance_run import BUDGETS, FILE, GUIDANCES, SCALES, SOLVERS, GuidanceOptions
    from experiments.timing import Timing

    options, sources = FILE.combined(
        GuidanceOptions(
            targets=target or (),
            models=model or (),
            sdes=sde or GuidanceOptions.sdes,
            solvers=solver or SOLVERS,
            budgets=whole_numbers("--nfe", nfe) or BUDGETS,
            guidances=guidance or GUIDANCES,
            scales=numbers("--scale", scale) or SCALES,
            label=label,
            data=data,
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
            intervals=intervals("--intervals", interval) or (None,),
            tolerance=tolerance,
        ),
        experiment,
        given_names(context),
    )
    with FILE.naming_keys(sources):
        failed = run_guidance(options, write_experiment, Timing(started=started))
    if failed:
        raise typer.Exit(PARTLY)
