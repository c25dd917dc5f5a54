"""What all pictures share: style, colours, and files that are whole or absent.

Figures are made without pyplot, so that nothing is left open and no display is looked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Dash = tuple[float, tuple[float, ...]]

WIDTH = 8.0  # inches; 1280 pixels, shown at about 830 in a README
DPI = 160
# Okabe and Ito 2008, distinguishable in every form of colour blindness; yellow is left out (too
# light for lines). Markers and dashes differ as well, for print in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: tuple[Dash, ...] = ((0, ()), (0, (5, 1.5)), (0, (1.5, 1.2)))
GREY = "#5F6670"
_STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9.0,
    "axes.linewidth": 0.7,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E6EA",
    "grid.linewidth": 0.6,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 9.0,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "font.family": "DejaVu Sans",
}


class Look:
    """A colour, marker and dash for the k-th of a number of lines."""

    def __init__(self, index: int) -> None:
        self.colour = COLOURS[index % len(COLOURS)]
        self.marker = MARKERS[index % len(MARKERS)]
        self.dash = DASHES[index // len(COLOURS) % len(DASHES)]


@contextmanager
def picture(path: str | os.PathLike[str], height: float, width: float = WIDTH) -> Iterator[Figure]:
    """A figure of ``width`` x ``height`` inches, written to ``path`` (PNG) when the block ends."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        yield figure
        # savefig would draw twice, once only for the layout.
        if (layout := figure.get_layout_engine()) is not None:
            layout.execute(figure)
            figure.set_layout_engine("none")
        try:
            canvas.print_png(temporary)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


def in_order(names: Sequence[str]) -> list[str]:
    """The different names, each where it first stood."""
    return list(dict.fromkeys(names))
