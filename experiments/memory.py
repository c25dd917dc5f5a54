"""The most memory that a piece of work needs."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """``bytes``: beyond what was in use before; None where the system does not say."""

    bytes: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the block's peak of device memory, or, on a CPU, of the process's resident memory.

    Linux counts the latter from a mark that a process may set (``/proc/self/clear_refs``, see
    proc(5)); elsewhere nothing is reported. What earlier work freed and the allocator kept would
    hide what the block needs, and is given back first, where the C library can (malloc_trim(3)).
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    _trim()
    try:
        _CLEAR.write_text("5")
        start = _resident("VmRSS")
    except OSError:
        yield peak
        return
    yield peak
    peak.bytes = max(0, _resident("VmHWM") - start)


def _trim() -> None:
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return  # another C library


def _resident(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {name}")
