"""The command line: ``sde-diffusion compare | steps | orders | train | sample | ...``.

Nothing heavy is imported until a command runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from experiments.cli_train import train
from experiments.compare_command import compare
from experiments.diff_command import diff
from experiments.error_budget_command import error_budget
from experiments.failures import FAILED, OneLineGroup, guarded
from experiments.guidance_command import guidance
from experiments.interpolate_command import interpolate
from experiments.likelihood_command import likelihood
from experiments.merge_command import merge
from experiments.noise_scales_command import noise_scales
from experiments.options import (
    OUT_HELP,
    SOLVER_HELP,
    Batch,
    Denoise,
    Device,
    Grid,
    Seed,
)
from experiments.recipe_command import recipe
from experiments.report_command import report
from experiments.restore_command import restore
from experiments.steps_command import steps

app = typer.Typer(
    name="sde-diffusion",
    cls=OneLineGroup,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Continuous-time diffusion: SDEs, scores, guidance and samplers, measured against each "
    "other.\n\nStart with: [bold]sde-diffusion compare[/bold]",
)

app.command()(compare)
app.command()(steps)


@app.command()
@guarded
def orders(
    solver: Annotated[
        list[str] | None,
        typer.Option(
            help=SOLVER_HELP + " Or your own: package.module:Class, from here or installed. "
            "Or diffusers:Class[:settings]. Default: the whole catalogue, in several settings."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Default settings, fewer problems, coarser grids.")
    ] = False,
    peers: Annotated[
        bool,
        typer.Option(
            "--peers", help="Also diffusers' schedulers (extra: peers), at their own times."
        ),
    ] = False,
    out: Annotated[
        str | None, typer.Option(help=OUT_HELP + " Default: runs/orders-…, by the options.")
    ] = None,
) -> None:
    """Certify solvers: does each have the order, the limit and the cost it declares?

    Measured in float64 on problems with known answers: order on the ODE, weak and strong order on
    a Gaussian, start-up, the limit, evaluations, independence of the batch, runs of one and two
    steps. Writes orders.json and orders.png. Exit code 1 if a solver fails; what diffusers'
    schedulers miss is shown, and never changes the exit code.

    [bold]Examples[/bold]

      sde-diffusion orders

      sde-diffusion orders --solver dpm_solver_pp:order=3 --solver mine:MySolver
    """
    from experiments.certify.orders import OrdersOptions
    from experiments.commands import run_orders

    if not run_orders(OrdersOptions(solver or (), quick, out, peers)):
        raise typer.Exit(FAILED)


app.command()(train)
app.command()(recipe)


@app.command()
@guarded
def sample(
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder of a trained model or of diffusers', a shipped one's name, or "
            "package.module:factory."
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="An exact target, or digits (the default).")
    ] = None,
    sde: Annotated[str | None, typer.Option(help="Default: vp, or the model's own.")] = None,
    solver: Annotated[str, typer.Option(help=SOLVER_HELP)] = "probability_flow",
    nfe: Annotated[int, typer.Option(help="Score evaluations per sample.")] = 50,
    count: Annotated[int, typer.Option("-n", "--samples", help="How many samples.")] = 64,
    guidance: Annotated[str, typer.Option(help="none, classifier or cfg.")] = "none",
    scale: Annotated[float | None, typer.Option(help="γ: 0 unconditional, 1 conditional.")] = None,
    label: Annotated[
        str | None,
        typer.Option(help="A class, all (each in turn) or none; default as in compare."),
    ] = None,
    seed: Seed = 0,
    batch_size: Batch = None,
    device: Device = "cpu",
    grid: Grid = None,
    denoise: Denoise = False,
    trajectory: Annotated[
        bool, typer.Option("--trajectory", help="Also a strip of the denoising steps.")
    ] = False,
    shard_size: Annotated[
        int | None,
        typer.Option(
            help="Samples in a file of a large set. Default: 1000, beyond 10,000 samples."
        ),
    ] = None,
    array_format: Annotated[
        str | None,
        typer.Option("--format", help="Of a large set's files: npy (the default) or safetensors."),
    ] = None,
    out: Annotated[
        str | None, typer.Option(help=OUT_HELP + " Default: runs/sample-…, by the options.")
    ] = None,
) -> None:
    """Draw samples and write them: samples.npy in the data's own range, samples.png, manifest.json.

    More than 10,000 samples, or several processes, write shards/ instead: files of 1,000, each
    finished or not there. The same command goes on where it was stopped, and with a larger -n adds
    to the set.

    [bold]Examples[/bold]

      sde-diffusion sample -n 100 --guidance cfg --scale 2 --label all

      sde-diffusion sample --model runs/mine --nfe 20 --trajectory --out runs/pictures

      torchrun --nproc-per-node 2 -m experiments sample --model runs/mine -n 50000 --out runs/many
    """
    from experiments.commands import run_sample
    from experiments.generate import SampleOptions

    run_sample(
        SampleOptions(
            model=model,
            target=target,
            sde=sde,
            solver=solver,
            nfe=nfe,
            count=count,
            guidance=guidance,
            scale=scale,
            label=label,
            seed=seed,
            batch_size=batch_size,
            device=device,
            grid=grid,
            denoise=denoise,
            trajectory=trajectory,
            out=out,
            shard_size=shard_size,
            array_format=array_format,
        )
    )


app.command()(guidance)
app.command()(likelihood)
app.command()(interpolate)
app.command()(restore)
app.command()(report)
app.command()(diff)
app.command()(merge)


@app.command()
@guarded
def solvers() -> None:
    """Every solver and corrector: kind, order, settings."""
    from experiments.listing import solver_tables
    from experiments.tables import make_console

    for table in solver_tables():
        make_console().print(table)


@app.command()
@guarded
def targets() -> None:
    """Every target that --target takes."""
    from experiments.listing import target_table
    from experiments.tables import make_console

    make_console().print(target_table())


app.command("error-budget")(error_budget)
app.command("noise-scales")(noise_scales)


def main() -> None:
    """The console script."""
    app()
