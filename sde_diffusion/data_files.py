"""Arrays and images on disk, read and checked; `sde_diffusion.data` makes data sets of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["Raw", "Scaling", "read_folder", "read_npy"]

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)


@dataclass(frozen=True)
class Scaling:
    """The affine map between the raw range [low, high] of a data set and the model's [-1, 1]."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(
                f"scaling needs finite low < high, got low={self.low}, high={self.high}; "
                "data whose values are all equal cannot be modelled"
            )

    def to_model(self, raw: Tensor) -> Tensor:
        """Raw values to [-1, 1]; any shape."""
        return (raw - self.low) * (2.0 / (self.high - self.low)) - 1.0

    def to_raw(self, x: Tensor) -> Tensor:
        """Model values back to the raw range; any shape, not clipped."""
        return (x + 1.0) * (0.5 * (self.high - self.low)) + self.low

    def to_unit(self, x: Tensor) -> Tensor:
        """Model values to [0, 1] and clipped there, as pictures want them; any shape."""
        return ((x + 1.0) * 0.5).clamp(0.0, 1.0)


Raw = tuple[np.ndarray, np.ndarray | None, tuple[str, ...], Scaling]
"""Samples (N, *event) in their own range, class codes (N,) or None, class names, and the range."""


def read_npy(path: Path, labels: Any) -> Raw:
    """A .npy array as (N, *event), with the labels given or lying beside it."""
    array = _load_array(path, "data")
    if array.dtype.kind not in "buif":
        raise ValueError(
            f"data {str(path)!r} holds {array.dtype} values; save it as numbers, e.g. float32"
        )
    if not 1 <= array.ndim <= 4 or 0 in array.shape:
        raise ValueError(
            f"data {str(path)!r} has shape {array.shape}; "
            "expected (N,), (N, D), (N, H, W) or (N, C, H, W)"
        )
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[-1] in (1, 3, 4) and array.shape[1] not in (1, 3, 4):
        raise ValueError(
            f"data {str(path)!r} has shape {array.shape}, which looks like (N, H, W, C); "
            "save array.transpose(0, 3, 1, 2) instead"
        )
    bad = int(array.size - np.isfinite(array).sum())
    if bad:
        raise ValueError(
            f"data {str(path)!r} holds {bad} NaN or infinite value(s); remove or replace them"
        )
    beside = path.with_name(f"{path.stem}_labels.npy")
    if labels is None and beside.exists():
        labels = beside
    codes: np.ndarray | None = None
    names: tuple[str, ...] = ()
    if labels is not None:
        codes, names = _encode_labels(labels, len(array))
    return array, codes, names, _range_of(array, str(path))


def _range_of(array: np.ndarray, name: str) -> Scaling:
    if array.dtype == np.uint8:
        return Scaling(0.0, 255.0)
    if array.dtype == np.uint16:
        return Scaling(0.0, 65535.0)
    low, high = float(array.min()), float(array.max())
    if low == high:
        raise ValueError(
            f"data {name!r} holds the one value {low} everywhere; there is nothing to learn"
        )
    return Scaling(low, high)


def _load_array(path: Path, what: str) -> np.ndarray:
    try:
        return np.asarray(np.load(path, allow_pickle=False))
    except FileNotFoundError as error:
        raise ValueError(
            f"{what} {str(path)!r} does not exist; give an existing .npy file"
        ) from error
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"{what} {str(path)!r} cannot be read as a .npy array ({error}); pickled object "
            "arrays are refused, write it with numpy.save(path, numeric_array)"
        ) from error


def _encode_labels(labels: Any, count: int) -> tuple[np.ndarray, tuple[str, ...]]:
    if isinstance(labels, (str, Path)):
        labels = _load_array(Path(labels), "labels")
    array = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
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


def read_folder(path: Path) -> Raw:
    """A folder of images as (N, C, H, W); its sub-folders are classes."""
    flat = _images_in(path)
    classes = {
        d.name: _images_in(d) for d in sorted(path.iterdir()) if d.is_dir() and d.name[0] != "."
    }
    classes = {name: files for name, files in classes.items() if files}
    if flat and classes:
        raise ValueError(
            f"folder {str(path)!r} holds both images and sub-folders of images; "
            "move the images into class sub-folders, or all into one flat folder"
        )
    if not flat and not classes:
        raise ValueError(
            f"folder {str(path)!r} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}); "
            "put them there, or into one sub-folder per class"
        )
    names = tuple(classes)
    files = flat or [file for name in names for file in classes[name]]
    codes = None
    if classes:
        codes = np.repeat(np.arange(len(names)), [len(classes[name]) for name in names])
    array, scaling = _read_images(files)
    return array, codes, names, scaling


def _images_in(folder: Path) -> list[Path]:
    return sorted(
        f
        for f in folder.iterdir()
        if f.suffix.lower() in IMAGE_SUFFIXES and f.name[0] != "." and f.is_file()
    )


def _size(image: Any) -> str:
    return f"{image.size[0]}x{image.size[1]}"


def _read_images(files: list[Path]) -> tuple[np.ndarray, Scaling]:
    """Read images to (N, C, H, W): C = 1 if all are grey, else 3; all of one size."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError(
            "reading images needs Pillow; install it with: python -m pip install pillow"
        ) from error
    images: list[Any] = []
    unreadable: list[str] = []
    for file in files:
        try:
            with Image.open(file) as image:
                image.load()
                images.append(image.copy())
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            unreadable.append(str(file))
    if unreadable:
        shown = ", ".join(unreadable[:5]) + (", ..." if len(unreadable) > 5 else "")
        raise ValueError(
            f"{len(unreadable)} of {len(files)} images cannot be read: {shown}; "
            "repair or remove them"
        )
    for file, image in zip(files, images, strict=True):
        if image.size != images[0].size:
            raise ValueError(
                f"images must have one size: {str(files[0])!r} is {_size(images[0])}, "
                f"{str(file)!r} is {_size(image)}; resize them first"
            )
    deep = [image.mode.startswith(("I", "F")) for image in images]
    if any(deep):
        if not all(deep):
            raise ValueError(
                "images of 8 and of more bits are mixed; convert them to one depth first"
            )
        array = np.stack([np.asarray(image, dtype=np.float32) for image in images])[:, None]
        if images[0].mode.startswith("I") and array.min() >= 0 and array.max() <= 65535:
            return array, Scaling(0.0, 65535.0)
        if not np.isfinite(array).all():
            raise ValueError(
                f"images beside {str(files[0])!r} hold NaN or infinite values; remove them"
            )
        return array, _range_of(array, str(files[0].parent))
    grey = all(image.mode in ("1", "L", "LA") for image in images)
    array = np.stack([np.asarray(image.convert("L" if grey else "RGB")) for image in images])
    array = array[:, None] if grey else array.transpose(0, 3, 1, 2)
    return array, Scaling(0.0, 255.0)
