"""The cells of an error budget: what one process needs to know, and how it computes each kind.

- ``floor``: what is the same for all solvers under one SDE and condition;
- ``fine``: what is the same for all solvers of one equation, and its fine solution;
- ``cell``: what is a solver's own, one repeat of it;
- ``by_time``: a network's error by time;
- ``amplified``: what a solver makes of that.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.budget_parts import law_parts, reference_parts, solver_parts
from experiments.budget_problem import Problem
from experiments.budget_subject import BudgetSubject, make_budget_subject
from experiments.cells import Task
from experiments.draw import Machine
from experiments.memory import peak_memory
from experiments.network_error import displacements, error_by_time
from experiments.subjects import SubjectOptions
from experiments.work import KEPT, Done, Given, compute, costs_of, is_first, record_of
from sde_diffusion.validation import Bucket
from solvers import ProbabilityFlow, Solver

_BUCKET = [field.name for field in dataclasses.fields(Bucket)]


@dataclass(frozen=True)
class BudgetTask(Task):
    """A task of an error budget.

    Attributes:
        repeats: of the run: real data is dealt out among them.
        buckets: ranges of times, of a network's error.
    """

    repeats: int = 1
    buckets: int = 0


@functools.lru_cache(maxsize=4)
def subject_of(options: SubjectOptions, device: str) -> BudgetSubject:
    """What a run is of, on its device."""
    subject = make_budget_subject(options)
    subject.to(torch.device(device))
    return subject


@compute.register
def _compute(task: BudgetTask, given: Given | None, workers: int) -> Done:
    problem = problem_of(task, workers)
    if task.kind == "by_time":
        return _by_time(task, problem)
    if task.kind == "amplified":
        return _amplified(task, problem, given)
    began = time.perf_counter()
    if task.kind == "floor":
        parts = law_parts(problem, task.repeat)
        return Done(record_of(task, metrics=parts, judging_seconds=_since(began)), {})
    if task.kind == "fine" and task.steps is not None and isinstance(task.solver, Solver):
        parts, tensors = reference_parts(problem, task.solver, task.steps, task.repeat)
        return Done(record_of(task, metrics=parts, judging_seconds=_since(began)), tensors)
    if given is None or task.steps is None:
        raise ValueError(f"{task} needs its fine solution and a number of steps")
    ids = problem.ids(task.repeat)
    if is_first(task):  # not timed: first calls of a network are slow
        problem.solve(ProbabilityFlow("euler"), 2, ids[: 2 * problem.suggested])
    with peak_memory(problem.device) as memory:
        drawn = problem.solve(task.solver, task.steps, ids)
    drawn_at = time.perf_counter()
    parts = solver_parts(problem, drawn.x, given["x"], given.get("true"), task.repeat)
    record = record_of(
        task,
        **costs_of(drawn),
        metrics=parts,
        judging_seconds=_since(drawn_at),
        peak_bytes=memory.bytes,
    )
    return Done(record, {"x": drawn.x[:KEPT].clone()})


def problem_of(task: BudgetTask, workers: int = 1) -> Problem:
    """What a task is measured on.

    Args:
        workers: chunks of samples at a time.
    """
    machine = Machine(torch.device(task.device), task.batch_size, workers)
    return subject_of(task.subjects, task.device).problem(
        task.sde,
        task.condition,
        samples=task.samples,
        repeats=task.repeats,
        seed=task.seed,
        grid=task.grid,
        denoise=task.denoise,
        machine=machine,
    )


def _by_time(task: BudgetTask, problem: Problem) -> Done:
    began = time.perf_counter()
    loss, error = error_by_time(problem, task.buckets)
    tensors = {"loss": _packed(loss), "error": _packed(error)}
    return Done(record_of(task, judging_seconds=_since(began)), tensors)


def _amplified(task: BudgetTask, problem: Problem, given: Given | None) -> Done:
    if given is None or task.steps is None:
        raise ValueError(f"{task} needs the network's error and a number of steps")
    began = time.perf_counter()
    moved, whole = displacements(problem, task.solver, task.steps, unpacked(given["error"]))
    tensors = {"moved": torch.tensor([*moved, whole], dtype=torch.float64)}
    return Done(record_of(task, judging_seconds=_since(began)), tensors)


def _packed(buckets: list[Bucket]) -> Tensor:
    rows = [dataclasses.astuple(bucket) for bucket in buckets]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(_BUCKET))


def unpacked(found: Tensor) -> tuple[Bucket, ...]:
    """The buckets that a task has stored."""
    rows: list[dict[str, Any]] = [dict(zip(_BUCKET, row, strict=True)) for row in found.tolist()]
    return tuple(Bucket(**{**row, "n": int(row["n"])}) for row in rows)


def _since(began: float) -> float:
    return time.perf_counter() - began
