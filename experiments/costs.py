"""Seconds per sample at the best batch size, measured: what a sampler costs when it is used.

One batch size is not fair to all: small batches leave a machine idle, large ones do not fit. Batch
sizes are doubled until the throughput stops rising or memory is short; each is warmed up first, and
the clock is read when the device is done (`Machine.draw`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from experiments.cells import Task, digest
from experiments.draw import Drawn, Machine
from experiments.records import OK
from experiments.results import environment, naming, write_whole
from experiments.work import draw_task

COSTS = "costs"
COSTS_VERSION = 1
FIRST, MOST = 16, 1 << 16
_RISE = 1.05  # less is no rise: timings of one batch size differ by as much
_FLAT = 2  # doublings in a row without a rise, since one may be chance
_LONGEST = 20.0  # seconds that a batch size may take to measure
# Draws of which the fastest counts, since what else the machine does only adds: this many, and
# more where they are short, up to so many seconds or so many draws.
_LEAST, _ENOUGH, _MANY = 2, 0.2, 20

DrawBatch = Callable[[int, Tensor], Drawn]  # batch size, ids -> samples


@dataclass(frozen=True)
class Rung:
    """One batch size.

    Attributes:
        batch_size: samples in a chunk; every worker has one.
        samples: drawn at once.
        seconds: for all of them.
    """

    batch_size: int
    samples: int
    seconds: float

    @property
    def per_sample(self) -> float:
        """Seconds."""
        return self.seconds / self.samples


@dataclass(frozen=True)
class Ladder:
    """Batch sizes measured, and why there are no more: "flat", "memory", "time" or "largest"."""

    rungs: tuple[Rung, ...]
    stopped: str

    @property
    def best(self) -> Rung:
        """The fastest per sample."""
        return min(self.rungs, key=lambda rung: rung.per_sample)


def climb(draw: DrawBatch, workers: int = 1, *, first: int = FIRST, most: int = MOST) -> Ladder:
    """Measure batch sizes ``first``, ``2 first``, ... until the throughput no longer rises.

    Args:
        draw: draws these samples in batches of this size; where memory does not suffice it draws
            smaller ones, and says so (`Drawn.batch_size`).
        workers: batches at a time.
    """
    rungs: list[Rung] = []
    size, flat = first, 0
    while True:
        rung = measure(draw, size, workers)
        if rung.batch_size < size:  # the first may be too large: then what fits is all there is
            return Ladder(tuple(rungs) or (rung,), "memory")
        best = min((r.per_sample for r in rungs), default=float("inf"))
        flat = 0 if rung.per_sample * _RISE < best else flat + 1
        rungs.append(rung)
        if flat == _FLAT:
            return Ladder(tuple(rungs), "flat")
        if size * 2 > most:
            return Ladder(tuple(rungs), "largest")
        if rung.seconds * 2 * (1 + _LEAST) > _LONGEST:
            return Ladder(tuple(rungs), "time")
        size *= 2


def measure(draw: DrawBatch, size: int, workers: int) -> Rung:
    """One batch size after warm-up, or the smaller one that memory allows."""
    ids = torch.arange(size * workers)
    size = min(size, draw(size, ids).batch_size)
    seconds: list[float] = []
    while len(seconds) < _LEAST or (sum(seconds) < _ENOUGH and len(seconds) < _MANY):
        seconds.append(draw(size, ids[: size * workers]).seconds)
    return Rung(size, size * workers, min(seconds))


class Costs:
    """Throughputs of samplers on this machine, kept in a run folder.

    Args:
        folder: the run folder.
        device, workers: where is sampled, and how many batches at a time.
        force: measure again what the folder holds.
    """

    def __init__(self, folder: Path, device: str, workers: int, *, force: bool = False) -> None:
        self._folder = folder / COSTS
        self._device = torch.device(device)
        self._workers = workers
        self._force = force
        where = environment(device)
        self._where = [where["cpu"], where["device_name"], where["versions"]["torch"], workers]
        self._ladders: dict[Any, dict[str, Any]] = {}

    def of(self, task: Task) -> dict[str, Any]:
        """What a sample of this cell's sampler costs: ``seconds_per_sample`` at ``batch_size``.

        The ladder is climbed at the first number of evaluations that is asked for; at others its
        best batch size is measured. A sampler that fails has an ``error`` instead.
        """
        file = self._folder / f"{digest([COSTS_VERSION, task.key, self._where])[:20]}.json"
        found = None if self._force else _read(file)
        if found is None:
            try:
                found = self._measured(task)
            except Exception as error:  # a sampler's, whatever it is; its row has its figures
                return {"error": f"{type(error).__name__}: {error}"}
            with naming(file):
                self._folder.mkdir(exist_ok=True)
                write_whole(file, json.dumps(found) + "\n")
        self._ladders.setdefault(_sampler(task), found)
        return found

    def _measured(self, task: Task) -> dict[str, Any]:
        def draw(size: int, ids: Tensor) -> Drawn:
            return draw_task(task, Machine(self._device, size, self._workers), ids)

        known = self._ladders.get(_sampler(task))
        if known is None:
            ladder = climb(draw, self._workers)
            best, stopped, tried = ladder.best, ladder.stopped, [asdict(r) for r in ladder.rungs]
        else:
            best = measure(draw, known["batch_size"], self._workers)
            stopped, tried = known["stopped"], [asdict(best)]
        return {
            "seconds_per_sample": best.per_sample,
            "batch_size": best.batch_size,
            "workers": self._workers,
            "stopped": stopped,
            "tried": tried,
        }


def _sampler(task: Task) -> Any:
    return task.subject, task.sde, task.condition, task.solver


def _read(file: Path) -> dict[str, Any] | None:
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return values if "seconds_per_sample" in values else None
    except (OSError, ValueError):
        return None


def throughput_table(rows: Sequence[Mapping[str, Any]]) -> Table | None:
    """Milliseconds per sample, sampler by sampler; None where no row has been measured."""
    measured = [r for r in rows if r["status"] == OK and "batch_size" in r.get("throughput", {})]
    if not measured:
        return None
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, title_justify="left")
    table.title = "milliseconds per sample at the best batch size"
    for name in ("target", "SDE", "sampler", "evaluations", "ms", "batch"):
        table.add_column(
            name, justify="right" if name in ("evaluations", "ms", "batch") else "left"
        )
    for row in measured:
        found = row["throughput"]
        cost = f"{1000 * found['seconds_per_sample']:.3g}"
        batch = f"{found['workers']} × {found['batch_size']}"
        where = (row["target"], row["sde"], row["solver_label"], f"{row['nfe']:.4g}")
        table.add_row(*map(str, where), cost, batch)
    return table
