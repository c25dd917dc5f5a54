"""Certificates on the console and as a picture."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator
from rich import box
from rich.table import Table
from rich.text import Text

from experiments.canvas import GREY, Look, in_order, picture
from experiments.certify.certificate import TOLERANCE, Certificate, Check, Curve

_COLUMNS = (
    ("uniform", "even"),
    ("uneven", "uneven"),
    ("start", "start"),
    ("strong", "strong"),
    ("limit", "limit"),
    ("nfe", "NFE"),
    ("split", "split"),
    ("short", "1–2"),
)
_GOOD, _BAD, _FAINT = "green", "bold red", "dim"
_ACROSS = 3  # panels beside each other
_DETAILED = 2  # solvers up to which every check has a line of its own


def tables(certificates: Sequence[Certificate]) -> list[Table]:
    """One line a solver, and one line a check for those that fail, or where there are few."""
    shown = [summary(certificates)] if len(certificates) > _DETAILED else []
    for certificate in certificates:
        if len(certificates) <= _DETAILED or not certificate.passed:
            shown.append(details(certificate))
    return shown


def summary(certificates: Sequence[Certificate]) -> Table:
    """Declared order and what was measured, a line for each solver."""
    table = _table(Text.assemble(("Certificates", "bold"), "  declared order, and as measured"))
    table.add_column("solver", overflow="fold", max_width=36)
    table.add_column("order", justify="right", no_wrap=True)
    for _, heading in _COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for certificate in certificates:
        declared = f"{certificate.order:g}"
        if certificate.kind == "SDE" and certificate.order:
            declared = f"{certificate.weak_order:g} weak"
        cells = [_cell(certificate.get(key)) for key, _ in _COLUMNS]
        table.add_row(Text(certificate.name), declared, *cells, _verdict(certificate.passed))
    table.caption = Text(
        "even, uneven: slope on uniform and non-uniform grids, the worst problem's; start: on runs "
        "from the middle; weak order of mean and variance where it says weak. strong: 1 is asked. "
        "limit: error on the finest grid (adaptive: at the tightest tolerance; order 0: growth of "
        f"the bias at twice the steps). NFE: evaluations per step. Slopes may miss by {TOLERANCE}."
        + (" diffusers: uneven is their own times." if any(c.peer for c in certificates) else ""),
        style=_FAINT,
    )
    table.caption_justify = "left"
    return table


def details(certificate: Certificate) -> Table:
    """Every check of one solver, with where the measured value comes from."""
    table = _table(Text.assemble((certificate.name, "bold"), f"  {certificate.kind}"))
    table.add_column("check", max_width=34)
    table.add_column("declared", justify="right", no_wrap=True)
    table.add_column("measured", justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("where", style=_FAINT, ratio=1)
    for check in certificate.checks:
        table.add_row(
            check.name,
            check.declared,
            Text(check.measured, style="" if check.passed is not False else _BAD),
            _verdict(check.passed),
            Text(check.note),
        )
    return table


def draw_orders(path: str | os.PathLike[str], certificates: Sequence[Certificate]) -> bool:
    """Error against steps, log–log: a panel for each family, or, of one solver, for each check.

    Of each solver the problem with the lowest slope on non-uniform grids is drawn, of one solver
    alone all problems; the thin lines have the declared slope.

    Returns:
        Whether there was anything to draw.
    """
    panels = _panels(certificates)
    if not panels:
        return False
    rows = math.ceil(len(panels) / _ACROSS)
    across = min(_ACROSS, len(panels))
    longest = max(len(lines) for lines in panels.values())
    each = 2.3 + 0.17 * longest
    with picture(path, height=0.3 + each * rows, width=3.4 * across) as figure:
        axes = figure.subplots(rows, across, squeeze=False).flat
        for ax, (title, lines) in zip(axes, panels.items(), strict=False):
            _draw_panel(ax, title, lines)
        for ax in list(figure.axes)[len(panels) :]:
            ax.remove()
    return True


def _panels(certificates: Sequence[Certificate]) -> dict[str, list[tuple[str, Curve]]]:
    panels: dict[str, list[tuple[str, Curve]]] = {}
    if len(certificates) == 1:
        for check in certificates[0].checks:
            if check.curves:
                panels[check.name] = [(curve.problem, curve) for curve in check.curves]
        return panels
    for family in in_order([_family(c.name) for c in certificates]):
        lines = []
        for certificate in certificates:
            if _family(certificate.name) == family:
                found = certificate.get("uneven") or certificate.get("limit")
                if found is not None and found.curves and certificate.order:
                    label = certificate.name.removeprefix(family).lstrip(":") or "default"
                    lines.append((label, found.curves[0]))
        if lines:
            panels[family] = lines
    return panels


def _family(name: str) -> str:
    """The catalogue's name; of a user's class all of ``module:Class``."""
    head, _, rest = name.partition(":")
    return head if "=" in rest or not rest else name


def _draw_panel(ax: Axes, title: str, lines: Sequence[tuple[str, Curve]]) -> None:
    ticks: set[int] = set()
    ax.set_xscale("log")
    ax.set_yscale("log")
    for k, (label, curve) in enumerate(lines):
        look = Look(k)
        points = [
            (n, e) for n, e in zip(curve.steps, curve.errors, strict=True) if 0 < e < math.inf
        ]
        if not points:
            continue
        ticks.update(n for n, _ in points)
        x, y = [n for n, _ in points], [e for _, e in points]
        slope = "" if curve.slope is None else f": {curve.slope:.2f}"
        ax.plot(
            x,
            y,
            color=look.colour,
            marker=look.marker,
            markersize=4,
            linestyle=look.dash,
            linewidth=1.4,
            label=f"{label}{slope}",
        )
        if curve.declared and curve.slope is not None:
            ideal = [y[-1] * (x[-1] / n) ** curve.declared for n in x]
            ax.plot(x, ideal, color=GREY, linewidth=0.6, zorder=0.5)
    spread: list[int] = []
    for tick in sorted(ticks, reverse=True):  # numbers closer than a factor 1.7 would overlap
        if not spread or spread[-1] / tick > 1.7:
            spread.append(tick)
    ax.xaxis.set_major_locator(FixedLocator([float(tick) for tick in spread]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    ax.yaxis.set_major_locator(LogLocator(numticks=6))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_title(title, loc="left")
    ax.legend(
        fontsize=7.5,
        loc="upper left",
        bbox_to_anchor=(-0.05, -0.13),
        borderaxespad=0.0,
        handlelength=2.2,
        labelspacing=0.25,
    )


def _cell(check: Check | None) -> Text:
    if check is None:
        return Text("·", style=_FAINT)
    short = {"bitwise": "yes", "finite": "yes"}.get(check.measured, check.measured)
    short = short.removesuffix(" a run").removesuffix(" apart")
    if check.passed is False:
        return Text(f"✗ {short}", style=_BAD)
    return Text(short, style=_FAINT if check.passed is None else "")


def _verdict(passed: bool | None) -> Text:
    if passed is None:
        return Text("not measured", style=_FAINT)
    return Text("pass", style=_GOOD) if passed else Text("FAIL", style=_BAD)


def _table(title: Text) -> Table:
    return Table(
        title=title,
        title_justify="left",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
