"""The ``recipe`` command."""

from __future__ import annotations

from typing import Annotated

import typer

from experiments.failures import guarded


@guarded
def recipe(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            help="A recipe's name, or a file like those in recipes/. Without: which there are.",
        ),
    ] = None,
    out: Annotated[str | None, typer.Option(help="Folder to write. Default: runs/RECIPE.")] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Of training the score network; the others in proportion."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps and samples: whether it runs.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """The models the field started from, each trained, sampled, measured and drawn by one command.

    Trains what is not in the folder yet (interrupted training goes on), then samples it, measures
    it beside held-out data, and draws quality by evaluations, the trade-off of guidance, and a
    strip from noise to sample. What each found: docs/recipes.md.

    [bold]Examples[/bold]

      sde-diffusion recipe ddpm

      sde-diffusion recipe mnist5k --steps 12000 --out runs/mnist-long
    """
    import time

    from experiments.recipe_file import find_recipes, read_recipe
    from experiments.recipe_run import RecipeOptions, cook, planned_recipe
    from experiments.recipe_tables import recipe_tables
    from experiments.tables import make_console, wrote

    console = make_console()
    if name is None:
        for known in find_recipes():
            console.print(f"[bold]{known:<22}[/bold] {read_recipe(known).title}")
        return
    started = time.monotonic()
    planned, folder = planned_recipe(RecipeOptions(name, out, steps, quick, device))
    cooked = cook(planned, folder, device)
    for table in recipe_tables(cooked):
        console.print(table)
    wrote(console, cooked.folder, list(cooked.files), started)
