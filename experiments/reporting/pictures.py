"""The samples on the page: kept ones of every sampler, and one sampler's way from noise to data."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments import guidance_run
from experiments.compare import CompareOptions, make_plan
from experiments.guidance_run import GuidanceOptions
from experiments.judging import block_ids
from experiments.pictures import tile_images
from experiments.planning import Plan, PlannedCell
from experiments.quality import Rows, figure_of, primary_of, sde_title, sign_of
from experiments.runs import Run, identity, sampler
from experiments.spec import spec_of
from experiments.store import CellStore
from experiments.tables import number
from solvers import sample

# What lays out a run again, of the experiments whose samples are kept.
_PLANNED: dict[str, tuple[Any, Callable[[Any], Plan]]] = {
    "compare": (CompareOptions, make_plan),
    "guidance": (GuidanceOptions, guidance_run.make_plan),
}
POINTS, IMAGES = 300, 25
SHOWN_NFE = 20  # few enough for samplers to differ visibly
FRAMES = 13
_FEW = 1e-12


@dataclass(frozen=True)
class Panel:
    """Samples: a Plotly figure of points, or an image; one of the two."""

    title: str
    note: str
    figure: dict[str, Any] | None = None
    image: str = ""


@dataclass(frozen=True)
class Gallery:
    """Panels of one target under one SDE and condition."""

    title: str
    panels: list[Panel]


@dataclass(frozen=True)
class Journey:
    """Moments of a denoising trajectory.

    Attributes:
        title: target, SDE and sampler.
        moments: a caption for each moment.
        frames: for points: ``x``, ``y``, ``range`` of each.
        images: for images: one each.
    """

    title: str
    moments: list[str]
    frames: list[dict[str, Any]] = field(default_factory=list)
    images: list[str] = field(default_factory=list)


def plans_of(run: Run) -> tuple[list[Plan], list[str]]:
    """The run's comparisons laid out again on this machine's processor, and what prevents it."""
    plans, failures = [], []
    config = run.results.get("config", {})
    if run.results["experiment"] not in _PLANNED:
        return [], []
    for source in [source["config"] for source in config.get("merged", ())] or [config]:
        try:
            plans.append(_laid_out(run.results["experiment"], source))
        except (ValueError, TypeError, OSError, ImportError) as error:
            failures.append(f"What was sampled cannot be made again here: {error}")
    return plans, failures


def _laid_out(experiment: str, config: Mapping[str, Any]) -> Plan:
    """One processor and no pool: nothing is drawn but what the page shows."""
    options, lay_out = _PLANNED[experiment]
    here = {"device": "cpu", "jobs": 1, "scheduler": None, "batch_size": None, "out": "unused"}
    known = {name: config[name] for name in options.__dataclass_fields__ if name in config}
    if "intervals" in known:  # JSON has no tuples
        known["intervals"] = [pair and tuple(pair) for pair in known["intervals"]]
    return lay_out(options(**{**known, **here}))


def galleries(run: Run, plans: Sequence[Plan] = ()) -> list[Gallery]:
    """The kept samples of all samplers, at about `SHOWN_NFE` evaluations; first repeat.

    Args:
        plans: the run's; true samples come from them.
    """
    store = CellStore(run.path)
    rows = run.rows
    budgets = sorted({row["budget"] for row in rows if row.get("budget")})
    enough = [budget for budget in budgets if budget >= SHOWN_NFE]
    shown = enough[0] if enough else (budgets[-1] if budgets else None)
    groups: dict[str, list[tuple[Mapping[str, Any], Tensor]]] = {}
    for row in rows:
        if row.get("budget") not in (None, shown) or not row.get("cells"):
            continue
        tensors = store.tensors(row["cells"][0])
        if tensors is not None and "x" in tensors:
            what = identity(row)
            parts = [what[0], sde_title(what[1]), *what[4:]]
            title = " · ".join(part for part in parts if part)
            groups.setdefault(title, []).append((row, tensors["x"]))
    return [
        Gallery(title, _panels(found, rows, _truth(plans, found[0][0])))
        for title, found in groups.items()
    ]


def journeys(run: Run, plans: Sequence[Plan]) -> tuple[list[Journey], list[str]]:
    """A trajectory for each target, computed anew, and what could not be.

    Of the best sampler by the primary metric at about `SHOWN_NFE` evaluations, under its SDE; the
    samples are the first of the run's, since noise depends on seed and id alone.
    """
    found, failures = [], []
    for target in dict.fromkeys(str(row["target"]) for row in run.rows) if plans else ():
        row = _shown_row([row for row in run.rows if row["target"] == target], run.rows)
        planned = None if row is None else _planned(plans, row)
        if row is None or planned is None:
            failures.append(f"{target}: no sampler with steps that can be run again.")
            continue
        try:
            found.append(_journey(*planned))
        except Exception as error:  # a user's model or sampler, whatever it raises
            failures.append(f"{target}: {sampler(row)} could not be run again: {error}")
    return found, failures


def _truth(plans: Sequence[Plan], row: Mapping[str, Any]) -> Tensor | None:
    """True samples of a row's law; None where they are not at hand, or would have to be solved."""
    planned = _planned(plans, row)
    if planned is None or "finely" in str(row.get("truth")):
        return None
    plan, cell = planned
    try:
        return plan.judge(cell).true_samples(cell.cell, 0)
    except Exception:  # a user's data, whatever reading it raises: a page without true samples
        return None


def _panels(
    found: Sequence[tuple[Mapping[str, Any], Tensor]], rows: Rows, truth: Tensor | None
) -> list[Panel]:
    # The middle one of all samplers' ranges: one of them may have gone astray.
    ranges = [_frame(x) for _, x in found] if truth is None else [_frame(truth)]
    ends = np.median(ranges, axis=0).tolist()
    panels = [] if truth is None else [_panel("true samples", "", truth, ends, "@0")]
    for row, x in found:
        metric = primary_of(row, rows)
        note = f"{row['nfe']:.4g} evaluations"
        if figure_of(row, metric) is not None:
            value = row["metrics"][metric]
            note += f", {metric} {number(value['value'], value.get('stderr'))}"
        panels.append(_panel(sampler(row), note, x, ends, "@1"))
    return panels


def _panel(title: str, note: str, x: Tensor, ends: Sequence[float], colour: str) -> Panel:
    if x.ndim > 2:
        return Panel(title, note, image=_png(x, ends[0], ends[1]))
    layout = _square(ends)
    layout["xaxis"]["title"], layout["yaxis"]["title"] = _axes(x)
    return Panel(title, note, {"data": [_scatter(_points(x), colour)], "layout": layout})


def _shown_row(here: Rows, rows: Rows) -> Mapping[str, Any] | None:
    metric = primary_of(here[0], rows)
    known = [row for row in here if figure_of(row, metric) is not None and row["steps"]]
    if not known:
        return None
    nearest = min(abs(row["nfe"] - SHOWN_NFE) for row in known)
    near = [row for row in known if abs(row["nfe"] - SHOWN_NFE) <= nearest + 1]
    return min(near, key=lambda row: sign_of(metric) * (figure_of(row, metric) or 0.0))


def _planned(plans: Sequence[Plan], row: Mapping[str, Any]) -> tuple[Plan, PlannedCell] | None:
    for plan in plans:
        for planned in plan.cells:
            cell, condition = planned.cell, planned.cell.condition
            same = (planned.subject.name, cell.sde, spec_of(cell.solver), planned.budget) == (
                row["target"],
                row["sde"],
                sampler(row),
                row.get("budget"),
            )
            asked = (condition.guidance, condition.scale, condition.label, condition.interval)
            interval = row.get("interval")
            given = (row["guidance"], row["scale"], row.get("label"))
            if same and asked == (*given, interval and tuple(interval)):
                return plan, planned
    return None


def _journey(plan: Plan, planned: PlannedCell) -> Journey:
    subject, cell = planned.subject, planned.cell
    task = plan.tasks(planned)[0]
    process = subject.sdes[cell.sde]
    images = len(subject.event_shape) > 1
    ids = block_ids(task.samples, task.repeat)[: IMAGES if images else POINTS]
    with torch.no_grad():
        solution = sample(
            subject.score_of(cell.sde, cell.condition)(ids),
            process,
            cell.solver,
            shape=(len(ids), *subject.event_shape),
            steps=planned.steps,
            grid=task.grid,
            seed=task.seed,
            sample_ids=ids,
            denoise=task.denoise,
            trajectory=True,
        )
    states, times = solution.trajectory, solution.trajectory_times
    if states is None or times is None or len(states) < 2:
        raise ValueError("it keeps no trajectory")
    last = len(states) - 1
    chosen = sorted({round(i * last / (FRAMES - 1)) for i in range(FRAMES)})
    moments, frames, pictures = [], [], []
    for i in chosen:
        level = process.at(times[i].double())
        ratio = float(level.sigma / level.alpha)
        moments.append(f"t = {float(level.t):.3g}, σ/α = {ratio:.3g}, state {i} of {last}")
        if images:
            pictures.append(_png(states[i], *_frame(states[i])))
        else:
            frames.append(_points(states[i]) | {"range": list(_frame(states[i]))})
    guided = "" if cell.condition.guidance == "none" else f"{cell.condition.guided_by} · "
    title = (
        f"{subject.name} · {sde_title(cell.sde)} · {guided}{spec_of(cell.solver)}, "
        f"{solution.nfe:.4g} evaluations"
    )
    return Journey(title, moments, frames, pictures)


def _points(x: Tensor) -> dict[str, Any]:
    """The first two numbers of each; of numbers, the number against its place."""
    flat = x[:POINTS].detach().cpu().double().reshape(min(len(x), POINTS), -1)
    second = flat[:, 1] if flat.shape[1] > 1 else torch.linspace(-1, 1, len(flat)).double()
    pairs = zip(flat[:, 0].tolist(), second.tolist(), strict=True)
    rounded = [(float(f"{a:.4g}"), float(f"{b:.4g}")) for a, b in pairs]
    return {"x": [a for a, _ in rounded], "y": [b for _, b in rounded]}


def _axes(x: Tensor) -> tuple[dict[str, str], dict[str, str]]:
    size = int(np.prod(x.shape[1:]))
    if size <= 2:
        return {"text": "x₁"}, {"text": "x₂" if size == 2 else ""}
    return {"text": f"x₁ of {size}"}, {"text": f"x₂ of {size}"}


def _scatter(frame: Mapping[str, Any], colour: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "x": frame["x"],
        "y": frame["y"],
        "marker": {"color": colour, "size": 3.5, "opacity": 0.6},
        "hoverinfo": "skip",
    }


def _square(ends: Sequence[float]) -> dict[str, Any]:
    return {
        "height": 260,
        "showlegend": False,
        "xaxis": {"range": list(ends), "nticks": 5},
        "yaxis": {"range": list(ends), "nticks": 5, "scaleanchor": "x"},
        "margin": {"l": 42, "r": 8, "t": 8, "b": 40},
    }


def journey_figure(journey: Journey) -> dict[str, Any]:
    """The last moment of points."""
    last = journey.frames[-1]
    layout = _square(last["range"]) | {"height": 380}
    return {"data": [_scatter(last, "@1")], "layout": layout}


def _frame(x: Tensor) -> tuple[float, float]:
    """The range of nearly all numbers of samples: grey scale of images, both axes of points."""
    shown = x[:POINTS].detach().cpu().double().numpy().reshape(min(len(x), POINTS), -1)
    if x.ndim <= 2:
        shown = shown[:, :2]
    if not np.isfinite(shown).all():
        shown = shown[np.isfinite(shown)]
    if not shown.size:
        return 0.0, 1.0
    low, high = np.quantile(shown, (0.002, 0.998))
    reach = max(float(high - low), _FEW)
    margin = 0.15 * reach if x.ndim <= 2 else 0.0
    return float(low) - margin, float(high) + margin


def _png(x: Tensor, low: float, high: float) -> str:
    """A grid of images as a data URI."""
    from PIL import Image

    tiles = tile_images((x[:IMAGES].detach().cpu() - low) / max(high - low, _FEW), IMAGES)
    picture = Image.fromarray(np.round(np.nan_to_num(tiles) * 255).astype(np.uint8))
    stream = io.BytesIO()
    picture.save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
