"""Samples of one model or target, written as arrays and pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.compare import Progress
from experiments.conditions import Condition, make_conditions
from experiments.draw import Drawn, Machine, make_machine, one_thread_each
from experiments.folders import default_out, prepare_out
from experiments.pictures import SampleGroup, samples_figure, strip_figure
from experiments.planning import steps_within
from experiments.results import environment, plain, write_whole
from experiments.shards import MANIFEST, SHARDS
from experiments.spec import parse_solver, spec_of
from experiments.subjects import ExactSubject, ModelSubject, Subject, SubjectOptions, make_subjects
from sde_diffusion import SDE
from sde_diffusion.errors import require_count
from solvers import Integrator, Solver, grids, sample
from solvers.catalogue import settings_of

ARRAYS = ("samples.npy", "labels.npy", "trajectory.npy")
PICTURES = ("samples.png", "trajectory.png")
_SHOWN = 100  # images in the picture
_STRIP = 6  # samples of an image model in the strip; of vectors 600


@dataclass(frozen=True)
class SampleOptions:
    """What the command line says."""

    model: str | None = None
    target: str | None = None
    sde: str | None = None
    solver: str = "probability_flow"
    nfe: int = 50
    count: int = 64
    guidance: str = "none"
    scale: float | None = None
    label: str | None = None
    seed: int = 0
    batch_size: int | None = None
    device: str = "cpu"
    grid: str | None = None
    denoise: bool = False
    trajectory: bool = False
    out: str | None = None
    shard_size: int | None = None
    array_format: str | None = None


@dataclass
class SamplePlan:
    """Arguments known to be good."""

    options: SampleOptions
    subject: Subject
    sde: str
    condition: Condition
    solver: Solver | Integrator
    steps: int | None
    machine: Machine
    out: str


@dataclass
class Written:
    """What a run wrote, and what it cost."""

    folder: Path
    drawn: Drawn
    files: Sequence[str]


def make_plan(options: SampleOptions) -> SamplePlan:
    """Check everything.

    Raises:
        ValueError, TypeError: whatever is wrong with the options, before any work.
    """
    require_count("-n", options.count)
    require_count("--nfe", options.nfe)
    require_count("--seed", options.seed, least=0)
    if options.batch_size is not None:
        require_count("--batch-size", options.batch_size)
    if options.model is not None and options.target is not None:
        raise ValueError("--model and --target are two things to sample; give one of them")
    solver = parse_solver(options.solver)
    scales = () if options.scale is None else (options.scale,)
    make_conditions((options.guidance,), scales, options.label)
    machine = make_machine(options.device, options.batch_size)
    sdes = () if options.sde is None else (options.sde,)
    if options.model is None:
        target = options.target or "digits"
        (subject,) = make_subjects(SubjectOptions((target,), (), sdes or ("vp",)))
    else:
        (subject,) = make_subjects(SubjectOptions((), (options.model,), sdes))
    (condition,) = make_conditions((options.guidance,), scales, options.label, subject.unguided)
    subject.check(condition)
    (sde,) = subject.sdes
    if options.grid is not None:
        grids.resolve(options.grid, subject.sdes[sde], 1)
    if options.trajectory and isinstance(solver, Integrator):
        raise ValueError(
            f"--trajectory needs a solver that steps here, and {spec_of(solver)} owns its loop; "
            "leave --trajectory out, or use probability_flow"
        )
    steps = steps_within(solver, options.nfe, options.denoise)
    config = {**asdict(options), "out": None, "batch_size": None, "device": None}
    if options.shard_size is not None:  # a set in shards is the same set when it grows
        config["count"] = None
    out = options.out or default_out("sample", [subject.name, sde], config)
    return SamplePlan(options, subject, sde, condition, solver, steps, machine, out)


def run(plan: SamplePlan, progress: Progress) -> Written:
    """Draw the samples and write them.

    ``samples.npy`` holds them in the range of the data the model was trained on, ``labels.npy``
    the class of each where they have one, ``manifest.json`` all that determines them.
    """
    options, subject = plan.options, plan.subject
    _refuse_shards(plan.out)
    folder = prepare_out(plan.out, MANIFEST, (*ARRAYS, *PICTURES))
    subject.to(plan.machine.device)
    ids = torch.arange(options.count)
    progress.start(1 + options.trajectory)
    progress.now(f"{options.count} samples · {subject.name} · {plan.sde} · {spec_of(plan.solver)}")
    with one_thread_each():
        drawn = draw_ids(plan, ids)
        progress.done(1)
        files = ["samples.npy"]
        write_array(folder / "samples.npy", raw_values(subject, drawn.x))
        labels = plan.condition.labels(ids, subject.num_classes)
        if labels is not None:
            write_array(folder / "labels.npy", labels)
            files.append("labels.npy")
        if options.trajectory:
            _write_trajectory(plan, folder)
            files += ["trajectory.npy", "trajectory.png"]
            progress.done(1)
    draw_picture(plan, folder / "samples.png", drawn.x)
    files += ["samples.png", MANIFEST]
    write_whole(folder / MANIFEST, json.dumps(_manifest(plan, drawn, files), indent=1) + "\n")
    return Written(folder, drawn, files)


def draw_ids(plan: SamplePlan, ids: Tensor) -> Drawn:
    """The samples with these ids (N,)."""
    subject, options = plan.subject, plan.options
    return plan.machine.draw(
        subject.score_of(plan.sde, plan.condition),
        subject.sdes[plan.sde],
        plan.solver,
        event_shape=subject.event_shape,
        ids=ids,
        steps=plan.steps,
        seed=options.seed,
        grid=None if plan.steps is None else options.grid,
        denoise=options.denoise,
        suggested=subject.suggested,
    )


def _refuse_shards(out: str) -> None:
    """A large set is not written over by a small one."""
    path = Path(out).expanduser()
    if (path / SHARDS).is_dir():
        raise ValueError(f"--out {str(path)!r} holds a set in shards; name another folder")


def _write_trajectory(plan: SamplePlan, folder: Path) -> None:
    """The same first samples once more, every state kept: a sample does not depend on its batch."""
    options, subject = plan.options, plan.subject
    images = len(subject.event_shape) > 1
    ids = torch.arange(min(options.count, _STRIP if images else 600))
    solution = sample(
        subject.score_of(plan.sde, plan.condition)(ids),
        subject.sdes[plan.sde],
        plan.solver,
        shape=(len(ids), *subject.event_shape),
        sample_ids=ids,
        steps=plan.steps,
        grid=options.grid,
        seed=options.seed,
        trajectory=True,
        device=plan.machine.device,
    )
    if solution.trajectory is None or solution.trajectory_times is None:
        raise RuntimeError(f"{spec_of(plan.solver)} kept no trajectory")
    states = solution.trajectory.cpu()
    write_array(folder / "trajectory.npy", states)
    shown = _telling(subject.sdes[plan.sde], solution.trajectory_times, 10 if images else 6)
    times = solution.trajectory_times[shown]
    strip_figure(folder / "trajectory.png", states[shown], times, density=_density(plan))


def _telling(sde: SDE, times: Tensor, count: int) -> Tensor:
    """Indices of the moments in which something is seen: even in log-SNR where that is middling."""
    log_snr = sde.at(times).half_log_snr.clamp(-2.0, 3.0)
    wanted = torch.linspace(float(log_snr[0]), float(log_snr[-1]), count, dtype=log_snr.dtype)
    nearest = (log_snr[:, None] - wanted).abs().argmin(0)
    nearest[0], nearest[-1] = 0, len(times) - 1
    return nearest.unique()


def draw_picture(plan: SamplePlan, path: Path, x: Tensor) -> None:
    """The first samples, as images or points."""
    subject = plan.subject
    images = len(subject.event_shape) > 1
    title = f"{subject.name} · {plan.sde}, {plan.options.nfe} evaluations"
    condition = f", {plan.condition}" if str(plan.condition) else ""
    shown = x[:_SHOWN]
    if images and isinstance(subject, ModelSubject):
        image_grid(path, subject.judge.data.scaling.to_unit(shown))
        return
    density = _density(plan)
    truth = None
    whole, label = plan.condition.law == "whole", plan.condition.label
    one = plan.condition.law == "conditional" and isinstance(label, int)
    if isinstance(subject, ExactSubject) and (whole or one):
        own = label if one and isinstance(label, int) else None
        truth, _ = subject.target.sample(600, plan.options.seed, own)
    panel = {f"{len(x):,} samples, {spec_of(plan.solver)}": x[:600]}
    samples_figure(path, [SampleGroup(title + condition, panel, truth, density)], columns=2)


def image_grid(path: Path, images: Tensor, limit: int = _SHOWN) -> None:
    """Images side by side, magnified by a whole number so that a grid is about 800 pixels wide."""
    from PIL import Image

    from experiments.pictures import tile_images

    tiles = tile_images(images, limit=limit)
    magnified = max(1, 800 // max(tiles.shape[:2]))
    pixels = np.kron(tiles, np.ones((magnified, magnified, *[1] * (tiles.ndim - 2))))
    picture = Image.fromarray((pixels * 255).round().astype(np.uint8))
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        picture.save(temporary, format="png")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _density(plan: SamplePlan) -> Any:
    subject = plan.subject
    if not isinstance(subject, ExactSubject) or subject.event_shape != (2,):
        return None
    condition, target = plan.condition, subject.target
    if condition.law == "whole":
        return target.log_prob
    if condition.law == "conditional" and isinstance(condition.label, int):
        return target.conditional(condition.label).log_prob
    return None


def raw_values(subject: Subject, x: Tensor) -> Tensor:
    """Samples in the range of the data that the model was trained on."""
    if not isinstance(subject, ModelSubject):
        return x
    scaling = subject.judge.data.scaling
    # Dequantised data comes back on its levels, anything else as the network made it.
    return scaling.quantise(x) if scaling.dequantised else scaling.to_raw(x)


def write_array(path: Path, x: Tensor) -> None:
    """Write ``x`` as a .npy file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.save(file, x.numpy(), allow_pickle=False)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _manifest(plan: SamplePlan, drawn: Drawn, files: Sequence[str]) -> dict[str, Any]:
    costs = {name: getattr(drawn, name) for name in ("nfe", "network_passes", "seconds")}
    return {**describe(plan), **plain(costs), "files": list(files)}


def describe(plan: SamplePlan) -> dict[str, Any]:
    """What determines the samples, and where they are drawn; JSON-like."""
    subject, options = plan.subject, plan.options
    scaling = None
    if isinstance(subject, ModelSubject):
        own = subject.judge.data.scaling
        scaling = {"low": own.low, "high": own.high}
    manifest: dict[str, Any] = plain(
        {
            "format": "sde-diffusion-samples",
            "version": 1,
            "subject": subject.name,
            "model": options.model,
            "sde": subject.sdes[plan.sde].config(),
            "solver": spec_of(plan.solver),
            "settings": settings_of(plan.solver),
            "steps": plan.steps,
            "grid": options.grid or subject.sdes[plan.sde].default_grid,
            "denoise": options.denoise,
            "guidance": plan.condition.guidance,
            "scale": plan.condition.scale,
            "label": plan.condition.label,
            "seed": options.seed,
            "samples": options.count,
            "event_shape": list(subject.event_shape),
            "data_range": scaling,
            "environment": environment(plan.machine.device),
        }
    )
    return manifest
