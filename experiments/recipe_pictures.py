"""A recipe's pictures: the trade-off of guidance, and strips from noise to sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from torch import Tensor

from experiments.canvas import GREY, WIDTH, Look, in_order, picture
from experiments.conditions import Condition
from experiments.draw import one_thread_each
from experiments.generate import telling_moments
from experiments.pictures import draw_image
from experiments.planning import steps_within
from experiments.plots import quality_vs_nfe
from experiments.recipe_file import Strip
from experiments.spec import parse_solver
from experiments.subjects import ModelSubject
from solvers import Integrator, sample

__all__ = ["quality_figure", "strip_of_guidances", "sweep_figure"]

Rows = Sequence[Mapping[str, Any]]
Found = Mapping[str, Any]
_NAMES = {"classifier": "classifier guidance", "cfg": "classifier-free guidance"}
_MOMENTS = 10
_PER_GUIDANCE = 2  # samples of each guidance in a strip


def quality_figure(
    path: Path, rows: Rows, floor: Mapping[str, Mapping[str, Any]], data: str
) -> None:
    """Fréchet distance by evaluations: a panel for each model, side by side where SDEs differ.

    Args:
        path: the PNG to write.
        rows: of comparisons, as in results.json.
        floor: model -> what held-out data scores.
        data: name of the data, the title where panels stand side by side.
    """
    models = {row["target"]: row["sde"] for row in rows}
    if len(models) > 1 and len(set(models.values())) == len(models):
        # One data set, one judge, one floor: one row of panels, told apart by their SDEs.
        floor = {data: next(iter(floor.values()))}
        rows = [{**row, "target": data} for row in rows]
    targets = in_order([row["target"] for row in rows])
    quality_vs_nfe(path, rows, floor, metrics=dict.fromkeys(targets, "frechet"))


def sweep_figure(path: Path, rows: Rows, floor: Mapping[str, Found]) -> None:
    """Accuracy, Fréchet distance and diversity by guidance scale, and quality against diversity.

    Args:
        path: the PNG to write.
        rows: of a model's sweep, as in results.json.
        floor: name -> estimate of held-out data.
    """
    guidances = in_order([row["guidance"] for row in rows])
    with picture(path, height=5.6) as figure:
        (accuracy, frechet), (diversity, trade) = figure.subplots(2, 2)
        for k, guidance in enumerate(guidances):
            here = sorted((r for r in rows if r["guidance"] == guidance), key=lambda r: r["scale"])
            look, name = Look(k), _NAMES[guidance]
            _line(accuracy, here, "accuracy", look, f"{name}: independent judge")
            if guidance == "classifier":
                own = "its own guiding classifier"
                _line(accuracy, here, "own_accuracy", Look(k + 6), own, thin=True)
            _line(frechet, here, "frechet", look, name)
            _line(diversity, here, "variance", look, f"{name}: variance")
            _line(diversity, here, "recall", look, f"{name}: recall", thin=True)
            _trade_off(trade, here, look, name)
        for ax, metric in ((accuracy, "accuracy"), (frechet, "frechet"), (diversity, "variance")):
            _floor(ax, floor.get(metric))
            ax.set_xlabel("guidance scale γ")
        _floor(trade, floor.get("frechet"))
        accuracy.set_ylabel("label accuracy")
        frechet.set_ylabel("Fréchet distance")
        diversity.set_ylabel("variance within classes, recall")
        diversity.set_ylim(bottom=0)
        trade.set_xlabel("variance within classes; numbers: γ")
        trade.set_ylabel("Fréchet distance")
        for ax in (accuracy, frechet, diversity):
            ax.legend(fontsize=7.5)
        for ax in (frechet, trade):
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            ax.yaxis.set_minor_formatter(NullFormatter())
        figure.supxlabel(
            "Bars: ± 1 standard error. Dashed: held-out data. Variance: 1 is that of the training "
            "data; recall, thin: of held-out data.",
            fontsize=8,
            color=GREY,
        )


def _line(ax: Axes, rows: Rows, metric: str, look: Look, name: str, *, thin: bool = False) -> None:
    known = [row for row in rows if metric in row["metrics"]]
    if not known:
        return
    found = [row["metrics"][metric] for row in known]
    ax.errorbar(
        [row["scale"] for row in known],
        [one["value"] for one in found],
        yerr=[one["stderr"] or 0.0 for one in found],
        color=look.colour,
        marker=None if thin else look.marker,
        linestyle=(0, (1.5, 1.2)) if thin else look.dash,
        linewidth=1.0 if thin else 1.6,
        markersize=4.5,
        capsize=2.0,
        label=name,
    )


def _trade_off(ax: Axes, rows: Rows, look: Look, name: str) -> None:
    points = [
        (row["metrics"]["variance"]["value"], row["metrics"]["frechet"]["value"], row["scale"])
        for row in rows
    ]
    ax.plot(
        [x for x, _, _ in points],
        [y for _, y, _ in points],
        color=look.colour,
        marker=look.marker,
        linewidth=1.2,
        markersize=4.5,
        label=name,
    )
    for x, y, scale in points:
        ax.annotate(f"{scale:g}", (x, y), fontsize=6.5, xytext=(3, 3), textcoords="offset points")


def _floor(ax: Axes, found: Found | None) -> None:
    if found is not None and found["value"] is not None:
        ax.axhline(found["value"], color=GREY, linestyle=(0, (4, 2)), linewidth=1.0, zorder=1)


def strip_of_guidances(path: Path, strip: Strip, subject: ModelSubject, seed: int) -> None:
    """From noise to samples of one class, from the same noise: unguided, and guided in each way.

    Unguided is the unconditional network: no label at all. Every column has its own grey scale, as
    noise may be a thousand times larger than an image.

    Raises:
        ValueError: a label the model does not have.
    """
    (sde,) = subject.sdes
    conditions = {"unguided": Condition()}
    if subject.models[sde].classifier is not None:
        conditions["classifier"] = Condition("classifier", strip.scale, strip.label)
    conditions["classifier-free"] = Condition("cfg", strip.scale, strip.label)
    states: dict[str, Tensor] = {}
    for name, condition in conditions.items():
        subject.check(condition)
        states[name], times = _trajectory(strip, subject, condition, seed)
    shown = telling_moments(subject.sdes[sde], times, _MOMENTS)
    side = WIDTH / (len(shown) + 0.6)
    down = _PER_GUIDANCE * len(states)
    with picture(path, height=0.35 + side * down) as figure:
        axes = figure.subplots(down, len(shown), squeeze=False)
        for j, index in enumerate(shown.tolist()):
            axes[0, j].set_title(f"t = {float(times[index]):.3g}", fontsize=8, pad=3)
        for g, (name, trajectory) in enumerate(states.items()):
            scale = "" if name == "unguided" else f"\nγ = {strip.scale:g}"
            label = axes[g * _PER_GUIDANCE, 0]
            label.set_ylabel(f"{name}{scale}", fontsize=8, loc="top")
            for j, index in enumerate(shown.tolist()):
                for i in range(_PER_GUIDANCE):
                    draw_image(axes[g * _PER_GUIDANCE + i, j], trajectory[index, i])


def _trajectory(
    strip: Strip, subject: ModelSubject, condition: Condition, seed: int
) -> tuple[Tensor, Tensor]:
    solver = parse_solver(strip.solver)
    (sde,) = subject.sdes
    if isinstance(solver, Integrator):
        raise ValueError(f"solver {strip.solver!r} owns its loop and keeps no states")
    ids = torch.arange(_PER_GUIDANCE)
    with one_thread_each():
        solution = sample(
            subject.score_of(sde, condition)(ids),
            subject.sdes[sde],
            solver,
            shape=(len(ids), *subject.event_shape),
            sample_ids=ids,
            steps=steps_within(solver, strip.nfe, False),
            seed=seed,
            trajectory=True,
            device=next(subject.models[sde].model.parameters()).device,
        )
    if solution.trajectory is None or solution.trajectory_times is None:
        raise RuntimeError(f"{strip.solver} kept no trajectory")
    return solution.trajectory.detach().cpu(), solution.trajectory_times
