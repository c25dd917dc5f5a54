"""Hugging Face ``datasets`` saved to a local folder by ``save_to_disk``; extra `datasets`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sde_diffusion.data_files import RawData, encode_labels, level_range
from sde_diffusion.data_images import ImageOptions, read_images
from sde_diffusion.errors import unknown_name

__all__ = ["is_saved_dataset", "read_saved_dataset"]

MARKS = ("dataset_dict.json", "dataset_info.json")


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by `datasets`' save_to_disk."""
    return any((path / mark).is_file() for mark in MARKS)


@dataclass(frozen=True)
class _Images:
    data: Any
    column: str
    path: str

    def __len__(self) -> int:
        return len(self.data)

    def name(self, index: int) -> str:
        return f"{self.path} row {index}"

    def open(self, index: int) -> Any:
        return self.data[index][self.column]

    def stamp(self) -> str:
        # A digest of the files' arrows and of every transform since.
        return hashlib.sha256(json.dumps(self.data._fingerprint).encode()).hexdigest()


@dataclass(frozen=True)
class _Arrays:
    """A column of numbers as a raw array, read by rows."""

    data: Any
    column: str
    event_shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.data), *self.event_shape)

    def __getitem__(self, index: Any) -> np.ndarray:
        values = np.asarray(self.data[index][self.column], dtype=self.dtype)
        return values.reshape(len(values), *self.event_shape)


def read_saved_dataset(
    path: Path,
    *,
    split: str | None,
    image_column: str | None,
    label_column: str | None,
    options: ImageOptions,
) -> RawData:
    """One split of a saved dataset: an image column, or one of numbers of a fixed shape.

    Args:
        path: folder written by ``save_to_disk``.
        split: of a dataset with several; ``train`` by default.
        image_column: by default the only image column, else the only column of arrays.
        label_column: by default the only ClassLabel column, else one named label or labels.
        options: of images.

    Raises:
        ValueError: `datasets` is missing (the extra is named), the folder cannot be read, or
            columns that are missing or in doubt.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"data {str(path)!r} is a saved Hugging Face dataset, and the package datasets is not "
            "installed; install it with: python -m pip install 'sde-diffusion[datasets]'"
        ) from error
    try:
        data = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"data {str(path)!r} cannot be read as a saved dataset ({error}); "
            "write it again with save_to_disk"
        ) from error
    data = _one_split(data, split, path)
    images = [n for n, f in data.features.items() if isinstance(f, datasets.Image)]
    arrays = [
        n
        for n, f in data.features.items()
        if isinstance(f, datasets.Array2D | datasets.Array3D)
        or (isinstance(f, datasets.Sequence | datasets.List) and f.length > 0)
    ]
    column = _column("image_column", image_column, images or arrays, data, path)
    classes = [n for n, f in data.features.items() if isinstance(f, datasets.ClassLabel)]
    label = label_column
    if label is None:
        usual = classes or [n for n in ("label", "labels") if n in data.features]
        label = _column("label_column", None, usual, data, path) if usual else None
    elif label not in data.features:
        raise unknown_name(f"label_column of {str(path)!r}", label, data.features)
    codes: np.ndarray | None = None
    names: tuple[str, ...] = ()
    if label is not None:
        codes, names = encode_labels(np.asarray(data[label][:]), len(data))
        if label in classes:
            names = tuple(data.features[label].int2str(int(k)) for k in range(len(names)))
    if column in images:
        source = _Images(data.select_columns([column]), column, str(path))
        return read_images(source, str(path), codes, names, options)
    array = _array_column(data, column, str(path))
    return RawData(array, codes, names, level_range(array, f"{path}:{column}"))


def _one_split(data: Any, split: str | None, path: Path) -> Any:
    if not hasattr(data, "keys"):
        if split is not None:
            raise ValueError(f"data {str(path)!r} has no splits; leave split={split!r} out")
        return data
    names = list(data.keys())
    wanted = split or ("train" if "train" in names else names[0] if len(names) == 1 else None)
    if wanted is None:
        raise ValueError(
            f"data {str(path)!r} has the splits {', '.join(names)}; name one with split"
        )
    if wanted not in names:
        raise unknown_name(f"split of {str(path)!r}", wanted, names)
    return data[wanted]


def _column(argument: str, name: str | None, found: list[str], data: Any, path: Path) -> str:
    if name is not None:
        if name not in data.features:
            raise unknown_name(f"{argument} of {str(path)!r}", name, data.features)
        return name
    if len(found) != 1:
        what = f"several columns could be it ({', '.join(found)})" if found else "no column fits"
        raise ValueError(
            f"{argument} of {str(path)!r} is not clear: {what}; name one of "
            f"{', '.join(data.features)}"
        )
    return found[0]


def _array_column(data: Any, column: str, path: str) -> _Arrays:
    first = np.asarray(data[0][column])
    if first.dtype.kind not in "buif" or first.ndim > 3:
        raise ValueError(
            f"column {column!r} of {path!r} holds {first.dtype} values of shape {first.shape}; "
            "name a column of images or numbers with image_column"
        )
    feature = data.features[column]
    named = getattr(feature, "dtype", None) or getattr(feature.feature, "dtype", "float32")
    shape = (1, *first.shape) if first.ndim == 2 else first.shape
    data = data.select_columns([column]).with_format("numpy")
    return _Arrays(data, column, shape, np.dtype(named if named != "list" else first.dtype))
