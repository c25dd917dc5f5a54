"""``sde-diffusion restore``: its options, and what it prints.

Nothing heavy is imported until it runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from experiments.failures import guarded

if TYPE_CHECKING:
    from experiments.restore import RestoreOptions


@guarded
def restore(
    task: Annotated[
        str, typer.Option(help="inpaint, color, super (resolution) or deblur.")
    ] = "inpaint",
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="replacement, repaint, dps, pigdm, mcg or smc; repeatable. Default: all of them."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder of a trained model or of diffusers', a shipped one's name, or "
            "package.module:factory."
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="digits (the default); with --table an exact target.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Images to restore: .npy or folder. Default: the model's.")
    ] = None,
    sde: Annotated[str | None, typer.Option(help="Default: vp, or the model's own.")] = None,
    solver: Annotated[
        str, typer.Option(help="Of all methods but smc, which has a chain of its own.")
    ] = "ancestral",
    steps: Annotated[int, typer.Option(help="Of one walk over the grid.")] = 50,
    count: Annotated[int | None, typer.Option("-n", "--images", help="Images. Default: 6.")] = None,
    samples: Annotated[
        int | None, typer.Option(help="Of each image; default 2. With --table: default 400.")
    ] = None,
    noise: Annotated[
        float, typer.Option(help="Standard deviation of the measurement's, in the model's range.")
    ] = 0.1,
    known: Annotated[float, typer.Option(help="inpaint: share of each sample that is known.")] = (
        0.5
    ),
    factor: Annotated[int, typer.Option(help="super: side of the blocks averaged.")] = 2,
    blur: Annotated[float, typer.Option(help="deblur: deviation of the kernel, in pixels.")] = 1.0,
    scale: Annotated[float, typer.Option(help="Of the gradients of dps, pigdm and mcg.")] = 1.0,
    below: Annotated[
        float | None,
        typer.Option(
            help="sigma/alpha below which gradients act. Default: 10; with --table everywhere."
        ),
    ] = None,
    jump: Annotated[int, typer.Option(help="repaint: steps of a piece.")] = 5,
    walks: Annotated[int, typer.Option(help="repaint: times each piece is walked.")] = 5,
    particles: Annotated[int, typer.Option(help="smc: particles of each sample.")] = 16,
    table: Annotated[
        bool, typer.Option("--table", help="Error against a mixture's exact posterior instead.")
    ] = False,
    repeats: Annotated[int, typer.Option(help="--table: measurements, for standard errors.")] = 3,
    seed: Annotated[int, typer.Option(help="Of all randomness; same seed, same results.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    out: Annotated[
        str | None,
        typer.Option(
            help="Folder to write; an earlier run in it is written over, any other folder that is "
            "not empty is refused. Default: runs/restore-…, by the options."
        ),
    ] = None,
) -> None:
    """Restore images from parts, grey, few or blurred pixels: several methods, several samples.

    Writes restored.png (original, measured, restored × samples), the arrays and restored.json.
    With --table: the distance of each method's samples to the exact posterior of a mixture (gmm16),
    beside the floor; table.json.

    [bold]Examples[/bold]

      sde-diffusion restore --task inpaint

      sde-diffusion restore --task super --method pigdm --method smc -n 8 --samples 4

      sde-diffusion restore --model runs/faces --data faces/ --task color

      sde-diffusion restore --table --known 0.125 --noise 0.3
    """
    from experiments.restoration import METHODS
    from experiments.restore import RestoreOptions

    options = RestoreOptions(
        task=task,
        methods=tuple(dict.fromkeys(method)) if method else METHODS,
        model=model,
        target=target,
        data=data,
        sde=sde,
        solver=solver,
        steps=steps,
        count=count,
        samples=samples,
        noise=noise,
        known=known,
        factor=factor,
        blur=blur,
        scale=scale,
        below=below,
        jump=jump,
        walks=walks,
        particles=particles,
        repeats=repeats,
        seed=seed,
        device=device,
        out=out,
    )
    if table:
        _measure(options)
    else:
        _restore(options)


def _restore(options: RestoreOptions) -> None:
    from experiments import restore
    from experiments.progress import ProgressBar
    from experiments.tables import make_console, wrote

    started = time.monotonic()
    plan = restore.make_plan(options)
    with ProgressBar() as bar:
        made = restore.run(plan, bar)
    table = _table(
        f"{options.task} of {plan.subject.name}, noise {options.noise:g}: RMS distances",
        ("method", "to the measurement", "to the original", "between samples"),
    )
    for row in made.rows:
        distances = (row["to_measurement"], row["to_original"], row["between_samples"])
        shown = ["" if d is None else f"{d:.3f}" for d in distances]
        table.add_row(row["method"], *shown, *_costs(row))
    table.caption = (
        "In the model's range, [-1, 1]. A sample's distance to the measurement should be the "
        "noise; to the original it is no error: what was not measured is open. ESS: of smc's "
        "particles, at the worst level."
    )
    console = make_console()
    console.print(table)
    wrote(console, made.folder, list(made.files), started)


def _measure(options: RestoreOptions) -> None:
    from experiments import restore_table
    from experiments.progress import ProgressBar
    from experiments.tables import make_console, number, wrote

    started = time.monotonic()
    plan = restore_table.make_plan(options)
    with ProgressBar() as bar:
        folder, rows = restore_table.run(plan, bar)
    (sde,) = plan.subject.sdes
    table = _table(
        f"{options.task} of {plan.subject.name}, {sde}, noise {options.noise:g}: distance to the "
        "exact posterior",
        ("method", "sliced W2", "W2"),
    )
    for row in rows:
        table.add_row(
            row.method,
            number(*row.sliced_w2),
            number(*row.w2),
            *_costs(vars(row)),
            style="italic" if row.method not in options.methods else None,
        )
    table.caption = (
        f"{plan.samples} samples × {options.repeats} measurements, ± one standard error. floor: "
        "exact samples against others. exact score: the same sampler with the posterior's own "
        "score. ESS: of smc's particles, at the worst level."
    )
    console = make_console()
    console.print(table)
    wrote(console, folder, [restore_table.TABLE], started)


def _table(title: str, columns: tuple[str, ...]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, title=title)
    table.title_justify = table.caption_justify = "left"
    for name in (*columns, "evaluations", "passes", "ESS", "seconds"):
        table.add_column(name, justify="left" if name == "method" else "right")
    return table


def _costs(row: dict[str, Any]) -> list[str]:
    counts = ["" if row[key] is None else f"{row[key]:g}" for key in ("nfe", "network_passes")]
    return [*counts, "" if row["ess"] is None else f"{row['ess']:.1f}", f"{row['seconds']:.2g}"]
