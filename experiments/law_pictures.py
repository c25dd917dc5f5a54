"""Laws of error in a picture: line, 95 % band, and where the law holds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from experiments.asymptotics import ErrorLaw
from experiments.canvas import Look

__all__ = ["draw_law", "hollow", "law_text", "shade_region"]


def draw_law(ax: Axes, law: ErrorLaw, look: Look, steps: Sequence[float]) -> None:
    """The line and its band over the region, dashed where it is continued to the other grids.

    Grids outside the region get hollow markers.
    """
    inside = np.geomspace(law.first, law.last, 40)
    low, high = (np.array(ends) for ends in zip(*map(law.band, inside), strict=True))
    ax.fill_between(inside, low, high, color=look.colour, alpha=0.22, linewidth=0, zorder=2)
    ax.plot(inside, [law.error(n) for n in inside], color=look.colour, linewidth=1.4)
    coarser = np.array([min(steps), law.first])
    dashed = [law.error(n) for n in coarser]
    ax.plot(coarser, dashed, color=look.colour, linewidth=0.8, dashes=(3, 2))


def hollow(ax: Axes, law: ErrorLaw, look: Look, x: np.ndarray, y: np.ndarray) -> None:
    """White inside the markers of grids outside the region."""
    outside = (x < law.first) | (x > law.last)
    ax.plot(
        x[outside],
        y[outside],
        linestyle="none",
        marker=look.marker,
        markersize=4.8,
        color=look.colour,
        markerfacecolor="white",
        zorder=4,
    )


def shade_region(ax: Axes, laws: Sequence[ErrorLaw]) -> None:
    """Grey where every fitted sampler is in its asymptotic region."""
    if laws:
        first, last = max(law.first for law in laws), min(law.last for law in laws)
        if first < last:
            ax.axvspan(first, last, color="#EEF1F4", linewidth=0, zorder=0)


def law_text(law: ErrorLaw) -> str:
    """The order and its interval: "2.01 (1.98–2.04) on 32–256"."""
    return f"{law.order:.2f} ({law.order_low:.2f}–{law.order_high:.2f}) on {law.first}–{law.last}"
