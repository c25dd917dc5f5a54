"""Processes for cells that are ready as soon as there are cells.

Loading torch takes longer than anything else a command does before it samples. A process that has
loaded it, and from which others are forked, is started before this one loads it too, so that both
load it at the same time, and the workers not at all.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from multiprocessing import forkserver
from typing import Any

_LOADED = ["experiments.work"]
_WATCH = "ends with its parent"  # a thread's name


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def prepare_workers(jobs: int | None, scheduler: str | None, device: str) -> None:
    """Begin to load what cells need, where cells will be computed in processes of this machine.

    For commands, whose main module runs nothing when it is imported; a script that calls the
    functions behind them need not care, and gets joblib's own way of starting processes.

    Args:
        jobs: processes as they were asked for; None: as many as there are cores.
        scheduler: of a cluster; then its workers are at work, not this machine's.
        device: where cells are computed; one process is at work on any other than the CPU.
    """
    if jobs is None:
        jobs = usable_cores() if device == "cpu" else 1
    if sys.platform != "linux" or scheduler is not None or jobs < 2:
        return  # elsewhere a process that has loaded torch is not safely forked
    multiprocessing.set_forkserver_preload(_LOADED)
    forkserver.ensure_running()
    from joblib.externals.loky.backend.context import set_start_method

    set_start_method("forkserver", force=True)


def end_with_parent() -> None:
    """In a worker: from now on, end when the process that it works for has ended.

    A process that is killed takes nobody with it, and its workers would wait minutes for more to
    do. What a worker is at is lost, and nothing else: it writes nothing.
    """
    parent = multiprocessing.parent_process()
    if parent is None or any(thread.name == _WATCH for thread in threading.enumerate()):
        return
    threading.Thread(target=_follow, args=(parent,), name=_WATCH, daemon=True).start()


def _follow(parent: Any) -> None:
    parent.join()
    os._exit(1)
