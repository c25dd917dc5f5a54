"""What a recipe samples, cell by cell, and the rows that come of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.conditions import ALL, Condition
from experiments.draw import Machine, one_thread_each
from experiments.estimates import Estimate
from experiments.planning import steps_within
from experiments.recipe_file import Comparison, Experiment, Sweep
from experiments.recipe_metrics import RecipeMetrics
from experiments.results import Row
from experiments.spec import parse_solver, spec_of
from experiments.subjects import ModelSubject
from solvers.catalogue import name_of, settings_of

__all__ = ["RecipeCell", "comparison_cells", "draw_cell", "sweep_cells"]

COMPARISON, SWEEP = "comparison", "sweep"


@dataclass(frozen=True)
class RecipeCell:
    """One solver on one model at one number of evaluations, guided in one way.

    Attributes:
        part: "comparison" or "sweep".
        subject: the model.
        condition: guidance, scale and classes.
        solver: as ``--solver`` takes it.
        nfe: the budget.
        denoise, grid, drawn, name: as in `Comparison`.
    """

    part: str
    subject: ModelSubject
    condition: Condition
    solver: str
    nfe: int
    denoise: bool = False
    grid: str | None = None
    drawn: bool = True
    name: str | None = None

    def __str__(self) -> str:
        return f"{self.subject.name} · {self.condition} · {self.solver} · {self.nfe} evaluations"


def comparison_cells(comparison: Comparison, subject: ModelSubject) -> Iterator[RecipeCell]:
    """Every solver at every number of evaluations, unguided, all classes in turn."""
    for solver in comparison.solvers:
        own_steps = getattr(parse_solver(solver), "adaptive", False)
        for nfe in comparison.nfe[:1] if own_steps else comparison.nfe:
            yield RecipeCell(
                COMPARISON,
                subject,
                Condition(label=ALL),
                solver,
                nfe,
                comparison.denoise,
                comparison.grid,
                comparison.drawn,
                comparison.name,
            )


def sweep_cells(sweep: Sweep, subject: ModelSubject) -> Iterator[RecipeCell]:
    """Every guidance at every scale, all classes in turn.

    Raises:
        ValueError: a guidance that the model cannot have.
    """
    for guidance in sweep.guidances:
        for scale in sweep.scales:
            condition = Condition(guidance, scale, ALL)
            subject.check(condition)
            yield RecipeCell(SWEEP, subject, condition, sweep.solver, sweep.nfe)


def draw_cell(
    cell: RecipeCell,
    experiment: Experiment,
    metrics: RecipeMetrics,
    floor: dict[str, Estimate],
    machine: Machine,
) -> tuple[Row, Tensor]:
    """Sample a cell and measure it: its row, and the samples."""
    subject, solver = cell.subject, parse_solver(cell.solver)
    (sde,) = subject.sdes
    ids = torch.arange(experiment.samples * experiment.repeats)
    steps = steps_within(solver, cell.nfe, cell.denoise)
    with one_thread_each():
        drawn = machine.draw(
            subject.score_of(sde, cell.condition),
            subject.sdes[sde],
            solver,
            event_shape=subject.event_shape,
            ids=ids,
            steps=steps,
            seed=experiment.seed,
            grid=None if steps is None else cell.grid,
            denoise=cell.denoise,
            suggested=subject.suggested,
        )
    labels = cell.condition.class_of(ids, subject.num_classes or 1)
    label = (cell.name or spec_of(solver)) + (", denoised" if cell.denoise else "")
    row = Row(
        solver=name_of(type(solver)),
        settings=settings_of(solver),
        sde=sde,
        target=subject.name,
        guidance=cell.condition.guidance,
        scale=cell.condition.scale,
        steps=steps,
        nfe=drawn.nfe,
        network_passes=drawn.network_passes,
        seconds=drawn.seconds,
        metrics=metrics.of(drawn.x, labels, subject.models[sde]),
        extra={
            "part": cell.part,
            "drawn": cell.drawn,
            "budget": None if steps is None else cell.nfe,
            "spec": spec_of(solver),
            "solver_label": label,
            "label": cell.condition.label,
            "guided_by": cell.condition.guided_by,
            "classes": cell.condition.classes,
            "primary": "frechet",
            "truth": "real data, in the judge's features",
            "floor": {name: found._asdict() for name, found in floor.items()},
            "grid": cell.grid or subject.sdes[sde].default_grid,
            "denoise": cell.denoise,
            "seed": experiment.seed,
            "samples": len(ids),
            "repeats": experiment.repeats,
            "status": "ok",
        },
    )
    return row, drawn.x
