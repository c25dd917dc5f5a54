"""Interleaved timing: every contender runs in turn, so that a drifting machine moves all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each run in each repeat, by a clock, after one warm-up of each."""
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return seconds


def median_ratio(seconds: Mapping[str, list[float]], name: str, floor: str) -> float:
    """Median over the repeats of one run's time over another's in the same repeat."""
    pairs = zip(seconds[name], seconds[floor], strict=True)
    return statistics.median(a / b for a, b in pairs)
