"""Where the time of a run goes: to sampling, to judging samples, to everything else."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from experiments.records import Record


@dataclass
class Timing:
    """What a comparison spends, as far as it was computed now and not found in its folder.

    Attributes:
        processes: at work side by side; None: not known (a cluster).
        sampling: seconds of drawing samples and fine solutions, summed over processes.
        judging: seconds of references, metrics and floors, summed over processes.
        started: `time.monotonic` at the beginning.
    """

    processes: int | None = 1
    sampling: float = 0.0
    judging: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def add(self, record: Record) -> None:
        """A cell that was computed now."""
        self.sampling += record.seconds or 0.0
        self.judging += record.judging_seconds or 0.0

    def as_dict(self) -> dict[str, Any]:
        """Up to now. ``overhead_share`` is the part of the processes' time that is neither sampling
        nor judging; None where nothing was computed, or the processes are not known."""
        total = time.monotonic() - self.started
        worked = self.sampling + self.judging
        share = None
        if worked and self.processes is not None:
            share = max(0.0, 1.0 - worked / (total * self.processes))
        return {
            "total": total,
            "sampling": self.sampling,
            "judging": self.judging,
            "processes": self.processes,
            "overhead_share": share,
        }
