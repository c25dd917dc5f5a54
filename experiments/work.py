"""Computing one cell, wherever it runs: in this process, in another, on another machine."""

from __future__ import annotations

import functools
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.cells import Task
from experiments.draw import Drawn, Machine, make_machine
from experiments.guidance_judging import make_guidance_judge
from experiments.judging import Cell, Judge, block_ids, make_judge
from experiments.memory import peak_memory
from experiments.metrics import paired_distances
from experiments.records import FAILED, TIMEOUT, Record
from experiments.spec import spec_of
from experiments.subjects import Subject, SubjectOptions, make_subjects
from solvers import ProbabilityFlow
from solvers.catalogue import name_of, settings_of

KEPT = 600  # samples of a cell that are kept for pictures
Given = Mapping[str, Tensor]  # tensors stored beside the record that a cell is compared with


class Done(NamedTuple):
    """A record, and tensors that are stored beside it."""

    record: Record
    tensors: dict[str, Tensor]


class CellTimeoutError(TimeoutError):
    """A cell took longer than --cell-timeout."""


def perform(task: Task, given: Given | None = None, workers: int = 1) -> Done:
    """Compute a cell; what goes wrong in its sampler stands in its record.

    Args:
        given: what it is compared with, where its kind of task needs anything.
        workers: chunks of samples at a time.
    """
    try:
        with time_limit(task.seconds):
            return compute(task, given, workers)
    except CellTimeoutError as error:
        return Done(record_of(task, status=TIMEOUT, error=str(error)), {})
    except Exception as error:  # the sampler's, whatever it is: its cell says so, the rest go on
        text = f"{type(error).__name__}: {error}"
        return Done(record_of(task, status=FAILED, error=text), {})


def record_of(task: Task, **values: Any) -> Record:
    """The record of a task with what is known of it so far."""
    condition = task.condition
    known: dict[str, Any] = {
        "key": task.key,
        "kind": task.kind,
        "target": task.subject,
        "sde": task.sde,
        "solver": name_of(type(task.solver)),
        "spec": spec_of(task.solver),
        "settings": settings_of(task.solver),
        "guidance": condition.guidance,
        "scale": condition.scale,
        "label": condition.label,
        "interval_low": None if condition.interval is None else condition.interval[0],
        "interval_high": None if condition.interval is None else condition.interval[1],
        "budget": task.budget,
        "steps": task.steps,
        "grid": task.grid,
        "denoise": task.denoise,
        "seed": task.seed,
        "repeat": task.repeat,
        "samples": task.samples,
        "device": task.device,
    }
    return Record(**(known | values))


def subject_of(task: Task) -> Subject:
    """The subject of a task, on its device."""
    return _subjects(task.subjects, task.device)[task.subject]


def judge_of(task: Task, workers: int = 1) -> Judge:
    """The judge of a task's repeats."""
    made = _judge if task.judging == "distance" else _guidance_judge
    return made(task.subjects, task.subject, task.samples, task.seed, task.device, workers)


@functools.lru_cache(maxsize=8)
def _subjects(options: SubjectOptions, device: str) -> dict[str, Subject]:
    subjects = {subject.name: subject for subject in make_subjects(options)}
    for subject in subjects.values():
        subject.to(torch.device(device))
    return subjects


@functools.lru_cache(maxsize=64)
def _judge(
    options: SubjectOptions, name: str, samples: int, seed: int, device: str, workers: int
) -> Judge:
    machine = Machine(torch.device(device), None, workers)
    return make_judge(_subjects(options, device)[name], samples, seed, machine)


@functools.lru_cache(maxsize=64)
def _guidance_judge(
    options: SubjectOptions, name: str, samples: int, seed: int, device: str, workers: int
) -> Judge:
    machine = Machine(torch.device(device), None, workers)
    return make_guidance_judge(_subjects(options, device)[name], samples, seed, machine)


@functools.singledispatch
def compute(task: Task, given: Given | None, workers: int) -> Done:
    """Compute a task; a module that has tasks of another class registers how they are computed.

    Args:
        given: for solvers without noise of their own the finely solved ODE from the noise of the
            repeat, ``x``.
    """
    began = time.perf_counter()
    judge = judge_of(task, workers)
    made = time.perf_counter() - began  # the judge, for the first of its cells
    cell = Cell(task.sde, task.condition, task.solver)
    named = {"primary": judge.primary, "truth": judge.truth(cell)}
    if task.kind == "floor":
        floor = judge.floor(cell, task.repeat)
        judging = time.perf_counter() - began
        return Done(record_of(task, metrics=floor, judging_seconds=judging, **named), {})
    machine = Machine(make_machine(task.device, None).device, task.batch_size, workers)
    ids = block_ids(task.samples, task.repeat)
    if task.kind == "fine":
        drawn = _drawn(task, machine, ids[: judge.paired], judge.fine_solver, judge.fine_steps)
        fine_record = record_of(task, **costs_of(drawn), judging_seconds=made, **named)
        return Done(fine_record, {"x": drawn.x})
    _warm_up(task, machine, ids)
    with peak_memory(machine.device) as memory:
        drawn = _drawn(task, machine, ids, task.solver, task.steps)
    started = time.perf_counter()
    metrics = judge.metrics(cell, drawn.x, task.repeat)
    tensors = {"x": drawn.x[:KEPT].clone()}
    if given is not None:
        distances = paired_distances(drawn.x[: len(given["x"])], given["x"])
        metrics |= judge.paired_metrics(distances)
        tensors["distance"] = distances
    record = record_of(
        task,
        **costs_of(drawn),
        **named,
        metrics=metrics,
        peak_bytes=memory.bytes,
        judging_seconds=made + time.perf_counter() - started,
    )
    return Done(record, tensors)


def _drawn(
    task: Task, machine: Machine, ids: Tensor, solver: Any, steps: int | None, denoise: bool = False
) -> Drawn:
    subject = subject_of(task)
    return machine.draw(
        subject.score_of(task.sde, task.condition),
        subject.sdes[task.sde],
        solver,
        event_shape=subject.event_shape,
        ids=ids,
        steps=steps,
        seed=task.seed,
        grid=None if steps is None else task.grid,
        denoise=task.denoise or denoise,
        suggested=subject.suggested,
    )


def draw_task(task: Task, machine: Machine, ids: Tensor) -> Drawn:
    """Samples of a cell's sampler, with any ids, not judged."""
    return _drawn(task, machine, ids, task.solver, task.steps)


def costs_of(drawn: Drawn) -> dict[str, Any]:
    """What a record says of the drawing."""
    return {
        "nfe": drawn.nfe,
        "network_passes": drawn.network_passes,
        "seconds": drawn.seconds,
        "batch_size": drawn.batch_size,
    }


_warm: set[tuple[Any, ...]] = set()


def is_first(task: Task) -> bool:
    """Whether this process has drawn nothing of the kind yet."""
    key = (task.subjects, task.subject, task.sde, task.condition, task.device, task.samples)
    first = key not in _warm
    _warm.add(key)
    return first


def _warm_up(task: Task, machine: Machine, ids: Tensor) -> None:
    """Two steps that are not timed: first calls of a network are slow."""
    if is_first(task):
        few = ids[: 2 * subject_of(task).suggested]
        _drawn(task, machine, few, ProbabilityFlow("euler"), 2)


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Interrupt what takes longer, where the system and the thread allow it."""
    if (
        seconds is None
        or not hasattr(signal, "setitimer")
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return

    def ring(signum: int, frame: Any) -> None:
        raise CellTimeoutError(f"took longer than --cell-timeout {seconds:g} s")

    previous = signal.signal(signal.SIGALRM, ring)
    # Again and again: what is raised in a destructor, or caught by the sampler, is lost.
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
