"""Restoration tasks and methods by name."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sde_diffusion import (
    SDE,
    Blur,
    Colorization,
    Downsampling,
    Inpainting,
    LinearMeasurement,
    ScoreFn,
    dps_guided,
    gaussian_kernel,
    pigdm_guided,
)
from sde_diffusion.errors import require_between, require_count, require_finite, unknown_name
from sde_diffusion.scales import Scale, below
from solvers import RePaint, Replacement, Solver, manifold_constrained, sample, smc_sample

TASKS = ("inpaint", "color", "super", "deblur")
METHODS = ("replacement", "repaint", "dps", "pigdm", "mcg", "smc")


@dataclass(frozen=True)
class Settings:
    """How the methods are run.

    Attributes:
        solver: of all but smc, which has its own chain (``ancestral``).
        steps: of one walk over the grid.
        scale: of the gradients of dps, pigdm and mcg.
        below: gradients act where sigma/alpha is below this; None: everywhere.
        data_std: standard deviation of the data, for the methods that assume one.
        jump, walks: of repaint.
        particles: of smc, per sample.
        rows: states sampled at a time; results do not depend on it.
    """

    solver: Solver
    steps: int
    seed: int
    scale: float = 1.0
    below: float | None = None
    data_std: float = 1.0
    jump: int = 5
    walks: int = 5
    particles: int = 16
    rows: int = 4096
    grid: str | None = None


@dataclass(frozen=True)
class Restored:
    """Samples of one method.

    Attributes:
        x: ``(N, *event)``, on the CPU.
        nfe, network_passes: per sample; of smc per particle, times the particles.
        ess: smallest effective sample size of each sample's particles, mean over samples; None for
            all but smc.
    """

    x: Tensor
    nfe: float
    network_passes: float
    seconds: float
    ess: float | None = None


def measurement_of(
    task: str,
    event_shape: tuple[int, ...],
    noise: float,
    *,
    known: float = 0.5,
    factor: int = 2,
    blur: float = 1.0,
) -> LinearMeasurement:
    """The measurement of a task, for events ``(D,)`` or ``(C, H, W)``.

    Args:
        known: the share that inpainting leaves: the upper rows, or the first numbers of a vector.
        factor: of super-resolution.
        blur: standard deviation of the blur, in pixels.
    Raises:
        ValueError: no such task, or one that does not fit the events.
    """
    if task not in TASKS:
        raise unknown_name("--task", task, TASKS)
    require_finite("--noise", noise)
    if noise < 0:
        raise ValueError(f"--noise must be at least 0, got {noise:g}")
    vectors = len(event_shape) == 1
    if task == "inpaint":
        require_between("--known", known, 0, 1)
        mask = torch.zeros(event_shape)
        axis = 0 if vectors else len(event_shape) - 2
        mask.narrow(axis, 0, round(known * event_shape[axis])).fill_(1)
        return Inpainting(mask, noise)
    if task == "color":
        if len(event_shape) != 3 or event_shape[0] != 3:
            raise ValueError(
                f"--task color needs colour images (3, H, W), and these samples are {event_shape}: "
                "there is no colour to restore; give a --model trained on colour images, or "
                "another --task"
            )
        return Colorization(noise)
    sides = event_shape[-1:] if vectors else event_shape[-2:]
    if task == "super":
        require_count("--factor", factor)
        if any(side % factor for side in sides):
            raise ValueError(
                f"--factor {factor} must divide the sides of the samples, {tuple(sides)}"
            )
        return Downsampling(factor, noise)
    require_finite("--blur", blur, above=0.0)
    size = min(2 * math.ceil(2 * blur) + 1, *sides, 2 * (min(sides) // 2) - 1)
    return Blur(gaussian_kernel(size, blur, axes=len(sides)), noise)


def check_method(name: str, noise: float) -> None:
    """Raises ``ValueError`` where there is no such method, or it does not go with the noise."""
    if name not in METHODS:
        raise unknown_name("--method", name, METHODS)
    if name == "smc" and noise == 0:
        raise ValueError(
            "--method smc weighs its particles by the likelihood, which --noise 0 makes 0 almost "
            "everywhere; give a small --noise, as 0.01"
        )


def restore(
    method: str,
    score_fn: ScoreFn,
    sde: SDE,
    measurement: LinearMeasurement,
    y: Tensor,
    event_shape: tuple[int, ...],
    settings: Settings,
) -> Restored:
    """One sample of each measurement in ``y``, ``(N, *measured)``, by a method's name."""
    rows = max(1, settings.rows // (settings.particles if method == "smc" else 1))
    started = time.perf_counter()
    parts = []
    for ids in torch.arange(len(y)).split(rows):
        shape = len(ids), *event_shape
        part = _Part(score_fn, sde, measurement, y[ids.to(y.device)], shape, ids, settings)
        parts.append(_by_particles(part) if method == "smc" else _by_sampler(method, part))
    seconds = time.perf_counter() - started
    counts = [len(part.x) / len(y) for part in parts]
    ess = None
    if method == "smc":
        ess = sum(c * (p.ess or 0.0) for c, p in zip(counts, parts, strict=True))
    return Restored(
        torch.cat([part.x for part in parts]),
        parts[0].nfe,
        parts[0].network_passes,
        seconds,
        ess,
    )


class _Part(NamedTuple):
    """The samples that are restored together."""

    score_fn: ScoreFn
    sde: SDE
    measurement: LinearMeasurement
    y: Tensor
    shape: tuple[int, ...]
    ids: Tensor
    settings: Settings


def _by_sampler(method: str, part: _Part) -> Restored:
    score_fn, sde, measurement, y, shape, ids, settings = part
    solver, spread = settings.solver, settings.data_std
    scale: Scale = settings.scale
    if settings.below is not None:
        scale = below(settings.below, scale)
    made: dict[str, Callable[[], tuple[ScoreFn, Solver]]] = {
        "replacement": lambda: (score_fn, Replacement(solver, measurement, y)),
        "repaint": lambda: (score_fn, Replacement(solver, measurement, y)),
        "dps": lambda: (dps_guided(score_fn, measurement, y, scale, spread), solver),
        "pigdm": lambda: (pigdm_guided(score_fn, measurement, y, scale, spread), solver),
        "mcg": lambda: manifold_constrained(score_fn, solver, measurement, y, scale, spread),
    }
    guided, method_solver = made[method]()
    run = sample(
        guided,
        sde,
        method_solver,
        shape=shape,
        steps=settings.steps,
        grid=settings.grid,
        plan=RePaint(settings.jump, settings.walks) if method == "repaint" else None,
        seed=settings.seed,
        sample_ids=ids,
        denoise=True,
        device=y.device,
    )
    return Restored(run.x.cpu(), run.nfe, run.network_passes, 0.0)


def _by_particles(part: _Part) -> Restored:
    score_fn, sde, measurement, y, shape, ids, settings = part
    count = settings.particles
    run = smc_sample(
        score_fn,
        sde,
        measurement,
        y,
        shape=shape,
        steps=settings.steps,
        grid=settings.grid,
        particles=count,
        data_std=settings.data_std,
        below=math.inf if settings.below is None else settings.below,
        seed=settings.seed,
        sample_ids=ids,
        device=y.device,
    )
    ess = float(run.ess.amin(0).mean())
    return Restored(run.x.cpu(), count * run.nfe, count * run.network_passes, 0.0, ess)
