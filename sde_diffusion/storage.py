"""Files that are written whole or not at all: safetensors and JSON, never pickle."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor

__all__ = [
    "CheckpointError",
    "read_json",
    "read_tensors",
    "write_json",
    "write_tensors",
]

PICKLED = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})


class CheckpointError(ValueError):
    """A model folder or checkpoint that cannot be read or written: which, why, and the remedy."""


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` under a temporary name, then rename: a reader sees the old file or the new
    one.

    Raises:
        CheckpointError: it cannot be written; the old file, if any, is untouched.
    """
    partial = path.with_name(
        f"{path.name}.{os.getpid()}.partial"
    )  # another process may write it too
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _keep_name(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise CheckpointError(
            f"cannot write {str(path)!r} ({error.strerror or error}); "
            "give an output folder that is writable and has room"
        ) from error


def _keep_name(folder: Path) -> None:
    """Write a folder's names to the disk too, where the system can: a renamed file outlives a power
    cut."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write JSON whole or not at all; NaN and infinity are refused."""
    text = json.dumps(values, indent=1, allow_nan=False, ensure_ascii=False)
    write_bytes(path, (text + "\n").encode())


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> str:
    """Write safetensors whole or not at all; returns the file's SHA-256."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = dump_tensors(plain, metadata)
    write_bytes(path, content)
    return hashlib.sha256(content).hexdigest()


def _read_bytes(path: Path, remedy: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{str(path)!r} is missing; {remedy}") from error
    except OSError as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be read ({error.strerror or error}); check its permissions"
        ) from error


def read_json(
    path: Path, remedy: str = "train the model again or restore the file"
) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: missing, unreadable or not a JSON object.
    """
    content = _read_bytes(path, remedy)
    try:
        values = json.loads(content)
    except ValueError as error:
        raise CheckpointError(f"{str(path)!r} is not valid JSON ({error}); {remedy}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{str(path)!r} holds no JSON object; {remedy}")
    return values


def read_tensors(
    path: Path,
    checksum: str | None = None,
    remedy: str = "train the model again or restore the file",
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read safetensors: (tensors by name, metadata).

    Raises:
        CheckpointError: missing, truncated, corrupt, pickled, or not the file whose checksum is
            given.
    """
    content = _read_bytes(path, remedy)
    # safetensors begin with the length of their header, any number, and its first brace.
    if content[8:9] != b"{" and (content[:2] == b"PK" or content[:1] == b"\x80"):
        raise CheckpointError(
            f"{str(path)!r} is a pickled file, which can run code when it is read, and is refused; "
            "convert it with safetensors.torch.save_file(state_dict, path)"
        )
    try:
        tensors = load_tensors(content)
        size = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + size]).get("__metadata__", {})
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{str(path)!r} is truncated or corrupt ({error}); {remedy}"
        ) from error
    if checksum is not None and hashlib.sha256(content).hexdigest() != checksum:
        raise CheckpointError(
            f"{str(path)!r} is not the file that its folder's model.json was written with "
            f"(its checksum differs); {remedy}"
        )
    return tensors, metadata


def halved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """float16 copies, except of tensors that float16 cannot hold (its largest number is 65504)."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        half = tensor.to(torch.float16) if tensor.is_floating_point() else tensor
        out[name] = half if not half.is_floating_point() or bool(half.isfinite().all()) else tensor
    return out


def fit_tensors(
    path: Path, expected: dict[str, Tensor], found: dict[str, Tensor]
) -> dict[str, Tensor]:
    """`found` in the dtypes of `expected`.

    Raises:
        CheckpointError: names or shapes differ, or a value is not finite; the tensors are named.
    """
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not in the network" for name in found if name not in expected]
    for name, tensor in expected.items():
        if name not in found:
            continue
        if found[name].shape != tensor.shape:
            problems.append(f"{name} is {tuple(found[name].shape)}, not {tuple(tensor.shape)}")
        elif not bool(found[name].isfinite().all()):
            problems.append(f"{name} holds NaN or infinite values")
    if problems:
        shown = "; ".join(problems[:6]) + ("; ..." if len(problems) > 6 else "")
        raise CheckpointError(
            f"{str(path)!r} does not match the network that is configured: {shown}. "
            "Restore the file that belongs to it, or train the model again"
        )
    return {name: found[name].to(tensor.dtype) for name, tensor in expected.items()}
