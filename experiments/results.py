"""A run folder: ``results.json`` beside the pictures of one run.

The file is rewritten after each row, whole or not at all, so that whatever stops a run leaves the
rows that were finished. ``results.schema.json`` beside this module says what is in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import platform
import shlex
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata, resources
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import numpy as np
import torch

from experiments.estimates import Estimate
from sde_diffusion.storage import CheckpointError

SCHEMA_VERSION = 2  # 2: rows of compare name their cells; all that 1 had is as it was
RESULTS = "results.json"
_PACKAGES = (
    "sde-diffusion",
    "torch",
    "numpy",
    "scipy",
    "torchsde",
    "torchdiffeq",
    "POT",
    "torchmetrics",
    "scikit-learn",
    "matplotlib",
    "diffusers",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One cell of a comparison: a sampler on a target, at one number of evaluations.

    Attributes:
        solver: its catalogue name; ``settings`` are what it was constructed with.
        sde, target: names.
        guidance: "none", "classifier" or "cfg"; ``scale`` is γ, None without guidance.
        steps: None where the solver chooses its own.
        nfe, network_passes: per sample; ``nfe`` and ``network_passes`` are measured.
        seconds: wall time of sampling, all samples of the row.
        metrics: name -> estimate; empty where the row failed.
        extra: further keys of the row (``seed``, ``status``, ``label``, ``samples``, ...).
    """

    solver: str
    settings: Mapping[str, Any]
    sde: str
    target: str
    guidance: str = "none"
    scale: float | None = None
    steps: int | None
    nfe: float
    network_passes: float
    seconds: float
    metrics: Mapping[str, Estimate]
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        names = {f.name for f in dataclasses.fields(self)} - {"extra"}
        if taken := names & set(self.extra):
            raise ValueError(f"extra must not repeat a row's own keys, got {sorted(taken)}")

    def as_dict(self) -> dict[str, Any]:
        """The row as it stands in results.json."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        extra = own.pop("extra")
        own["metrics"] = {name: _plain_estimate(e) for name, e in self.metrics.items()}
        row: dict[str, Any] = plain({**own, **extra})
        return row


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Make the folder ``path`` where it is missing and write a file in it.

    Raises:
        ValueError: it cannot be made or written; names ``--out`` and the reason.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ValueError(
            f"--out {str(folder)!r} cannot be written ({reason}); name a folder that can be"
        ) from None
    return folder


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` so that it holds the old text or the new, never a part."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp lets only the owner read
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class WriteError(OSError):
    """A file of a run that cannot be written, as on a full disk: which, and why."""


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """What is wrong with writing ``path`` as a `WriteError` that names it."""
    try:
        yield
    except (OSError, CheckpointError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        reason = getattr(cause, "strerror", None) or error
        raise WriteError(f"cannot write {str(path)!r} ({reason})") from error


class RunFile(ABC):
    """A run's JSON file, rewritten as the run goes on, whole or not at all.

    Use it as a context manager: the file says "running" until the block ends, then "finished",
    "interrupted" (Ctrl-C) or "failed".

    Args:
        path: the folder; made and tried at once, before any work.
        experiment: "compare", "steps", ...
        config: all that determines the run, JSON-like.
        device: where the run samples.

    Raises:
        ValueError: the folder cannot be written.
    """

    name: ClassVar[str]
    schema: ClassVar[int]

    def __init__(
        self,
        path: str | os.PathLike[str],
        experiment: str,
        config: Mapping[str, Any],
        *,
        device: str | torch.device = "cpu",
    ) -> None:
        self.path = check_writable(path)
        self.status = "running"
        self._head: dict[str, Any] = {
            "schema_version": self.schema,
            "experiment": experiment,
            "command": command_line(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "config": plain(config),
            "environment": environment(device),
        }

    @abstractmethod
    def as_dict(self) -> dict[str, Any]:
        """All that the file holds."""

    def write(self) -> None:
        """Write the file as it now stands.

        Raises:
            WriteError: it cannot be written; what it held it holds still.
        """
        text = json.dumps(self.as_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        with naming(self.path / self.name):
            write_whole(self.path / self.name, text + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.status = "finished"
        else:
            self.status = "interrupted" if issubclass(kind, KeyboardInterrupt) else "failed"
        with contextlib.suppress(*[] if kind is None else [WriteError]):  # not over what came first
            self.write()


class RunFolder(RunFile):
    """Collects the rows and the floor of one run and keeps results.json up to date."""

    name = RESULTS
    schema = SCHEMA_VERSION

    def __init__(
        self,
        path: str | os.PathLike[str],
        experiment: str,
        config: Mapping[str, Any],
        *,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(path, experiment, config, device=device)
        self.rows: list[dict[str, Any]] = []
        self.floor: dict[str, Mapping[str, Estimate]] = {}
        self.timing: dict[str, Any] = {}

    def replace(self, rows: Sequence[Row]) -> None:
        """These are the finished rows; writes the file."""
        self.rows = [row.as_dict() for row in rows]
        self.write()

    def add(self, row: Row) -> None:
        """Add a finished row and write the file."""
        self.rows.append(row.as_dict())
        self.write()

    def as_dict(self) -> dict[str, Any]:
        """All that results.json holds."""
        floor = {
            target: {name: _plain_estimate(found) for name, found in metrics.items()}
            for target, metrics in self.floor.items()
        }
        timing = {"timing": plain(self.timing)} if self.timing else {}
        return {**self._head, "status": self.status, **timing, "floor": floor, "rows": self.rows}


def load_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The results of a run folder, or of a results.json, older schemas' as this one's.

    Raises:
        ValueError: there is none, it is not JSON, or its schema is newer than this program's.
    """
    file = Path(path)
    if file.is_dir():
        file = file / RESULTS
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"no results at {str(file)!r} ({error.strerror}); name the folder of a finished run"
        ) from None
    except ValueError:  # not JSON, or not UTF-8
        raise ValueError(
            f"{str(file)!r} is damaged: it is not JSON; run again to replace it"
        ) from None
    version = results.get("schema_version") if isinstance(results, dict) else None
    if not isinstance(version, int):
        raise ValueError(f"{str(file)!r} is not a results file: it has no schema_version")
    if version > SCHEMA_VERSION:
        raise ValueError(
            f"{str(file)!r} has schema version {version}, this program reads up to "
            f"{SCHEMA_VERSION}; update sde-diffusion"
        )
    return _upgraded(results) if version < SCHEMA_VERSION else results


# What rows of compare have since version 2, and what it says of a row that was written before.
_SINCE_2: dict[str, Any] = {
    "cells": [],
    "status": "ok",
    "error": "",
    "peak_bytes": None,
    "batch_size": None,
}


def _upgraded(results: dict[str, Any]) -> dict[str, Any]:
    """Results of an older schema as this program writes them; the file stays as it is."""
    compared = results.get("experiment") == "compare"
    rows = [{**(_SINCE_2 if compared else {}), **row} for row in results.get("rows", [])]
    return {**results, "schema_version": SCHEMA_VERSION, "rows": rows}


def results_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of results.json."""
    text = resources.files("experiments").joinpath("results.schema.json").read_text("utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def command_line() -> str:
    """This process's command as it would be typed again."""
    name = Path(sys.argv[0]).name
    # By python -m, the first argument is a file that cannot be run by its name.
    typed = ["python", "-m", "experiments"] if name == "__main__.py" else [name]
    return shlex.join([*typed, *sys.argv[1:]])


def environment(device: str | torch.device = "cpu") -> dict[str, Any]:
    """What a reader must know to repeat the timings: versions, processor, threads, device."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": str(device),
        "device_name": name,
        "versions": {package: _version(package) for package in _PACKAGES},
    }


def plain(value: Any) -> Any:
    """``value`` in JSON's types: NaN and infinity become null, tensors lists, the rest its text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return {"name": type(value).__name__, **plain(fields)}
    return str(value)


def _plain_estimate(found: Estimate) -> dict[str, float | None]:
    return {"value": plain(float(found.value)), "stderr": plain(found.stderr)}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
