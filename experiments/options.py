"""Options that several commands share, and lists of numbers as options."""

from __future__ import annotations

from typing import Annotated

import typer

SOLVER_HELP = (
    "NAME or NAME:key=value,key=value, as in probability_flow:method=rk4; one's own: "
    "package.module:Name, a solver class or a k-diffusion-style function; repeatable. "
    "See: sde-diffusion solvers."
)
GRID_HELP = (
    "Times of the steps: time, log_snr, karras, arctan, quadratic, cosine; default: the SDE's own."
)
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
Repeats = Annotated[int, typer.Option(help="Independent repeats, for standard errors.")]
Jobs = Annotated[
    int | None,
    typer.Option(help="Processes. Default: one for each core, where there is enough to do."),
]
Scheduler = Annotated[
    str | None, typer.Option(help="Address of a Dask scheduler, tcp://host:8786.")
]
CellTimeout = Annotated[
    float | None, typer.Option(help="Seconds after which a cell has failed. Default: none.")
]
Force = Annotated[
    bool, typer.Option("--force", help="Compute again what the folder already holds.")
]
Experiment = Annotated[
    str | None,
    typer.Argument(
        metavar="[EXPERIMENT.toml]",
        help="Options from a file, by the names they have here (targets, solvers, nfe, ...); "
        "options typed here replace the file's.",
    ),
]
WriteExperiment = Annotated[
    str | None,
    typer.Option(help="Write these options as an experiment file (-: print it), and end."),
]
OdeSolver = Annotated[str, typer.Option(help="An ODE solver: NAME or NAME:key=value.")]
OdeSteps = Annotated[
    int | None, typer.Option(help="Fixed steps, even in log-SNR. Default: chosen by error.")
]
Tolerance = Annotated[
    float | None, typer.Option(help="Of chosen steps. Default: 1e-6, networks 1e-4.")
]


def whole_numbers(option: str, texts: list[str] | None) -> list[int]:
    found = []
    for text in parts(texts):
        try:
            found.append(int(text))
        except ValueError:
            raise ValueError(
                f"{option} must be whole numbers, as in {option} 10,20; got {text!r}"
            ) from None
    return found


def numbers(option: str, texts: list[str] | None) -> list[float]:
    found = []
    for text in parts(texts):
        try:
            found.append(float(text))
        except ValueError:
            raise ValueError(
                f"{option} must be numbers, as in {option} 1,3; got {text!r}"
            ) from None
    return found


def parts(texts: list[str] | None) -> list[str]:
    return [part.strip() for text in texts or [] for part in text.split(",")]


def given_names(context: typer.Context) -> set[str]:
    """The options that were typed, by the names of their parameters."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}


def intervals(option: str, texts: list[str] | None) -> list[tuple[float, float] | None]:
    """``low:high`` in sigma/alpha, or ``full``: everywhere."""
    found: list[tuple[float, float] | None] = []
    for text in parts(texts):
        if text == "full":
            found.append(None)
            continue
        try:
            low, high = (float(end) for end in text.split(":"))
        except ValueError:
            low, high = 0.0, 0.0
        if not 0 <= low < high:
            raise ValueError(
                f"{option} must be low:high in sigma/alpha with 0 <= low < high, or full, as in "
                f"{option} full,0.3:3; got {text!r}"
            )
        found.append((low, high))
    return found
