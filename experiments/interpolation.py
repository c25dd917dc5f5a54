"""Paths between samples through latent space, and samples as they would be in other classes."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from experiments.canvas import COLOURS, GREY, WIDTH, picture
from experiments.compare import Progress
from experiments.conditions import Condition, make_conditions
from experiments.folders import default_out, prepare_out
from experiments.results import environment, plain, write_whole
from experiments.spec import parse_solver, spec_of
from experiments.subjects import ExactSubject, ModelSubject, Subject, SubjectOptions, make_subjects
from sde_diffusion.errors import require_count, require_finite
from sde_diffusion.storage import write_bytes
from solvers import Adaptive
from solvers.encoding import change_class, interpolate, make_route, round_trip

MANIFEST, ARRAY, PICTURE = "interpolation.json", "interpolation.npy", "interpolation.png"


@dataclass(frozen=True)
class InterpolateOptions:
    """What the command line says."""

    target: str | None = None
    model: str | None = None
    sde: str | None = None
    pairs: int = 6
    points: int = 9
    label: str | None = None
    classes: bool = False
    temperature: float = 1.0
    solver: str = "tsitouras"
    steps: int | None = None
    tolerance: float | None = None
    seed: int = 0
    out: str | None = None
    data: str | None = None


@dataclass
class InterpolatePlan:
    """Arguments known to be good.

    Attributes:
        a, b: the ends, ``(pairs, *event)``; where classes change only ``a``, with ``labels``.
    """

    options: InterpolateOptions
    subject: Subject
    sde: str
    condition: Condition
    a: Tensor
    b: Tensor
    labels: Tensor | None
    settings: dict[str, Any]
    out: str


@dataclass
class Interpolated:
    """What a run made: paths ``(points, pairs, *event)``, and the ends' round-trip RMS."""

    folder: Path
    x: Tensor
    rms: float
    nfe: float


def make_plan(options: InterpolateOptions) -> InterpolatePlan:
    """Check everything.

    Raises:
        ValueError, TypeError: whatever is wrong with the options, before any work.
    """
    require_count("--pairs", options.pairs)
    require_count("--points", options.points, least=2)
    require_count("--seed", options.seed, least=0)
    require_finite("--temperature", options.temperature, above=0.0)
    if options.model is not None and options.target is not None:
        raise ValueError("--model and --target are two things to show; give one of them")
    if options.classes and options.label is not None:
        raise ValueError("--classes shows every class; leave --label out")
    sdes = () if options.sde is None else (options.sde,)
    if options.model is None:
        target = options.target or "digits"
        given = SubjectOptions((target,), (), sdes or ("vp",), options.data)
    else:
        given = SubjectOptions((), (options.model,), sdes, options.data)
    (subject,) = make_subjects(given)
    (sde,) = subject.sdes
    (condition,) = make_conditions(("none",), (), options.label)
    if condition.label == "all":
        raise ValueError("--label must be a class or 'none'; for every class in turn: --classes")
    subject.check(condition)
    if options.classes and (subject.num_classes or 0) < 2:
        raise ValueError(f"--classes needs classes, and {subject.name!r} has none; leave it out")
    if len(subject.event_shape) < 2 and subject.event_shape != (2,):
        raise ValueError(
            f"{subject.name!r} has events of shape {subject.event_shape}: the picture is of images "
            "or of points in the plane; choose another target or model"
        )
    a, b, labels = _ends(options, subject)
    solver = parse_solver(options.solver)
    settings: dict[str, Any] = {
        "solver": solver,
        "steps": options.steps,
        "grid": None if options.steps is None else "log_snr",
    }
    if options.tolerance is not None:
        if options.steps is not None:
            raise ValueError("--tolerance and --steps exclude each other; give one of them")
        require_finite("--tolerance", options.tolerance, above=0.0)
        settings["plan"] = Adaptive(options.tolerance, options.tolerance)
    plan, process = settings.get("plan"), subject.sdes[sde]
    make_route(process, solver, options.steps, settings["grid"], plan, a)
    config = {**asdict(options), "out": None}
    out = options.out or default_out("interpolate", [subject.name, sde], config)
    return InterpolatePlan(options, subject, sde, condition, a, b, labels, settings, out)


def run(plan: InterpolatePlan, progress: Progress) -> Interpolated:
    """Make the paths, the picture and the files."""
    options, subject = plan.options, plan.subject
    folder = prepare_out(plan.out, MANIFEST, (PICTURE,))
    process = subject.sdes[plan.sde]
    progress.start(2)
    progress.now(f"{subject.name} · {plan.sde} · {spec_of(plan.settings['solver'])}")
    ids = torch.arange(options.pairs)
    score_fn = subject.score_of(plan.sde, plan.condition)(ids)
    with torch.no_grad():
        trip = round_trip(score_fn, process, plan.a, **plan.settings)
        progress.done(1)
        if options.classes:
            model: Any = (
                subject.target.model(process)
                if isinstance(subject, ExactSubject)
                else subject.models[plan.sde].model  # type: ignore[attr-defined]
            )
            x = torch.stack(
                [
                    change_class(model, process, plan.a, plan.labels, c, **plan.settings).x
                    for c in range(subject.num_classes or 0)
                ]
            )
        else:
            x = interpolate(
                score_fn, process, plan.a, plan.b, count=options.points,
                temperature=options.temperature, **plan.settings,
            )  # fmt: skip
        progress.done(1)
    made = Interpolated(folder, x, float(trip.rms.max()), float(trip.nfe))
    _draw(plan, made)
    raw = x
    if isinstance(subject, ModelSubject):
        raw = subject.judge.data.scaling.to_raw(x)
    content = io.BytesIO()
    np.save(content, raw.numpy(), allow_pickle=False)
    write_bytes(folder / ARRAY, content.getvalue())
    document = {
        "format": "sde-diffusion-interpolation",
        "version": 1,
        "subject": subject.name,
        "sde": process.config(),
        "options": {k: v for k, v in asdict(options).items() if k != "out"},
        "round_trip_rms": made.rms,
        "nfe": made.nfe,
        "files": [ARRAY, PICTURE],
        "environment": environment("cpu"),
    }
    write_whole(folder / MANIFEST, json.dumps(plain(document), indent=1) + "\n")
    return made


def _ends(options: InterpolateOptions, subject: Subject) -> tuple[Tensor, Tensor, Tensor | None]:
    """The samples: of a target drawn, of a model its held-out data, chosen by the seed."""
    pairs = options.pairs
    if isinstance(subject, ExactSubject):
        label = None if options.label in (None, "none") else int(options.label or 0)
        x, labels = subject.target.sample(2 * pairs, options.seed, label, dtype=torch.float64)
        return x[:pairs], x[pairs:], labels[:pairs]
    if not isinstance(subject, ModelSubject) or subject.data is None:
        raise ValueError(
            f"the data that {subject.name!r} was trained on is not to be had; name some with --data"
        )
    held, classes = subject.data.test_x, subject.data.test_y
    chosen = torch.arange(len(held))
    if options.label not in (None, "none") and classes is not None:
        chosen = chosen[classes == int(options.label or 0)]
    if len(chosen) < 2 * pairs:
        found = len(chosen)
        raise ValueError(f"--pairs {pairs} needs {2 * pairs} held-out samples; there are {found}")
    generator = torch.Generator().manual_seed(options.seed)
    order = chosen[torch.randperm(len(chosen), generator=generator)[: 2 * pairs]]
    own = None if classes is None else classes[order[:pairs]]
    return held[order[:pairs]], held[order[pairs:]], own


def _draw(plan: InterpolatePlan, made: Interpolated) -> None:
    title = f"{plan.subject.name} · {plan.sde}, round trip RMS {made.rms:.1e}"
    path = made.folder / PICTURE
    if len(plan.subject.event_shape) > 1:
        unit = _grey(plan)
        columns = [unit(plan.a), *(unit(x) for x in made.x)]
        names = ["data", *(str(c) for c in range(len(made.x)))]
        if not plan.options.classes:
            columns.append(unit(plan.b))
            names = ["data", *(f"{w:.2f}" for w in np.linspace(0, 1, len(made.x))), "data"]
        _images(path, columns, names, title)
        return
    with picture(path, height=5.2) as figure:
        ax = figure.subplots()
        ax.set_title(title)
        for k in range(made.x.shape[1]):
            line = made.x[:, k].numpy()
            style = "o" if plan.options.classes else "o-"
            ax.plot(line[:, 0], line[:, 1], style, color=COLOURS[k % 7], markersize=3.5)
            ends = (plan.a[k],) if plan.options.classes else (plan.a[k], plan.b[k])
            for end in ends:
                ax.plot(
                    *end.numpy(), "o", color=COLOURS[k % 7], markersize=8, markerfacecolor="none"
                )
        _frame(plan, ax)


def _grey(plan: InterpolatePlan) -> Callable[[Tensor], Tensor]:
    """From samples to [0, 1]: by the data's scaling, or by the range of a target's samples."""
    if isinstance(plan.subject, ModelSubject):
        return plan.subject.judge.data.scaling.to_unit
    low, high = float(plan.a.min()), float(plan.a.max())
    return lambda x: (x - low) / max(high - low, 1e-12)


def _frame(plan: InterpolatePlan, ax: Axes) -> None:
    if isinstance(plan.subject, ExactSubject):
        cloud = plan.subject.target.sample(1500, plan.options.seed + 1)[0].numpy()
        ax.plot(cloud[:, 0], cloud[:, 1], ",", color=GREY, zorder=0)
    ax.set_aspect("equal")


def _images(path: Path, columns: list[Tensor], names: list[str], title: str) -> None:
    """One column of images for each name."""
    across, down = len(columns), len(columns[0])
    side = WIDTH / across
    with picture(path, height=0.45 + side * down) as figure:
        figure.suptitle(title, x=0.008, ha="left", fontsize=10, fontweight="bold")
        axes = figure.subplots(down, across, squeeze=False)
        for j, (images, name) in enumerate(zip(columns, names, strict=True)):
            for i, image in enumerate(images.float().cpu()):
                ax = axes[i, j]
                shown = image.permute(1, 2, 0) if image.ndim == 3 else image
                ax.imshow(shown.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
                ax.set_xticks([])
                ax.set_yticks([])
                data = name == "data"
                for spine in ax.spines.values():
                    spine.set_visible(data)
                    spine.set_color(COLOURS[1])
                    spine.set_linewidth(1.6)
            axes[0, j].set_title(name, fontsize=8.5, pad=3)
