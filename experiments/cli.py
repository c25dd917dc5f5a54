"""The command line: ``sde-diffusion compare | steps | orders | train | sample | ...``.

Nothing heavy is imported until a command runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from experiments.cli_train import train
from experiments.failures import FAILED, OneLineGroup, guarded
from experiments.interpolate_command import interpolate
from experiments.likelihood_command import likelihood
from experiments.noise_scales_command import noise_scales

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

SOLVER_HELP = (
    "NAME or NAME:key=value,key=value, as in probability_flow:method=rk4; repeatable. "
    "See: sde-diffusion solvers."
)
GRID_HELP = "Times of the steps: time, log_snr, karras, quadratic, cosine; default: the SDE's own."
OUT_HELP = (
    "Folder to write; an earlier run in it is written over, any other folder that is not empty "
    "is refused."
)
Seed = Annotated[int, typer.Option(help="Of all randomness; same seed, same results.")]
Batch = Annotated[
    int | None,
    typer.Option("--batch-size", help="Samples at a time; the results do not depend on it."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Denoise = Annotated[
    bool,
    typer.Option("--denoise/--no-denoise", help="End with the estimate of x0; one evaluation."),
]
Grid = Annotated[str | None, typer.Option(help=GRID_HELP)]


@app.command()
@guarded
def compare(
    target: Annotated[
        list[str] | None,
        typer.Option(help="An exact target's name, or digits; repeatable. Default: ring, digits."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="Folder of a trained model (or a shipped one's name); repeatable."),
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
    samples: Annotated[
        int | None,
        typer.Option(help="Samples in a repeat. Default: 2000 of exact targets, 100 of networks."),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Independent repeats, for standard errors.")] = 3,
    seed: Seed = 0,
    batch_size: Batch = None,
    device: Device = "cpu",
    grid: Grid = None,
    denoise: Denoise = False,
    out: Annotated[
        str | None, typer.Option(help=OUT_HELP + " Default: runs/compare-…, by the options.")
    ] = None,
) -> None:
    """Compare solvers × SDEs × evaluations × guidance, at equal numbers of evaluations.

    A solver that costs two evaluations a step gets half the steps. Writes results.json and three
    pictures, and prints a table with standard errors and the floor: what true samples score.

    [bold]Examples[/bold]

      sde-diffusion compare

      sde-diffusion compare --target moons --sde vp --nfe 8,16,32 --solver ddim
      --solver probability_flow:method=rk4

      sde-diffusion compare --target ring --guidance cfg --guidance classifier --scale 1,3 --label 2

      sde-diffusion compare --model runs/mine --data faces/ --nfe 20,50
    """
    from experiments.commands import run_compare
    from experiments.compare import BUDGETS, SOLVERS, CompareOptions

    run_compare(
        CompareOptions(
            targets=target or (),
            models=model or (),
            sdes=sde or (),
            solvers=solver or SOLVERS,
            budgets=_whole_numbers("--nfe", nfe) or BUDGETS,
            guidances=guidance or ("none",),
            scales=_numbers("--scale", scale),
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
        )
    )


@app.command()
@guarded
def steps(
    target: Annotated[str, typer.Option(help="An exact target.")] = "ring",
    sde: Annotated[list[str] | None, typer.Option(help="Repeatable. Default: vp, ve.")] = None,
    solver: Annotated[
        list[str] | None,
        typer.Option(help=SOLVER_HELP + " Default: the Runge-Kutta family and two SDE samplers."),
    ] = None,
    counts: Annotated[
        list[str] | None,
        typer.Option("--steps", help="Repeatable or 8,16,32. Default: 8,16,…,256."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Of a stochastic solver, in a repeat.")] = 10_000,
    repeats: Annotated[int, typer.Option(help="Independent repeats.")] = 3,
    seed: Seed = 0,
    batch_size: Batch = None,
    device: Device = "cpu",
    grid: Annotated[str, typer.Option(help="Times of the steps: log_snr, time, karras, ...")] = (
        "log_snr"
    ),
    out: Annotated[
        str | None, typer.Option(help=OUT_HELP + " Default: runs/steps-…, by the options.")
    ] = None,
) -> None:
    """Error against the number of steps, with fitted slopes: has a solver the order it declares?

    Deterministic solvers: RMS distance from the finely solved ODE from the same noise, in float64.
    Stochastic ones: weak error, the difference of the mean log density from true samples'.

    [bold]Examples[/bold]

      sde-diffusion steps

      sde-diffusion steps --target moons --sde vp --solver probability_flow --steps 8,16,32,64
    """
    from experiments.commands import run_steps
    from experiments.steps import COUNTS, SOLVERS, StepsOptions

    run_steps(
        StepsOptions(
            target=target,
            sdes=sde or ("vp", "ve"),
            solvers=solver or SOLVERS,
            counts=_whole_numbers("--steps", counts) or COUNTS,
            samples=samples,
            repeats=repeats,
            seed=seed,
            grid=grid,
            batch_size=batch_size,
            device=device,
            out=out,
        )
    )


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


@app.command()
@guarded
def sample(
    model: Annotated[
        str | None, typer.Option(help="Folder of a trained model, or a shipped one's name.")
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
    out: Annotated[
        str | None, typer.Option(help=OUT_HELP + " Default: runs/sample-…, by the options.")
    ] = None,
) -> None:
    """Draw samples and write them: samples.npy in the data's own range, samples.png, manifest.json.

    [bold]Examples[/bold]

      sde-diffusion sample -n 100 --guidance cfg --scale 2 --label all

      sde-diffusion sample --model runs/mine --nfe 20 --trajectory --out runs/pictures
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
        )
    )


app.command()(likelihood)
app.command()(interpolate)


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


app.command("noise-scales")(noise_scales)


def main() -> None:
    """The console script."""
    app()


def _whole_numbers(option: str, texts: list[str] | None) -> list[int]:
    numbers = []
    for text in _parts(texts):
        try:
            numbers.append(int(text))
        except ValueError:
            raise ValueError(
                f"{option} must be whole numbers, as in {option} 10,20; got {text!r}"
            ) from None
    return numbers


def _numbers(option: str, texts: list[str] | None) -> list[float]:
    numbers = []
    for text in _parts(texts):
        try:
            numbers.append(float(text))
        except ValueError:
            raise ValueError(
                f"{option} must be numbers, as in {option} 1,3; got {text!r}"
            ) from None
    return numbers


def _parts(texts: list[str] | None) -> list[str]:
    return [part.strip() for text in texts or [] for part in text.split(",")]
