"""The ``train`` command's options."""

from __future__ import annotations

from typing import Annotated

import typer

from experiments.failures import guarded


@guarded
def train(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="A training config (.toml), or data: digits, mnist5k, a .npy or .npz file (labels "
            "beside it as NAME_labels.npy), an image folder (sub-folders are classes).",
        ),
    ],
    sde: Annotated[
        str | None,
        typer.Option(help="vp, ve, subvp, cosine, edm or ddpm. Default: the config's, or vp."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Of the score network; the others in proportion.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="TABLE.KEY=VALUE",
            help="Any key of a config, as in network.channels=[64,128]; repeatable.",
        ),
    ] = None,
    sigma_max: Annotated[
        str | None,
        typer.Option(help="Largest noise of ve or edm: a number, or auto, from the data."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of all randomness. Default: the config's, or 0.")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="A .npy file of labels, for DATA that is a .npy file.")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(help="Model folder to write. Default: runs/DATA-SDE, or runs/CONFIG."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda. Default: the config's, or cpu.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where it was stopped.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model that is already there.")
    ] = False,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints. Default: the config's, or 500.")
    ] = None,
) -> None:
    """Train the networks of a model folder: score network, classifier and judge.

    The whole config is printed first, and stored with the model as config.toml. Ctrl-C leaves a
    checkpoint; the same command with --resume goes on and ends with the same weights. Several
    processes: torchrun --nproc-per-node 2 -m experiments train ...

    [bold]Examples[/bold]

      sde-diffusion train digits --sde vp

      sde-diffusion train mine.toml --steps 20000 --set network.channels=[64,128] --out runs/mine

      sde-diffusion compare --model runs/mine
    """
    from experiments.training import TrainOptions, run_train

    run_train(
        TrainOptions(
            data=data,
            sde=sde,
            sigma_max=sigma_max,
            steps=steps,
            seed=seed,
            labels=labels,
            out=out,
            device=device,
            checkpoint_every=checkpoint_every,
            assignments=assignments or (),
            resume=resume,
            overwrite=overwrite,
        )
    )
