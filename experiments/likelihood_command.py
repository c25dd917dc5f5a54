"""``sde-diffusion likelihood``."""

from __future__ import annotations

from typing import Annotated

import typer

from experiments.failures import guarded
from experiments.options import OdeSolver, OdeSteps, Tolerance


@guarded
def likelihood(
    target: Annotated[
        str | None, typer.Option(help="An exact target, or digits (the default).")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder of a trained model or of diffusers', a shipped one's name, or "
            "package.module:factory."
        ),
    ] = None,
    sde: Annotated[str | None, typer.Option(help="Default: vp, or the model's own.")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Data for a model: .npy or image folder. Default: its own held-out."),
    ] = None,
    count: Annotated[int, typer.Option("-n", "--samples", help="How many samples.")] = 64,
    label: Annotated[
        str | None, typer.Option(help="p(x | y): a class, own (each sample's label), or none.")
    ] = None,
    guidance: Annotated[str, typer.Option(help="none, classifier or cfg.")] = "none",
    scale: Annotated[float | None, typer.Option(help="γ: 0 unconditional, 1 conditional.")] = None,
    divergence: Annotated[
        str | None,
        typer.Option(
            help="exact, hutchinson, hutch++. Default: exact for targets, else hutchinson."
        ),
    ] = None,
    probes: Annotated[int, typer.Option(help="Of hutchinson and hutch++, per sample.")] = 8,
    probe_law: Annotated[str, typer.Option(help="Of hutchinson: rademacher, gaussian.")] = (
        "rademacher"
    ),
    solver: OdeSolver = "tsitouras",
    steps: OdeSteps = None,
    tolerance: Tolerance = None,
    prior: Annotated[
        str, typer.Option(help="At t_max: standard, moments (of the data), exact (targets).")
    ] = "standard",
    levels: Annotated[
        int | None,
        typer.Option(help="Values that the raw data takes; known for 8, 16 bits, digits."),
    ] = None,
    draws: Annotated[
        int, typer.Option(help="Of dequantisation noise; 0: none, and no bits per dimension.")
    ] = 1,
    bound: Annotated[int, typer.Option(help="Draws for the likelihood bound; 0: none.")] = 32,
    classify: Annotated[
        bool, typer.Option("--classify", help="Also p(y | x) by Bayes' rule, and its accuracy.")
    ] = False,
    clip: Annotated[bool, typer.Option("--clip", help="Clip data outside the model's range.")] = (
        False
    ),
    seed: Annotated[int, typer.Option(help="Of probes, dequantisation and target samples.")] = 0,
    memory: Annotated[float, typer.Option(help="MiB that a pass of products may take.")] = 512,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Samples at a time.")] = (
        None
    ),
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    out: Annotated[
        str | None, typer.Option(help="Folder to write. Default: runs/likelihood-…")
    ] = None,
) -> None:
    """Log-likelihoods along the probability-flow ODE, with what each figure leaves out.

    Prints a table, and writes likelihood.json and likelihood.csv, a line per sample. What the
    figures mean: docs/likelihood.md.

    [bold]Examples[/bold]

      sde-diffusion likelihood --target gmm16 --prior moments

      sde-diffusion likelihood --model digits-vp -n 100 --label own --probes 16 --draws 4
    """
    from experiments.likelihood import LikelihoodOptions, make_plan, run
    from experiments.likelihood_tables import report
    from experiments.progress import ProgressBar

    plan = make_plan(
        LikelihoodOptions(
            target, model, sde, data, count, label, guidance, scale, divergence, probes, probe_law,
            solver, steps, tolerance, prior, levels, draws, bound, classify, clip, seed, memory,
            batch_size, device, out,
        )
    )  # fmt: skip
    with ProgressBar() as bar:
        measured = run(plan, bar)
    report(plan, measured)
