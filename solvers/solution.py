"""What a run returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Solution:
    """Samples and what they cost.

    Attributes:
        x: the samples, ``(B, *event)``, at ``times[-1]`` (or denoised from there).
        nfe: score function evaluations per sample, counted at the call: rejected steps, correctors
            and the final denoise included. Where samples differ, their mean.
        network_passes: network passes per sample: an evaluation of classifier-free guidance takes
        two.
        times: the grid, decreasing, float64 on the CPU.
        trajectory: states ``(n, B, *event)`` at ``trajectory_times``, first and last included;
            ``None`` unless asked for.
        trajectory_times: ``(n,)``.
        nfe_per_sample: ``(B,)`` where samples differ, else ``None``.
        reached: ``(B,)`` bool: whether each sample arrived, of a plan that marks those that did
            not; else ``None``.
        stats: ``seconds`` (wall time of the loop), ``accepted`` and ``rejected`` steps.
    """

    x: Tensor
    nfe: int | float
    network_passes: int | float
    times: Tensor
    trajectory: Tensor | None = None
    trajectory_times: Tensor | None = None
    nfe_per_sample: Tensor | None = None
    reached: Tensor | None = None
    stats: dict[str, Any] = field(default_factory=dict)
