"""The cells of a run folder: each stored as it is finished, found again by its key.

``cells/KEY.json`` and, where samples are kept, ``cells/KEY.safetensors`` are written whole or not
at all, so that a run stopped at any moment has lost nothing that was finished, and two processes
that write one folder write the same files. ``cells.parquet`` is the last run's in one table.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from experiments.records import OK, Record, read_table, write_table
from experiments.results import naming, write_whole
from sde_diffusion.storage import write_tensors

CELLS, TABLE = "cells", "cells.parquet"


class CellStore:
    """Records and tensors by key, in a run folder.

    Args:
        folder: the run folder, which exists.

    Raises:
        ValueError: it holds cells of a newer program.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._cells = folder / CELLS
        self._known: dict[str, Record] = {}
        if (folder / TABLE).exists():
            self._known = {record.key: record for record in read_table(folder / TABLE)}

    def get(self, key: str) -> Record | None:
        """The finished record of a cell; None where there is none, or it had failed."""
        record = self._known.get(key) or self._read(key)
        if record is None or record.status != OK:
            return None
        self._known[key] = record
        return record

    def tensors(self, key: str) -> dict[str, Tensor] | None:
        """What was stored beside the record; None where it is missing or damaged."""
        path = self._cells / f"{key}.safetensors"
        try:
            return load_file(path)
        except Exception:  # whatever a torn or foreign file makes the reader say: compute it again
            return None

    def put(self, record: Record, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Store a cell; the record last, since its file says that the cell is finished.

        Raises:
            WriteError: it cannot be written; what was stored before is as it was.
        """
        text = json.dumps(record.as_dict(), ensure_ascii=False, allow_nan=False)
        path = self._cells / f"{record.key}.json"
        with naming(path):
            self._cells.mkdir(exist_ok=True)
            if tensors:
                write_tensors(path.with_suffix(".safetensors"), dict(tensors), {})
            write_whole(path, text + "\n")
        self._known[record.key] = record

    def forget(self, key: str) -> None:
        """Compute this cell again."""
        self._known.pop(key, None)
        (self._cells / f"{key}.json").unlink(missing_ok=True)

    def all(self) -> list[Record]:
        """Every cell of the folder, failed ones too, other processes' as well; in order of key."""
        found = dict(self._known)
        for path in self._cells.glob("*.json") if self._cells.is_dir() else ():
            record = self._read(path.stem)
            if record is not None:
                found[record.key] = record
        return [found[key] for key in sorted(found)]

    def write_table(self, records: Iterable[Record]) -> Path:
        """Write cells.parquet with these cells; returns its path."""
        path = self.folder / TABLE
        with naming(path):
            write_table(path, records)
        return path

    def _read(self, key: str) -> Record | None:
        path = self._cells / f"{key}.json"
        try:
            return Record.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, json.JSONDecodeError, UnicodeDecodeError):
            return None
