"""Many cells at a time: in this process, on this machine's processes, or on a Dask cluster.

Cells are independent and are known by their key, so that it does not matter which process computes
one, or whether two do.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from experiments.cells import Task
from experiments.records import FAILED, TIMEOUT
from experiments.work import Done, Given, perform, record_of
from experiments.worker_start import end_with_parent

Work = tuple[Task, Given | None]
_GRACE = 20.0  # seconds beyond a cell's own limit before its process is ended
_ATTEMPTS = 2  # by itself, of a cell whose process died: memory may have been short for a moment


@dataclass(frozen=True)
class Pool:
    """Where cells are computed.

    Attributes:
        jobs: processes; 1: this one, with ``workers`` chunks of samples at a time.
        workers: threads of this process.
        scheduler: address of a Dask scheduler, ``tcp://...``; None: this machine.
    """

    jobs: int = 1
    workers: int = 1
    scheduler: str | None = None

    def run(
        self, work: Sequence[Work], began: Callable[[Task], None]
    ) -> Iterator[tuple[Task, Done]]:
        """Each cell as it is finished, in no certain order.

        Args:
            began: told of a cell that this process is at.
        """
        if self.scheduler is not None:
            return _on_cluster(self.scheduler, work)
        if self.jobs > 1 and len(work) > 1:
            return _in_processes(min(self.jobs, len(work)), work)
        return self._here(work, began)

    def _here(
        self, work: Sequence[Work], began: Callable[[Task], None]
    ) -> Iterator[tuple[Task, Done]]:
        for task, given in work:
            began(task)
            yield task, perform(task, given, self.workers)


def _alone(index: int, task: Task, given: Given | None, marks: str | None) -> tuple[int, Done]:
    """One cell in a process of its own, on one thread."""
    torch.set_num_threads(1)
    if marks is not None:  # on this machine
        end_with_parent()
        (Path(marks) / str(index)).touch()
    return index, perform(task, given)


def _in_processes(jobs: int, work: Sequence[Work]) -> Iterator[tuple[Task, Done]]:
    """Processes of joblib's; one that dies or hangs costs only the cell it was at.

    When a process dies or hears no signal, all processes are ended, and nobody knows which cell was
    at fault: those that were under way are computed again one at a time.
    """
    left = dict(enumerate(work))
    while left:
        lost = yield from _together(jobs, left)
        for index in lost.under_way:
            task, given = left.pop(index)
            yield from _by_itself(task, given)


def _by_itself(task: Task, given: Given | None) -> Iterator[tuple[Task, Done]]:
    for _ in range(_ATTEMPTS):
        alone = {0: (task, given)}
        lost = yield from _together(2, alone)  # joblib's pool of one would be this process
        if not alone:
            return
        if lost.hung:
            break
    yield task, _lost(task, lost.hung)


class _Lost(NamedTuple):
    """What a pool that broke was at."""

    under_way: list[int]
    hung: bool


def _together(jobs: int, left: dict[int, Work]) -> Generator[tuple[Task, Done], None, _Lost]:
    """Compute what is left, taking away what is finished, until all is, or the pool breaks."""
    from joblib import Parallel, delayed
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    limit = max((task.seconds for task, _ in left.values() if task.seconds), default=None)
    with tempfile.TemporaryDirectory(prefix="sde-diffusion-") as marks:
        parallel = Parallel(
            n_jobs=jobs,
            return_as="generator_unordered",
            batch_size=1,
            timeout=None if limit is None else limit + _GRACE,
        )
        calls = (delayed(_alone)(index, *left[index], marks) for index in list(left))
        try:
            for index, done in parallel(calls):
                task, _ = left.pop(index)
                yield task, done
        except (TerminatedWorkerError, multiprocessing.TimeoutError, TimeoutError) as error:
            under_way = [index for index in left if (Path(marks) / str(index)).exists()]
            return _Lost(under_way, not isinstance(error, TerminatedWorkerError))
    return _Lost([], False)


def _lost(task: Task, hung: bool) -> Done:
    if hung:
        error = f"did not stop within --cell-timeout {task.seconds:g} s; its process was ended"
        return Done(record_of(task, status=TIMEOUT, error=error), {})
    error = "its process died (out of memory, or a crash in compiled code)"
    return Done(record_of(task, status=FAILED, error=error), {})


def _on_cluster(address: str, work: Sequence[Work]) -> Iterator[tuple[Task, Done]]:
    """Workers of a Dask cluster; what a dead one was at goes to another."""
    client = connect(address)
    from distributed import as_completed

    try:
        futures = {
            client.submit(
                _alone, index, task, given, None, key=f"{task.key}-{time.time_ns()}", pure=False
            ): task
            for index, (task, given) in enumerate(work)
        }
        for future in as_completed(futures):
            task = futures[future]
            if future.status == "finished":
                yield task, future.result()[1]
            else:
                error = f"{type(future.exception()).__name__}: {future.exception()}"
                yield task, Done(record_of(task, status=FAILED, error=error), {})
    finally:
        client.close()


def connect(address: str) -> Any:
    """A client of a Dask scheduler.

    Raises:
        ImportError: dask.distributed is not installed.
        ValueError: nothing answers there.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise ImportError(
            "--scheduler needs dask.distributed; install it with: "
            'python -m pip install "sde-diffusion[cluster]"'
        ) from error
    try:
        return Client(address, timeout="10s")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--scheduler {address!r} does not answer ({error}); start one with: dask scheduler"
        ) from None
