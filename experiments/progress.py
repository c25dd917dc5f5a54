"""A progress bar on stderr, where somebody looks at it."""

from __future__ import annotations

from types import TracebackType

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from experiments.tables import make_console


class ProgressBar:
    """What is being done now, how much is done, and how long the rest will take."""

    def __init__(self, *, shown: bool = True) -> None:
        console = make_console(error=True)
        self._bar = Progress(
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.description}"),
            console=console,
            transient=True,
            disable=not (shown and console.is_terminal),
        )
        self._task = self._bar.add_task("starting", total=None)

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def start(self, total: float) -> None:
        """How much there is to do, in any unit."""
        self._bar.update(self._task, total=total)

    def now(self, what: str) -> None:
        """What is being done."""
        self._bar.update(self._task, description=what)

    def done(self, amount: float) -> None:
        """So much of the total more is done."""
        self._bar.update(self._task, advance=amount)
