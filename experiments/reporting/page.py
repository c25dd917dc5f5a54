"""The page: sections gathered from runs, filled into one template, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources, util
from pathlib import Path
from typing import Any

from experiments.certify.orders import ORDERS
from experiments.reporting.contents import Contents
from experiments.results import write_whole
from experiments.runs import Run

PAGE = "report.html"
_PARTS = ("page.css", "page.js")
_TEMPLATE = "page.html.j2"
_NEEDED = ("jinja2", "plotly")


def check_report(run: Run, out: str | None) -> Path:
    """Where the page will be written.

    Raises:
        ValueError: the run has no rows, ``out`` is a folder, or lies in none.
        ImportError: plotly or jinja2 is missing; names the extra.
    """
    path = run.path / PAGE if out is None else Path(out).expanduser()
    if not run.rows and not (run.path / ORDERS).exists():
        raise ValueError(
            f"{str(run.path)!r} has no finished rows to report; name the folder of a finished run"
        )
    if path.is_dir():
        raise ValueError(f"--out {str(path)!r} is a folder; name the HTML file to write")
    if not path.parent.is_dir():
        raise ValueError(f"--out {str(path)!r}: there is no folder {str(path.parent)!r}; make it")
    missing = [name for name in _NEEDED if util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"a report needs the extra report ({' and '.join(missing)} missing): "
            'python -m pip install "sde-diffusion[report]"'
        )
    return path


def write_report(
    run: Run, out: str | None = None, *, more: Sequence[Run] = (), trajectories: bool = True
) -> Path:
    """Write the report of a run as one HTML page that fetches nothing; returns its path.

    Args:
        out: the file; None: report.html in the run's folder.
        more: runs whose error budget, slopes and certificates stand on the page too.
        trajectories: also sample a trajectory for each target, and true samples, anew.

    Raises:
        ValueError, ImportError: see `check_report`.
    """
    path = check_report(run, out)
    write_whole(path, render(run, more=more, trajectories=trajectories))
    return path


def render(run: Run, *, more: Sequence[Run] = (), trajectories: bool = True) -> str:
    """The page as text; arguments as of `write_report`."""
    import jinja2
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_read),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    contents = Contents(run, more, trajectories=trajectories)
    sections = contents.sections()
    return environment.get_template(_TEMPLATE).render(
        **sections,
        data=_embedded(contents.figures),
        plotly=get_plotlyjs(),
        **{name.replace("page.", ""): _read(name) for name in _PARTS},
    )


def _embedded(value: Any) -> str:
    """JSON that no text in it can end early: as it stands inside a script element."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _read(name: str) -> str:
    return resources.files("experiments.reporting").joinpath(name).read_text("utf-8")
