"""Images restored from what was measured of them, drawn and written."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from experiments.canvas import WIDTH, picture
from experiments.compare import Progress
from experiments.draw import make_machine, one_thread_each
from experiments.folders import default_out, prepare_out
from experiments.generate import write_array
from experiments.restoration import (
    METHODS,
    Restored,
    Settings,
    check_method,
    measurement_of,
    restore,
)
from experiments.results import environment, plain, write_whole
from experiments.spec import parse_solver, spec_of
from experiments.subjects import DIGITS, ModelSubject, SubjectOptions, make_subjects
from sde_diffusion import LinearMeasurement, bind
from sde_diffusion.errors import require_count, require_finite
from solvers import Integrator, Solver

MANIFEST = "restored.json"
ARRAYS = ("originals.npy", "measured.npy", "restored.npy")
PICTURE = "restored.png"
BELOW = 10.0  # sigma/alpha; above it the gradient of a network's x0 is its error over alpha squared

_SPREAD_SAMPLES = 10_000  # are enough for the data's standard deviation


@dataclass(frozen=True)
class RestoreOptions:
    """What the command line says."""

    task: str = "inpaint"
    methods: Sequence[str] = METHODS
    model: str | None = None
    target: str | None = None
    data: str | None = None
    sde: str | None = None
    solver: str = "ancestral"
    steps: int = 50
    count: int | None = None
    samples: int | None = None
    noise: float = 0.1
    known: float = 0.5
    factor: int = 2
    blur: float = 1.0
    scale: float = 1.0
    below: float | None = None
    jump: int = 5
    walks: int = 5
    particles: int = 16
    repeats: int = 3
    seed: int = 0
    device: str = "cpu"
    out: str | None = None


@dataclass
class RestorePlan:
    """Arguments known to be good."""

    options: RestoreOptions
    subject: ModelSubject
    sde: str
    measurement: LinearMeasurement
    originals: Tensor
    settings: Settings
    device: torch.device
    samples: int
    out: str


@dataclass
class Restoration:
    """What a run made.

    Attributes:
        rows: per method: distances, evaluations, seconds.
    """

    folder: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    files: Sequence[str] = ()


def checked_solver(options: RestoreOptions) -> Solver:
    """The solver, and all numbers that both kinds of run take.

    Raises:
        ValueError: whatever is wrong with them.
    """
    for name, value in (
        ("--steps", options.steps),
        ("--jump", options.jump),
        ("--walks", options.walks),
        ("--particles", options.particles),
        ("--repeats", options.repeats),
    ):
        require_count(name, value)
    require_count("--seed", options.seed, least=0)
    require_finite("--scale", options.scale)
    if options.below is not None:
        require_finite("--below", options.below, above=0.0)
    for name in options.methods:
        check_method(name, options.noise)
    solver = parse_solver(options.solver)
    if isinstance(solver, Integrator):
        raise ValueError(
            f"--solver {spec_of(solver)} owns its loop, and restoration needs a solver that steps "
            "here; see: sde-diffusion solvers"
        )
    return solver


def make_plan(options: RestoreOptions) -> RestorePlan:
    """Check everything.

    Raises:
        ValueError, TypeError: whatever is wrong with the options, before any work.
    """
    solver = checked_solver(options)
    count = require_count("-n", 6 if options.count is None else options.count)
    samples = require_count("--samples", 2 if options.samples is None else options.samples)
    if options.target not in (None, DIGITS):
        raise ValueError(
            f"--target {options.target!r} is a mixture, of which no images are restored; add "
            "--table for its table of errors, or give a --model"
        )
    if options.model is not None and options.target is not None:
        raise ValueError("--model and --target are two things to sample; give one of them")
    machine = make_machine(options.device, None)
    sdes = () if options.sde is None else (options.sde,)
    if options.model is None:
        (subject,) = make_subjects(SubjectOptions((DIGITS,), (), sdes or ("vp",), options.data))
    else:
        (subject,) = make_subjects(SubjectOptions((), (options.model,), sdes, options.data))
    if not isinstance(subject, ModelSubject) or len(subject.event_shape) != 3:
        raise ValueError(
            f"restore restores images (C, H, W), and {subject.name!r} makes samples of shape "
            f"{subject.event_shape}; --table measures the methods on vectors"
        )
    measurement = measurement_of(
        options.task,
        subject.event_shape,
        options.noise,
        known=options.known,
        factor=options.factor,
        blur=options.blur,
    )
    data = subject.data
    if data is None:
        raise ValueError(
            f"the data that {subject.name!r} was trained on are not to be found; name the images "
            "to restore with --data"
        )
    originals = torch.cat([data.test_x[:count], data.train_x[:count]])[:count]
    (sde,) = subject.sdes
    settings = Settings(
        solver,
        options.steps,
        options.seed,
        options.scale,
        BELOW if options.below is None else options.below,
        float(data.train_x[:_SPREAD_SAMPLES].std()),
        options.jump,
        options.walks,
        options.particles,
        rows=512,
    )
    config = {**asdict(options), "out": None, "device": None}
    out = options.out or default_out("restore", [subject.name, sde, options.task], config)
    return RestorePlan(
        options, subject, sde, measurement, originals, settings, machine.device, samples, out
    )


def run(plan: RestorePlan, progress: Progress) -> Restoration:
    """Measure, restore by every method, write arrays, picture and manifest.

    ``restored.npy`` is ``(methods, images, samples, *event)``; it and ``originals.npy`` are in the
    range of the data, ``measured.npy`` in the model's.
    """
    options, subject, measurement = plan.options, plan.subject, plan.measurement
    folder = prepare_out(plan.out, MANIFEST, (*ARRAYS, PICTURE))
    subject.to(plan.device)
    score_fn = bind(subject.models[plan.sde].model, None)
    y = measurement.draw(plan.originals, options.seed)
    repeated = y.repeat_interleave(plan.samples, 0)
    made = Restoration(folder, files=(*ARRAYS, PICTURE, MANIFEST))
    pictures: list[Tensor] = []
    progress.start(len(options.methods))
    with one_thread_each():
        for method in options.methods:
            progress.now(f"{options.task} · {subject.name} · {plan.sde} · {method}")
            found = restore(
                method,
                score_fn,
                subject.sdes[plan.sde],
                measurement,
                repeated.to(plan.device),
                subject.event_shape,
                plan.settings,
            )
            pictures.append(found.x.reshape(len(y), plan.samples, *subject.event_shape))
            made.rows.append(_row(method, found, plan, repeated))
            progress.done(1)
    scaling = subject.judge.data.scaling
    write_array(folder / ARRAYS[0], scaling.to_raw(plan.originals))
    write_array(folder / ARRAYS[1], y)
    write_array(folder / ARRAYS[2], scaling.to_raw(torch.stack(pictures)))
    shown = y if y.shape == plan.originals.shape else measurement.pseudo_inverse(y)
    columns = {"original": plan.originals[:, None], "measured": shown[:, None]}
    columns.update(zip(options.methods, pictures, strict=True))
    draw(folder / PICTURE, {name: scaling.to_unit(x) for name, x in columns.items()})
    write_whole(folder / MANIFEST, json.dumps(_manifest(plan, made), indent=1) + "\n")
    return made


def _row(method: str, found: Restored, plan: RestorePlan, y: Tensor) -> dict[str, Any]:
    """Distances are root mean squares per number, in the model's range ([-1, 1])."""
    originals = plan.originals.repeat_interleave(plan.samples, 0)
    numbers = max(1, plan.measurement.numbers(y))
    residual = (plan.measurement(found.x) - y).square().sum() / (len(y) * numbers)
    by_image = found.x.reshape(len(plan.originals), plan.samples, -1)
    spread = by_image.std(1, correction=0).square().mean().sqrt() if plan.samples > 1 else None
    return {
        "method": method,
        "to_measurement": math.sqrt(float(residual)),
        "to_original": float((found.x - originals).square().mean().sqrt()),
        "between_samples": None if spread is None else float(spread),
        "nfe": found.nfe,
        "network_passes": found.network_passes,
        "ess": found.ess,
        "seconds": found.seconds,
    }


def _manifest(plan: RestorePlan, made: Restoration) -> Any:
    return plain(
        {
            "format": "sde-diffusion-restored",
            "version": 1,
            "options": asdict(plan.options),
            "subject": plan.subject.name,
            "sde": plan.subject.sdes[plan.sde].config(),
            "solver": spec_of(plan.settings.solver),
            "data_std": plan.settings.data_std,
            "rows": made.rows,
            "files": list(made.files),
            "environment": environment(plan.device),
        }
    )


def draw(path: Path, columns: dict[str, Tensor]) -> None:
    """Images side by side, one row each: ``(N, k, C, H, W)`` in [0, 1] under each column's name."""
    widths = [x.shape[1] for x in columns.values()]
    count = len(next(iter(columns.values())))
    side = WIDTH / (sum(widths) + 0.25 * len(widths))
    with picture(path, height=0.35 + side * count) as figure:
        axes = figure.subplots(1, len(columns), squeeze=False, width_ratios=widths)[0]
        for ax, (name, x) in zip(axes, columns.items(), strict=True):
            ax.imshow(_tiled(x), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            ax.set_title(name, fontsize=8.5, pad=3)
            ax.set_axis_off()


def _tiled(x: Tensor) -> np.ndarray:
    """``(N, k, C, H, W)`` as one image, with white between."""
    images = x if x.shape[2] == 3 else x[:, :, :1]
    pad = max(1, round(x.shape[-1] / 10))
    framed = functional.pad(images.float().clamp(0, 1), (0, pad, 0, pad), value=1.0)
    n, k, c, h, w = framed.shape
    tiles = framed.permute(0, 3, 1, 4, 2).reshape(n * h, k * w, c)[:-pad, :-pad]
    return np.asarray(tiles.squeeze(-1) if c == 1 else tiles)
