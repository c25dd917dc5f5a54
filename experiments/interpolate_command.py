"""``sde-diffusion interpolate``."""

from __future__ import annotations

from typing import Annotated

import typer

from experiments.failures import guarded
from experiments.options import OdeSolver, OdeSteps, Tolerance


@guarded
def interpolate(
    target: Annotated[
        str | None,
        typer.Option(help="An exact target in the plane or of images, or digits (the default)."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder of a trained model or of diffusers', a shipped one's name, or "
            "package.module:factory; of images or of points in the plane."
        ),
    ] = None,
    sde: Annotated[str | None, typer.Option(help="Default: vp, or the model's own.")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="A model's ends: .npy or image folder. Default: its own held-out data."),
    ] = None,
    pairs: Annotated[int, typer.Option(help="How many paths, or samples whose class changes.")] = 6,
    points: Annotated[int, typer.Option(help="On each path, both ends included.")] = 9,
    label: Annotated[
        str | None, typer.Option(help="Stay within a class; default: no label.")
    ] = None,
    classes: Annotated[
        bool, typer.Option("--classes", help="Each sample's latent, decoded in every class.")
    ] = False,
    temperature: Annotated[float, typer.Option(help="Of the latents on the paths.")] = 1.0,
    solver: OdeSolver = "tsitouras",
    steps: OdeSteps = None,
    tolerance: Tolerance = None,
    seed: Annotated[int, typer.Option(help="Chooses the samples.")] = 0,
    out: Annotated[
        str | None, typer.Option(help="Folder to write. Default: runs/interpolate-…")
    ] = None,
) -> None:
    """Paths between samples through latent space: encoded, interpolated on the sphere, decoded.

    Writes interpolation.png, interpolation.npy in the data's own range, and interpolation.json.

    [bold]Examples[/bold]

      sde-diffusion interpolate

      sde-diffusion interpolate --classes --sde ve

      sde-diffusion interpolate --target moons --pairs 4
    """
    from experiments.interpolation import (
        ARRAY,
        MANIFEST,
        PICTURE,
        InterpolateOptions,
        make_plan,
        run,
    )  # fmt: skip
    from experiments.progress import ProgressBar
    from experiments.tables import make_console

    plan = make_plan(
        InterpolateOptions(
            target, model, sde, pairs, points, label, classes, temperature, solver, steps,
            tolerance, seed, out, data,
        )
    )  # fmt: skip
    with ProgressBar() as bar:
        made = run(plan, bar)
    console = make_console()
    console.print(
        f"round trip of {len(plan.a)} samples of {plan.subject.name}: RMS {made.rms:.2e} at most, "
        f"{made.nfe:.4g} evaluations"
    )
    console.print(f"wrote {made.folder}/ {PICTURE}, {ARRAY}, {MANIFEST}")
