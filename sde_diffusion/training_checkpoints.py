"""The checkpoints of a run: whole files, the last few of them, and a manifest that says which
count.

    checkpoints/000017.safetensors   everything the run needs to go on
    checkpoints/manifest.json        the files that are whole, with their checksums, newest last

A checkpoint is written under a new name, then the manifest is replaced, then older files are
removed. So a crash at any instant, or a full disk, leaves a manifest of whole files: a torn file is
never chosen.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from sde_diffusion.errors import require_count
from sde_diffusion.storage import (
    CheckpointError,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)

__all__ = ["CHECKPOINTS", "CheckpointStore", "holds_checkpoints"]

CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"
FORMAT = "sde-diffusion-training"
VERSION = 2  # version 1 was a single file, checkpoint.safetensors
_REMEDY = "start again without resume, in another folder"


def holds_checkpoints(out: Path) -> bool:
    """Whether an output folder holds training that can be gone on with."""
    return (out / CHECKPOINTS / MANIFEST).exists()


class CheckpointStore:
    """The checkpoints in an output folder.

    Args:
        out: the output folder of the run.
        keep: how many to keep, newest first.
    """

    def __init__(self, out: Path, keep: int = 2) -> None:
        self.folder = out / CHECKPOINTS
        self.manifest = self.folder / MANIFEST
        self.keep = require_count("keep_last", keep)
        self.newest: Path | None = None  # of those that this process wrote or read

    def write(self, tensors: dict[str, Tensor], info: dict[str, Any]) -> Path:
        """Write one more; returns its file.

        Raises:
            CheckpointError: it cannot be written (a full disk, say); those before it are as they
                were.
        """
        entries = self._entries() if self.manifest.exists() else []
        number = 1 + max((int(Path(entry["file"]).stem) for entry in entries), default=0)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"cannot make {str(self.folder)!r} ({error.strerror or error}); give an output "
                "folder that is writable"
            ) from error
        file = self.folder / f"{number:06d}.safetensors"
        metadata = {"format": FORMAT, "version": str(VERSION), "training": json.dumps(info)}
        checksum = write_tensors(file, tensors, metadata)
        entry = {"file": file.name, "sha256": checksum, "stage": info.get("current", "")}
        entries = [*entries, entry | {"step": info.get("done", 0)}][-self.keep :]
        try:
            write_json(
                self.manifest, {"format": FORMAT, "version": VERSION, "checkpoints": entries}
            )
        except CheckpointError:
            if self.manifest.exists():  # the old one, or the new: what it names stays
                self._remove_others({entry["file"] for entry in self._entries()})
            raise
        self._remove_others({entry["file"] for entry in entries})
        self.newest = file
        return file

    def read(self) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
        """The newest checkpoint that is as it was written: (file, tensors, info).

        One that was damaged since is passed over with a warning, if there is an older one.

        Raises:
            CheckpointError: none can be read: corrupt, pickled, foreign or of a newer version.
        """
        first: CheckpointError | None = None
        for entry in reversed(self._entries()):
            file = self.folder / entry["file"]
            try:
                tensors, metadata = read_tensors(file, entry["sha256"], _REMEDY)
                info = json.loads(metadata["training"])
            except CheckpointError as error:
                first = first or error
                continue
            except (KeyError, TypeError, ValueError) as error:
                first = first or CheckpointError(
                    f"{str(file)!r} is not a training checkpoint ({error}); {_REMEDY}"
                )
                continue
            if first is not None:
                warnings.warn(f"{first}. Going on from the one before it: {file}", stacklevel=2)
            self.newest = file
            return file, tensors, info
        raise first or CheckpointError(f"{str(self.manifest)!r} names no checkpoint; {_REMEDY}")

    def clear(self) -> None:
        """Remove them all, the manifest first: without it none of them counts."""
        self.manifest.unlink(missing_ok=True)
        if self.folder.is_dir():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _entries(self) -> list[dict[str, Any]]:
        found = read_json(self.manifest, _REMEDY)
        where = str(self.manifest)
        if found.get("format") != FORMAT:
            raise CheckpointError(
                f"{where!r} is of format {found.get('format')!r}, not {FORMAT!r}; {_REMEDY}"
            )
        if found.get("version") != VERSION:
            raise CheckpointError(
                f"{where!r} is of version {found.get('version')!r}; this program reads {VERSION}: "
                f"upgrade it, or {_REMEDY}"
            )
        try:
            return [
                {**entry, "file": Path(entry["file"]).name, "sha256": str(entry["sha256"])}
                for entry in found["checkpoints"]
            ]
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{where!r} is not valid ({error}); {_REMEDY}") from error

    def _remove_others(self, kept: set[str]) -> None:
        """Older checkpoints, and what a crash left half-written."""
        for file in self.folder.iterdir():
            if file.name not in kept and file != self.manifest:
                with contextlib.suppress(OSError):
                    file.unlink()
