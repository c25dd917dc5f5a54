"""A large set of samples in files: each holds a run of ids, and is written whole or not at all.

``shards/00007.npy`` (or ``.safetensors``) holds samples ``7 N .. 8 N``, ``shards/00007.labels.npy``
their classes where they have any, and ``shards/00007.json``, written last, says that they are
finished: their ids, checksums and cost. ``manifest.json`` says what all of them are. Nothing but
these files passes between the processes that write a set.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from experiments.results import naming, write_whole
from sde_diffusion.storage import write_bytes

MANIFEST, SHARDS = "manifest.json", "shards"
FORMAT, VERSION = "sde-diffusion-shards", 1
FORMATS = ("npy", "safetensors")
FINISHED, UNFINISHED = "finished", "unfinished"


@dataclass(frozen=True)
class Shard:
    """Samples ``first .. first + samples - 1``."""

    index: int
    first: int
    samples: int

    @property
    def ids(self) -> Tensor:
        """(samples,) long."""
        return torch.arange(self.first, self.first + self.samples)


def layout(count: int, size: int) -> list[Shard]:
    """Shards of ``size`` samples, the last of what is left."""
    return [Shard(i, first, min(size, count - first)) for i, first in _firsts(count, size)]


def _firsts(count: int, size: int) -> list[tuple[int, int]]:
    return list(enumerate(range(0, count, size)))


class ShardFolder:
    """The files of a set.

    Args:
        path: the folder, which exists.
        key: hash of all that determines a sample; files of another are not this set's.
        size: samples in a shard.
        array_format: "npy" or "safetensors".
    """

    def __init__(self, path: Path, key: str, size: int, array_format: str) -> None:
        self.path = path
        self._key = key
        self._size = size
        self._format = array_format

    def check(self, count: int) -> dict[str, Any] | None:
        """The manifest that the folder holds, if any.

        Raises:
            ValueError: it is of another set or another layout, of more samples than ``count``, or
                damaged.
        """
        file = self.path / MANIFEST
        if not file.exists():
            return None
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            known = found.get("format") == FORMAT
        except (OSError, ValueError, AttributeError):
            known = False
        out = f"--out {str(self.path)!r}"
        if not known:
            raise ValueError(
                f"{out} holds a {MANIFEST} that is of no set in shards; name another folder"
            )
        if found.get("version", 0) > VERSION:
            raise ValueError(f"{out} is of a newer program; update sde-diffusion")
        if found["key"] != self._key:
            raise ValueError(
                f"{out} holds samples of other settings ({found['subject']}, "
                f"{found['solver']}, seed {found['seed']}; their key is {found['key']}, these have "
                f"{self._key}); name another folder, or sample with the settings of its {MANIFEST}"
            )
        for option, name, own in (
            ("--shard-size", "shard_size", self._size),
            ("--format", "array_format", self._format),
        ):
            if found[name] != own:
                raise ValueError(f"{out} was begun with {option} {found[name]}, got {own}; keep it")
        if found["samples"] > count:
            raise ValueError(
                f"{out} is a set of {found['samples']} samples, got -n {count}; give at least as "
                "many, or name another folder"
            )
        values: dict[str, Any] = found
        return values

    def finished(self, shard: Shard) -> dict[str, Any] | None:
        """What is stored of a shard, its files read and compared with their checksums; None where
        it is to be computed."""
        entry = self.entry(shard)
        if entry is None:
            return None
        for name, checksum in entry["files"].items():
            try:
                content = (self.path / name).read_bytes()
            except OSError:
                return None
            if hashlib.sha256(content).hexdigest() != checksum:
                return None
        return entry

    def entry(self, shard: Shard) -> dict[str, Any] | None:
        """What is said of a shard, its files not looked at."""
        try:
            entry = json.loads(self._file(shard, "json").read_text(encoding="utf-8"))
            same = entry["key"] == self._key and Shard(**entry["shard"]) == shard
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return entry if same else None

    def put(
        self, shard: Shard, x: Tensor, labels: Tensor | None, facts: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Store a shard; its own JSON last.

        Raises:
            WriteError: it cannot be written; all other shards are as they were.
        """
        if self._format == "npy":
            contents = {"npy": _npy(x)}
            if labels is not None:
                contents["labels.npy"] = _npy(labels)
        else:
            tensors = {"samples": x, "ids": shard.ids}
            tensors |= {} if labels is None else {"labels": labels}
            contents = {"safetensors": save({k: v.contiguous() for k, v in tensors.items()})}
        files = {}
        for suffix, content in contents.items():
            path = self._file(shard, suffix)
            with naming(path):
                path.parent.mkdir(exist_ok=True)
                write_bytes(path, content)
            files[f"{SHARDS}/{path.name}"] = hashlib.sha256(content).hexdigest()
        entry = {"key": self._key, "shard": asdict(shard), "files": files, **facts}
        path = self._file(shard, "json")
        with naming(path):
            write_whole(path, json.dumps(entry) + "\n")
        return entry

    def write_manifest(
        self, described: Mapping[str, Any], shards: Sequence[Shard]
    ) -> dict[str, Any]:
        """Write what the set is and which of its shards are finished.

        Raises:
            WriteError: it cannot be written.
        """
        entries = [entry for entry in map(self.entry, shards) if entry is not None]
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "key": self._key,
            "status": FINISHED if len(entries) == len(shards) else UNFINISHED,
            "samples": sum(shard.samples for shard in shards),
            "shard_size": self._size,
            "array_format": self._format,
            **described,
            "shards": [
                {
                    "first_id": entry["shard"]["first"],
                    "samples": entry["shard"]["samples"],
                    "sha256": entry["files"],
                    **{k: v for k, v in entry.items() if k not in ("key", "shard", "files")},
                }
                for entry in entries
            ],
        }
        path = self.path / MANIFEST
        with naming(path):
            write_whole(path, json.dumps(manifest, indent=1, allow_nan=False) + "\n")
        return manifest

    def _file(self, shard: Shard, suffix: str) -> Path:
        return self.path / SHARDS / f"{shard.index:05d}.{suffix}"


def _npy(x: Tensor) -> bytes:
    file = io.BytesIO()
    np.save(file, x.numpy(), allow_pickle=False)
    return file.getvalue()
