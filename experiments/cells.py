"""Cells: the units that a comparison is computed, stored and repeated in.

A cell is one sampler on one target at one number of evaluations, one repeat of it. Its key is a
hash of all that determines its figures: target or model files, SDE, solver with its settings and
source, grid, guidance, seed, repeat and size. Not the batch size, the processes, or the folder:
nothing depends on those.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from dataclasses import dataclass
from typing import Any, Literal

from experiments.conditions import Condition
from experiments.results import plain
from experiments.spec import spec_of
from experiments.subjects import Subject, SubjectOptions
from solvers import Integrator, Solver
from solvers.catalogue import name_of, settings_of

CELLS_VERSION = 1
"""Counted up when a change of this program changes what a cell's figures are."""

Kind = Literal["cell", "fine", "floor", "by_time", "amplified"]
Judging = Literal["distance", "guidance"]
_WORDS = {
    "fine": "the fine solution",
    "floor": "the floor",
    "by_time": "the network's error by time",
}


@dataclass(frozen=True)
class Task:
    """What a process needs to know to compute a cell, or what cells are compared with.

    Attributes:
        kind: "cell"; "fine": the finely solved equation from the noise of a repeat; "floor": what
            true samples score against true samples; of error budgets also "by_time": a network's
            error, and "amplified": what a solver makes of it.
        key: by which the result is stored.
        subjects: from which the subject named ``subject`` is made.
        budget, steps: None where the solver has its own.
        samples: in the repeat.
        seconds: a cell that takes longer has failed; None: no limit.
        judging: "distance": from the law that is sampled; "guidance": from the classes asked for.
    """

    kind: Kind
    key: str
    subjects: SubjectOptions
    subject: str
    sde: str
    condition: Condition
    solver: Solver | Integrator
    budget: int | None
    steps: int | None
    grid: str | None
    denoise: bool
    seed: int
    repeat: int
    samples: int
    device: str
    batch_size: int | None
    seconds: float | None = None
    judging: Judging = "distance"

    def __str__(self) -> str:
        condition = f" · {self.condition}" if str(self.condition) else ""
        count = "own steps" if self.budget is None else f"{self.budget} evaluations"
        how = _WORDS.get(self.kind) or f"{spec_of(self.solver)} · {count}"
        if self.kind == "amplified":
            how += " · what it makes of the network's error"
        return f"{self.subject} · {self.sde}{condition} · {how}"


def cell_key(
    kind: Kind,
    subject: Subject,
    sde: str,
    condition: Condition,
    solver: Solver | Integrator,
    **numbers: Any,
) -> str:
    """The key of a cell: 20 hexadecimal digits.

    Args:
        numbers: what else determines it: budget, steps, grid, denoise, seed, repeat, samples, and
            the type of device.
    """
    identity = {
        "version": CELLS_VERSION,
        "kind": kind,
        "subject": subject.identity(sde),
        "condition": condition.identity(),
        "solver": name_of(type(solver)),
        "settings": settings_of(solver),
        "source": source_digest(type(solver)),
        **numbers,
    }
    return digest(identity)[:20]


def digest(value: Any) -> str:
    """SHA-256 of JSON-like values, keys in order."""
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()


@functools.cache
def source_digest(kind: type) -> str:
    """Of the file a solver is written in: an edited solver is another one."""
    try:
        text = inspect.getsource(inspect.getmodule(kind) or kind)
    except (OSError, TypeError):  # typed at a prompt, or compiled
        return f"{kind.__module__}.{kind.__qualname__}"
    return hashlib.sha256(text.encode()).hexdigest()
