"""Tasks computed once and kept, whatever kind of run they are of.

What a run folder holds is not computed again; what is computed is on disk as soon as it is
finished, so that a run goes on where it was stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from experiments.cells import Task
from experiments.draw import one_thread_each
from experiments.pool import Pool, Work
from experiments.records import Record
from experiments.results import RunFolder, WriteError
from experiments.store import CellStore
from experiments.timing import Timing
from experiments.work import Done, Given

_IN_TENSORS = ("fine", "by_time", "amplified")  # kinds whose record says nothing without them


class Progress(Protocol):
    """Where a run tells how far it is."""

    def start(self, total: float) -> None: ...
    def now(self, what: str) -> None: ...
    def done(self, amount: float) -> None: ...


class Interrupted(KeyboardInterrupt):
    """Ctrl-C; the message says where and what is kept."""


class Table(Protocol):
    """The rows of a run, as they become whole."""

    def write(self) -> None:
        """Write those that are whole."""

    def records(self) -> list[Record]:
        """The records of those that are whole."""


@dataclass
class Computer:
    """Computes the tasks that a folder does not hold.

    Attributes:
        force: compute those it holds again.
        timing: what is computed now is added to it.
        where: what this process is at, in words.
    """

    store: CellStore
    pool: Pool
    progress: Progress
    force: bool = False
    timing: Timing = field(default_factory=Timing)
    where: str = ""

    def run(
        self, tasks: Sequence[Task], given_of: Callable[[Task], Given | None] = lambda task: None
    ) -> Iterator[tuple[Task, Done]]:
        """Each task as it is finished, those that the folder holds first.

        Args:
            given_of: what a task is compared with.
        """
        missing: list[Work] = []
        for task in tasks:
            if self.force:
                self.store.forget(task.key)
            record = self.store.get(task.key)
            lost = task.kind in _IN_TENSORS and self.store.tensors(task.key) is None
            if record is None or lost:
                missing.append((task, given_of(task)))
            else:
                yield task, Done(record, {})
        for task, done in self.pool.run(missing, self._began):
            self.timing.add(done.record)
            self.store.put(*done)
            yield task, done

    def _began(self, task: Task) -> None:
        self.where = f" at {task}"
        self.progress.now(str(task))

    @contextmanager
    def keeping(self, folder: RunFolder, rows: Table, total: int) -> Iterator[None]:
        """What is finished is written, whatever ends the run.

        Args:
            total: rows of a finished run.

        Raises:
            Interrupted: Ctrl-C.
            WriteError: a full disk; the finished cells are kept.
        """
        try:
            with folder, one_thread_each():
                folder.write()
                yield
        except WriteError as error:
            raise WriteError(
                f"{error}; {len(rows.records())} cells are finished, and stored in {folder.path}: "
                "make room there, and the same command goes on"
            ) from error
        except KeyboardInterrupt:
            rows.write()
            raise Interrupted(
                f"interrupted{self.where}; {len(folder.rows)} of {total} rows are finished "
                f"and kept in {folder.path}; the same command goes on from there"
            ) from None
