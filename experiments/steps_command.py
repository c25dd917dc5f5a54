"""``sde-diffusion steps``."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from experiments.failures import guarded
from experiments.options import (
    OUT_HELP,
    SOLVER_HELP,
    Batch,
    Device,
    Experiment,
    Seed,
    WriteExperiment,
    given_names,
    numbers,
    whole_numbers,
)


@guarded
def steps(
    context: typer.Context,
    experiment: Experiment = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="An exact target: a name (default: ring), empirical:DATA or FILE.toml; or digits."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder of a trained model or of diffusers', a shipped one's name, or "
            "package.module:factory; for solvers without noise of their own."
        ),
    ] = None,
    sde: Annotated[
        list[str] | None,
        typer.Option(help="Repeatable. Default: vp, ve, or the model's own."),
    ] = None,
    solver: Annotated[
        list[str] | None,
        typer.Option(
            help=SOLVER_HELP + " Default: the Runge-Kutta family and two SDE samplers; of a model "
            "dpm_solver_pp and uni_pc instead of these."
        ),
    ] = None,
    counts: Annotated[
        list[str] | None,
        typer.Option(
            "--steps", help="Repeatable or 8,16,32. Default: 8,16,…,256, of a model to 128."
        ),
    ] = None,
    guidance: Annotated[str, typer.Option(help="none, classifier or cfg.")] = "none",
    scale: Annotated[float | None, typer.Option(help="γ: 0 unconditional, 1 conditional.")] = None,
    label: Annotated[
        str | None,
        typer.Option(help="A class, all (each in turn) or none; default as in compare."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Data of the shape of a model that does not tell its own."),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            help="Of a stochastic solver, in a repeat (10,000); of a model, of each solver (64)."
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Independent repeats.")] = 3,
    seed: Seed = 0,
    batch_size: Batch = None,
    device: Device = "cpu",
    grid: Annotated[str, typer.Option(help="Times of the steps: log_snr, time, karras, ...")] = (
        "log_snr"
    ),
    wanted: Annotated[
        list[str] | None,
        typer.Option(help="An error to predict the evaluations for, as 1e-3; repeatable."),
    ] = None,
    out: Annotated[
        str | None, typer.Option(help=OUT_HELP + " Default: runs/steps-…, by the options.")
    ] = None,
    write_experiment: WriteExperiment = None,
) -> None:
    """Error against the number of steps, with fitted slopes: has a solver the order it declares?

    Deterministic solvers: RMS distance from the finely solved ODE from the same noise, in float64.
    Stochastic ones: weak error, the difference of the mean log density from true samples'.
    Networks: deterministic solvers, in float64 where the network can be computed in it.

    [bold]Examples[/bold]

      sde-diffusion steps

      sde-diffusion steps --wanted 1e-2,1e-4

      sde-diffusion steps --target moons --sde vp --solver probability_flow --steps 8,16,32,64

      sde-diffusion steps --model digits-vp --wanted 0.1 --samples 16

      sde-diffusion steps examples/steps.toml --seed 1
    """
    started = time.monotonic()
    from experiments.commands import run_steps
    from experiments.steps_plan import FILE, StepsOptions

    options, sources = FILE.combined(
        StepsOptions(
            target=target,
            model=model,
            sdes=sde or (),
            solvers=solver or (),
            counts=whole_numbers("--steps", counts),
            guidance=guidance,
            scale=scale,
            label=label,
            data=data,
            samples=samples,
            repeats=repeats,
            seed=seed,
            grid=grid,
            wanted=numbers("--wanted", wanted),
            batch_size=batch_size,
            device=device,
            out=out,
        ),
        experiment,
        given_names(context),
    )
    with FILE.naming_keys(sources):
        run_steps(options, write_experiment, started)
