"""A progress bar for a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[int, int], object]


@contextmanager
def reporting(progress: bool | Report, total: int) -> Iterator[Report | None]:
    """``None``, the caller's own ``(done, total)`` callback, or one that moves a bar."""
    if progress is False:
        yield None
    elif progress is not True:
        yield progress
    else:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        with Progress("sampling", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
            task = bar.add_task("sampling", total=total)
            yield lambda done, total: bar.update(task, completed=done, total=total)
