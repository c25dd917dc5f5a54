"""A large set of samples, by one process or several, each of which draws some of the shards.

Sample ``i`` is a function of the settings and ``i``, so that it does not matter which process draws
it, or when. A shard that is finished is not drawn again. The processes are those that torchrun or a
cluster's launcher started, or anybody who sets RANK and WORLD_SIZE: they never speak to each other.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from experiments.cells import digest, source_digest
from experiments.compare import Interrupted, Progress
from experiments.draw import one_thread_each
from experiments.folders import prepare_out
from experiments.generate import (
    SampleOptions,
    SamplePlan,
    describe,
    draw_ids,
    draw_picture,
    make_plan,
    raw_values,
)
from experiments.results import WriteError
from experiments.shards import FORMATS, MANIFEST, UNFINISHED, Shard, ShardFolder, layout
from sde_diffusion.errors import require_count, unknown_name
from solvers.catalogue import name_of, settings_of

LARGE = 10_000
"""More samples than this are written as shards."""
SHARD = 1000
PICTURE = "samples.png"
SHARDS_VERSION = 1
"""Counted up when a change of this program changes what a sample is."""


@dataclass(frozen=True)
class Process:
    """One of several processes: rank ``rank`` of ``world``, ``local`` on its machine."""

    rank: int = 0
    world: int = 1
    local: int = 0


@dataclass
class WrittenShards:
    """What this process did.

    Attributes:
        drawn, found: shards that it drew, and that were there.
        finished: whether the whole set is.
        seconds: of sampling.
    """

    folder: Path
    drawn: int
    found: int
    finished: bool
    seconds: float


def launched() -> Process:
    """Which process this is, as its launcher says (RANK, WORLD_SIZE, LOCAL_RANK).

    Raises:
        ValueError: they are not numbers, or do not fit.
    """
    given = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    try:
        rank, world = int(given["RANK"] or 0), int(given["WORLD_SIZE"] or 1)
        process = Process(rank, world, int(given["LOCAL_RANK"] or rank))
    except ValueError:
        process = Process(-1)
    if not 0 <= process.rank < process.world:
        raise ValueError(
            f"RANK={given['RANK']} and WORLD_SIZE={given['WORLD_SIZE']} of the environment do not "
            "fit: RANK is a number from 0 to WORLD_SIZE - 1; unset both for a single process"
        )
    return process


def is_sharded(options: SampleOptions, process: Process) -> bool:
    """Whether a set is written as shards: a large one, by several processes, or as asked for."""
    asked = options.shard_size is not None or options.array_format is not None
    return asked or process.world > 1 or options.count > LARGE


def make_shard_plan(options: SampleOptions, process: Process) -> SamplePlan:
    """Check everything.

    Raises:
        ValueError, TypeError: whatever is wrong with the options, before any work.
    """
    size = SHARD if options.shard_size is None else options.shard_size
    require_count("--shard-size", size)
    kind = options.array_format or FORMATS[0]
    if kind not in FORMATS:
        raise unknown_name("--format", kind, FORMATS)
    if options.trajectory:
        raise ValueError(
            f"--trajectory is kept of small sets only (up to {LARGE} samples, one process, "
            "neither --shard-size nor --format); leave it out"
        )
    device = options.device
    if process.world > 1 and device == "cuda":
        device = f"cuda:{process.local}"
    return make_plan(replace(options, shard_size=size, array_format=kind, device=device))


def run_shards(plan: SamplePlan, process: Process, progress: Progress) -> WrittenShards:
    """Draw this process's shards that are missing.

    Raises:
        ValueError: the folder holds another set.
        WriteError: a full disk; finished shards stay.
        Interrupted: Ctrl-C; the same.
    """
    options = plan.options
    size, kind = options.shard_size or SHARD, options.array_format or FORMATS[0]
    folder = ShardFolder(Path(plan.out).expanduser(), key_of(plan), size, kind)
    before = folder.check(options.count)
    path = prepare_out(plan.out, MANIFEST)
    shards = layout(options.count, size)
    described = _described(plan)
    own = shards[process.rank :: process.world]
    missing = [shard for shard in own if folder.finished(shard) is None]
    found = len(own) - len(missing)
    seconds = 0.0
    progress.start(sum(shard.samples for shard in missing))
    plan.subject.to(plan.machine.device)
    try:
        if before is None or before["samples"] < options.count or missing:
            folder.write_manifest(described | {"status": UNFINISHED}, shards)
        with one_thread_each():
            for shard in missing:
                progress.now(f"{plan.subject.name} · samples {shard.first} to {shard.ids[-1]}")
                seconds += _draw(plan, folder, shard, path)
                progress.done(shard.samples)
    except WriteError as error:
        raise WriteError(
            f"{error}; {_kept(folder, shards)}: make room there, and the same command goes on"
        ) from error
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; {_kept(folder, shards)}; the same command goes on from there"
        ) from None
    # The last process sees all shards, and one that saw too few writes nothing over its word.
    finished = all(folder.entry(shard) is not None for shard in shards)
    if finished:
        folder.write_manifest(described, shards)
    return WrittenShards(path, len(missing), found, finished, seconds)


def key_of(plan: SamplePlan) -> str:
    """Hash of all that determines sample ``i``; not how many there are, or in what files."""
    identity = plan.subject.identity(plan.sde)
    what = {
        "version": SHARDS_VERSION,
        # Data and judge tell how good samples are, and not what they are.
        "subject": {k: v for k, v in identity.items() if k not in ("judge", "data")},
        "condition": asdict(plan.condition),
        "solver": name_of(type(plan.solver)),
        "settings": settings_of(plan.solver),
        "source": source_digest(type(plan.solver)),
        "steps": plan.steps,
        "grid": plan.options.grid,
        "denoise": plan.options.denoise,
        "seed": plan.options.seed,
        "device": torch.device(plan.options.device).type,
    }
    return digest(what)[:20]


def _draw(plan: SamplePlan, folder: ShardFolder, shard: Shard, path: Path) -> float:
    drawn = draw_ids(plan, shard.ids)
    labels = plan.condition.labels(shard.ids, plan.subject.num_classes)
    costs = {
        "nfe": drawn.nfe,
        "network_passes": drawn.network_passes,
        "seconds": drawn.seconds,
        "batch_size": drawn.batch_size,
    }
    folder.put(shard, raw_values(plan.subject, drawn.x), labels, costs)
    if shard.index == 0:
        draw_picture(plan, path / PICTURE, drawn.x)
    return drawn.seconds


def _described(plan: SamplePlan) -> dict[str, Any]:
    own = ("format", "version", "samples")
    return {key: value for key, value in describe(plan).items() if key not in own}


def _kept(folder: ShardFolder, shards: list[Shard]) -> str:
    count = sum(folder.entry(shard) is not None for shard in shards)
    return f"{count} of {len(shards)} shards are finished and stay in {folder.path}"
