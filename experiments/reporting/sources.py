"""Which run folders a page can be made of."""

from __future__ import annotations

import json
import os
from pathlib import Path

from experiments.certify.orders import ORDERS
from experiments.results import RESULTS
from experiments.runs import Run, load_run

REPORTED = ("compare", "guidance", "steps", "error-budget", "recipe", "orders")
# What other commands leave, and which.
_OTHERS = {
    "likelihood.json": "likelihood",
    "restored.json": "restore",
    "table.json": "restore --table",
    "interpolation.json": "interpolate",
    "manifest.json": "sample",
    "model.json": "train",
}


def load_source(path: str | os.PathLike[str]) -> Run:
    """A run folder, or its results.json or orders.json, that a page can be made of.

    Raises:
        ValueError: there is none, it is damaged, it is newer than this program, or another
            command's; names what can be reported.
    """
    given = Path(path).expanduser()
    folder = given if given.is_dir() else given.parent
    if given.name == ORDERS or (not (folder / RESULTS).exists() and (folder / ORDERS).exists()):
        return _certificates(folder)
    if given.is_dir() and not (folder / RESULTS).exists():
        for name, command in _OTHERS.items():
            if (folder / name).exists():
                raise ValueError(
                    f"{str(given)!r} is of sde-diffusion {command}, which has no report: its "
                    f"figures are in {name}; name the folder of {_either()}"
                )
    run = load_run(given)
    experiment = run.results.get("experiment")
    if experiment not in REPORTED:
        raise ValueError(
            f"{str(given)!r} is of {experiment!r}, which has no report; name the folder of "
            f"{_either()}"
        )
    return run


def _certificates(folder: Path) -> Run:
    """A run of ``orders``: certificates and no rows."""
    try:
        found = json.loads((folder / ORDERS).read_text(encoding="utf-8"))
        head = {k: v for k, v in found.items() if k != "certificates"}
        if not isinstance(found["certificates"], list) or not isinstance(head["environment"], dict):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{str(folder / ORDERS)!r} is damaged; run sde-diffusion orders again to replace it"
        ) from None
    return Run(folder, {**head, "rows": []}, {})


def _either() -> str:
    return f"{', '.join(REPORTED[:-1])} or {REPORTED[-1]}"
