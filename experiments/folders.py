"""Where a run's files go, and what becomes of an older run in the same place."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.results import RESULTS, check_writable, plain

RULE = (
    "A folder that holds an earlier run is written over; any other folder that is not empty is "
    "refused."
)


def default_out(command: str, words: Sequence[str], config: Mapping[str, Any]) -> str:
    """``runs/COMMAND-words-hash``: the same for the same question, another for another."""
    text = json.dumps(plain(config), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:6]
    name = "-".join([command, *list(words)[:3], digest])
    return str(Path("runs") / re.sub(r"[^A-Za-z0-9_.+-]", "_", name))


def prepare_out(path: str, marker: str = RESULTS, pictures: Sequence[str] = ()) -> Path:
    """Make ``path`` ready for a run: made, tried, and free of an earlier run's pictures.

    Args:
        marker: the file by which an earlier run of this kind is known.
        pictures: what it may have drawn.
    Raises:
        ValueError: it cannot be written, or holds something else.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        try:
            held = [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")]
        except OSError as error:
            raise ValueError(
                f"--out {str(folder)!r} cannot be read ({error.strerror}); name another folder"
            ) from None
        if held and marker not in held:
            raise ValueError(
                f"--out {str(folder)!r} is not empty and holds no earlier run of this kind (no "
                f"{marker}); name a new or empty folder"
            )
    check_writable(folder)
    for name in pictures:
        (folder / name).unlink(missing_ok=True)
    return folder
