"""``sde-diffusion recipe``: train what is not there, sample, measure, draw."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from experiments.draw import make_machine
from experiments.estimates import Estimate
from experiments.generate import image_grid
from experiments.progress import ProgressBar
from experiments.recipe_cells import (
    COMPARISON,
    SWEEP,
    RecipeCell,
    comparison_cells,
    draw_cell,
    sweep_cells,
)
from experiments.recipe_file import Experiment, Recipe, read_recipe
from experiments.recipe_metrics import RecipeMetrics
from experiments.recipe_models import MODELS, RecipeModels, models_of
from experiments.recipe_pictures import quality_figure, strip_of_guidances, sweep_figure
from experiments.results import RESULTS, RunFolder, check_writable, write_whole
from sde_diffusion.errors import require_count

__all__ = ["Cooked", "RecipeOptions", "cook", "planned_recipe"]

COSTS = "costs.json"
QUALITY = "quality.png"
SHEET = 100  # samples in a picture


@dataclass(frozen=True)
class RecipeOptions:
    """What the command line says."""

    name: str
    out: str | None = None
    steps: int | None = None
    quick: bool = False
    device: str = "cpu"


@dataclass
class Cooked:
    """What a recipe came to.

    Attributes:
        folder: that it was written to.
        rows: one for each cell, as in results.json.
        floor: name -> what held-out data scores.
        costs: wall and processor seconds of training, by model, and of the experiment.
        files: written, beside the models.
    """

    folder: Path
    rows: Sequence[Mapping[str, Any]]
    floor: Mapping[str, Estimate]
    costs: Mapping[str, Any]
    files: Sequence[str]


def planned_recipe(options: RecipeOptions) -> tuple[Recipe, Path]:
    """The recipe as the options change it, and its folder: ``runs/NAME`` unless it is named.

    Raises:
        ValueError: whatever is wrong with the recipe or the options, before any work.
    """
    if options.steps is not None:
        require_count("--steps", options.steps)
    recipe = read_recipe(options.name)
    if options.steps is not None:
        recipe = recipe.with_steps(options.steps)
    name = recipe.name
    if options.quick:
        recipe, name = recipe.quick(), f"{name}-quick"
    on_device = {
        key: replace(config, run=replace(config.run, device=options.device))
        for key, config in recipe.models.items()
    }
    out = Path(options.out or Path("runs") / name).expanduser()
    return replace(recipe, models=on_device), check_writable(_free(out))


def _free(out: Path) -> Path:
    """The folder, if it is a recipe's or empty."""
    if out.is_file():
        raise ValueError(f"--out {str(out)!r} is a file; name a folder")
    held = {p.name for p in out.iterdir() if not p.name.startswith(".")} if out.is_dir() else set()
    if held and not held & {RESULTS, MODELS}:
        raise ValueError(
            f"--out {str(out)!r} is not empty and holds no recipe's run; name a new or empty folder"
        )
    return out


def cook(recipe: Recipe, out: Path, device: str = "cpu") -> Cooked:
    """Run a recipe.

    Writes models (``models/NAME``, unless a shipped one stands for it), ``results.json``,
    ``quality.png`` (comparisons), ``costs.json`` and, for each model, ``guidance-NAME.png``,
    ``strip-NAME.png`` and ``samples-NAME.png``: of the cell nearest to the data.
    """
    experiment = recipe.experiment
    machine = make_machine(device, None)
    models = models_of(recipe, out)
    costs: dict[str, Any] = {"training": _training_costs(models)}
    started, processor = time.monotonic(), time.process_time()
    for subject in models.subjects.values():
        subject.to(machine.device)
    metrics = RecipeMetrics(models, experiment.samples, experiment.repeats)
    floor = metrics.floor()
    config = {"recipe": recipe.name, "device": device, **asdict(experiment)}
    folder = RunFolder(out, "recipe", config, device=machine.device)
    best: dict[str, float] = {}
    sheets: dict[str, Tensor] = {}
    cells = _cells(experiment, models)
    with folder, ProgressBar() as bar:
        for name in models.subjects:
            folder.floor[name] = floor
        folder.write()
        bar.start(len(cells) + len(models.subjects))
        for cell in cells:
            bar.now(str(cell))
            row, x = draw_cell(cell, experiment, metrics, floor, machine)
            folder.add(row)
            name, found = cell.subject.name, row.metrics["frechet"].value
            if found <= best.get(name, found):
                best[name], sheets[name] = found, x[:SHEET]
            bar.done(1)
        files = [RESULTS, *_pictures(folder, models, experiment, sheets, bar)]
    costs["experiment"] = {
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(time.process_time() - processor, 1),
    }
    write_whole(out / COSTS, json.dumps(costs, indent=1) + "\n")
    return Cooked(out, folder.rows, floor, costs, [*files, COSTS])


def _cells(experiment: Experiment, models: RecipeModels) -> list[RecipeCell]:
    """All cells, every one checked."""
    cells: list[RecipeCell] = []
    for subject in models.subjects.values():
        for comparison in experiment.compare:
            cells += comparison_cells(comparison, subject)
        if experiment.sweep is not None:
            cells += sweep_cells(experiment.sweep, subject)
    return cells


def _pictures(
    folder: RunFolder,
    models: RecipeModels,
    experiment: Experiment,
    sheets: Mapping[str, Tensor],
    bar: ProgressBar,
) -> list[str]:
    out, files = folder.path, []
    floor = folder.as_dict()["floor"]
    bar.now("pictures")
    compared = [row for row in folder.rows if row["part"] == COMPARISON and row["drawn"]]
    if compared:
        quality_figure(out / QUALITY, compared, floor, models.data.name)
        files.append(QUALITY)
    for name, subject in models.subjects.items():
        swept = [r for r in folder.rows if r["part"] == SWEEP and r["target"] == name]
        if swept:
            sweep_figure(out / f"guidance-{name}.png", swept, floor[name])
            files.append(f"guidance-{name}.png")
        strip_of_guidances(out / f"strip-{name}.png", experiment.strip, subject, experiment.seed)
        files.append(f"strip-{name}.png")
        if name in sheets:
            unit = models.data.scaling.to_unit(sheets[name])
            image_grid(out / f"samples-{name}.png", unit, SHEET)
            files.append(f"samples-{name}.png")
        bar.done(1)
    return files


def _training_costs(models: RecipeModels) -> dict[str, Any]:
    """Of each model, as its folder says; of shipped ones too."""
    found = {}
    for name, subject in models.subjects.items():
        (model,) = subject.models.values()
        keys = ("seconds", "cpu_seconds", "threads", "judge_accuracy")
        found[name] = {key: model.training[key] for key in keys if key in model.training}
    return found
