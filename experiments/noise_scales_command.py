"""``sde-diffusion noise-scales``: NCSNv2's noise levels for a data set, with their derivation."""

from __future__ import annotations

from typing import Annotated

import typer

from experiments.failures import guarded


@guarded
def noise_scales(
    data: Annotated[
        str, typer.Argument(help="digits, a .npy file or a folder of images, as for train.")
    ],
    sigma_min: Annotated[float, typer.Option(help="The smallest noise level.")] = 0.01,
    steps: Annotated[int, typer.Option(help="Langevin steps at each level.")] = 5,
    limit: Annotated[
        int,
        typer.Option(help="Compare all pairs of up to so many samples, of more those of a subset."),
    ] = 10_000,
    seed: Annotated[int, typer.Option(help="Of the subset.")] = 0,
) -> None:
    """Noise levels and Langevin steps for VE training on a data set, as NCSNv2 chooses them.

    Prints sigma_max, the number of levels and their ratio, and the step size, each with the
    proposition it follows from (Song & Ermon 2020, arXiv:2006.09011), for the data in [-1, 1].

    [bold]Examples[/bold]

      sde-diffusion noise-scales digits

      sde-diffusion noise-scales faces/ --limit 20000 --steps 3
    """
    from experiments.spec import spec_of
    from sde_diffusion.data import load_data
    from sde_diffusion.noise_scales import suggest_noise_scales
    from solvers import AnnealedLangevin, Hold, PredictorCorrector

    scales = suggest_noise_scales(
        load_data(data).train_x, sigma_min=sigma_min, steps=steps, exact_limit=limit, seed=seed
    )
    relative = float(f"{scales.relative_step:.4g}")
    solver = PredictorCorrector(Hold(), AnnealedLangevin(step_size=relative, steps=steps))
    typer.echo(scales.explain())
    typer.echo("")
    typer.echo(f"SDE:    VESDE(sigma_min={scales.sigma_min:g}, sigma_max={scales.sigma_max:.6g})")
    typer.echo(f"solver: {spec_of(solver)}")
    typer.echo(f"        on {scales.levels} levels: {scales.levels - 1} steps of the VE's own grid")
