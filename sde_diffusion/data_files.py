"""Arrays on disk, memory-mapped and checked; `sde_diffusion.data` makes data sets of them."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sde_diffusion.errors import unknown_name
from sde_diffusion.samples import RawArray, chunk_rows
from sde_diffusion.scaling import Scaling

__all__ = ["RawData", "encode_labels", "level_range", "read_npy", "read_npz"]

DATA_KEYS = ("x", "x_train", "data", "images", "arr_0")
LABEL_KEYS = ("y", "y_train", "labels", "label", "arr_1")


@dataclass(frozen=True)
class RawData:
    """Samples as a source holds them.

    Attributes:
        array: (N, *event) raw values, in memory or read on demand.
        codes: (N,) class codes 0..K-1, or None.
        class_names: one name per class.
        scaling: raw range and levels.
        skipped: samples left out because they could not be read.
    """

    array: RawArray
    codes: np.ndarray | None
    class_names: tuple[str, ...]
    scaling: Scaling
    skipped: int = 0


def read_npy(path: Path, labels: Any) -> RawData:
    """A .npy array, memory-mapped, with the labels given or lying beside it."""
    beside = path.with_name(f"{path.stem}_labels.npy")
    if labels is None and beside.exists():
        labels = beside
    return _checked(_map_npy(path, "data"), str(path), labels)


def read_npz(path: Path, labels: Any, column: str | None, label_column: str | None) -> RawData:
    """One array of a .npz file and, where it has one, its label array.

    An array that `numpy.savez` wrote is memory-mapped; a compressed one cannot be, and is held in
    memory in its own type.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {
                info.filename.removesuffix(".npy"): info
                for info in archive.infolist()
                if info.filename.endswith(".npy")
            }
            key = _member("image_column", column, DATA_KEYS, members, path)
            if key is None:
                raise ValueError(
                    f"data {str(path)!r} holds the arrays {', '.join(sorted(members)) or 'none'}; "
                    "say with image_column which one holds the samples"
                )
            array = _read_member(path, archive, members[key])
            label_key = _member("label_column", label_column, LABEL_KEYS, members, path)
            if labels is None and label_key not in (None, key):
                labels = _read_member(path, archive, members[str(label_key)])
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise ValueError(
            f"data {str(path)!r} cannot be read as a .npz file ({error}); "
            "write it with numpy.savez(path, x=array, y=labels)"
        ) from error
    return _checked(array, f"{path}:{key}", labels)


def _member(
    argument: str, name: str | None, usual: tuple[str, ...], members: dict[str, Any], path: Path
) -> str | None:
    if name is not None:
        if name not in members:
            raise unknown_name(f"{argument} of {str(path)!r}", name, members)
        return name
    if argument == "image_column" and len(members) == 1:
        return next(iter(members))
    return next((key for key in usual if key in members), None)


def _read_member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    try:
        if info.compress_type != zipfile.ZIP_STORED:
            with archive.open(info) as file:
                return np.asarray(np.lib.format.read_array(file, allow_pickle=False))
        with open(path, "rb") as raw:
            # A local file header is 30 bytes, whose last four are the lengths of what follows it.
            raw.seek(info.header_offset + 26)
            name, extra = (int.from_bytes(raw.read(2), "little") for _ in range(2))
            raw.seek(info.header_offset + 30 + name + extra)
            version = np.lib.format.read_magic(raw)
            read_header = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, fortran, dtype = read_header(raw)
            if dtype.hasobject:
                raise ValueError("it holds pickled objects")
            return np.memmap(path, dtype, "r", raw.tell(), shape, "F" if fortran else "C")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"data {str(path)!r}: {info.filename} cannot be read as an array ({error}); pickled "
            "object arrays are refused, write numbers with numpy.savez(path, x=array)"
        ) from error


def _checked(array: np.ndarray, name: str, labels: Any) -> RawData:
    if array.dtype.kind not in "buif":
        raise ValueError(
            f"data {name!r} holds {array.dtype} values; save it as numbers, e.g. float32"
        )
    if not 1 <= array.ndim <= 4 or 0 in array.shape:
        raise ValueError(
            f"data {name!r} has shape {array.shape}; "
            "expected (N,), (N, D), (N, H, W) or (N, C, H, W)"
        )
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[-1] in (1, 3, 4) and array.shape[1] not in (1, 3, 4):
        raise ValueError(
            f"data {name!r} has shape {array.shape}, which looks like (N, H, W, C); "
            "save array.transpose(0, 3, 1, 2) instead"
        )
    scaling = level_range(array, name)
    codes: np.ndarray | None = None
    names: tuple[str, ...] = ()
    if labels is not None:
        codes, names = encode_labels(labels, len(array))
    return RawData(array, codes, names, scaling)


def level_range(array: Any, name: str) -> Scaling:
    """The raw range of an array: 0..255 and 0..65535 by type, otherwise what is found, read in
    chunks; NaN and infinite values are refused. Only 8- and 16-bit values have known levels.
    """
    if array.dtype == np.uint8:
        return Scaling(0.0, 255.0, 256)
    if array.dtype == np.uint16:
        return Scaling(0.0, 65535.0, 65536)
    low, high, bad = np.inf, -np.inf, 0
    size = chunk_rows(array.shape)
    for start in range(0, array.shape[0], size):
        part = np.asarray(array[start : start + size])
        bad += part.size - int(np.isfinite(part).sum())
        low, high = min(low, float(part.min())), max(high, float(part.max()))
    if bad:
        raise ValueError(
            f"data {name!r} holds {bad} NaN or infinite value(s); remove or replace them"
        )
    if low == high:
        raise ValueError(
            f"data {name!r} holds the one value {low} everywhere; there is nothing to learn"
        )
    return Scaling(low, high)


def _map_npy(path: Path, what: str) -> np.ndarray:
    try:
        return np.asanyarray(np.load(path, allow_pickle=False, mmap_mode="r"))
    except FileNotFoundError as error:
        raise ValueError(
            f"{what} {str(path)!r} does not exist; give an existing .npy file"
        ) from error
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"{what} {str(path)!r} cannot be read as a .npy array ({error}); pickled object "
            "arrays are refused, write it with numpy.save(path, numeric_array)"
        ) from error


def encode_labels(labels: Any, count: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels of `count` samples, as codes 0..K-1 (N,) int64 and names of the classes."""
    if isinstance(labels, (str, Path)):
        labels = _map_npy(Path(labels), "labels")
    array = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if array.shape == (count, 1):
        array = array[:, 0]
    if array.shape != (count,):
        raise ValueError(f"labels have shape {array.shape}; expected one per sample, ({count},)")
    if array.dtype.kind in "US":
        names, codes = np.unique(array, return_inverse=True)
        return codes.astype(np.int64), tuple(str(name) for name in names)
    if array.dtype.kind == "f" and np.array_equal(array, np.round(array)):
        array = array.astype(np.int64)
    if array.dtype.kind not in "bui":
        raise ValueError(f"labels hold {array.dtype} values; give integers 0..K-1 or strings")
    codes = array.astype(np.int64)
    present = np.unique(codes)
    if not np.array_equal(present, np.arange(len(present))):
        shown = ", ".join(str(k) for k in present[:8]) + (", ..." if len(present) > 8 else "")
        raise ValueError(
            f"labels must be 0..K-1 with every class present, found {{{shown}}}; "
            "renumber them with numpy.unique(labels, return_inverse=True)[1]"
        )
    return codes, tuple(str(k) for k in present)
