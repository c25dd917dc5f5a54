"""Real data sets by name: scikit-learn's digits, a ``.npy`` array, or a folder of images.

Every one becomes a `Dataset`: float32 tensors scaled to [-1, 1], split once into a training part and
a held-out part. The scaling is recorded, so that samples can be given back in the data's own range.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sde_diffusion.errors import unknown_name

__all__ = ["Dataset", "Scaling", "data_names", "load_data"]

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
HELD_OUT = 0.2
SPLIT_SEED = 20_240


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


@dataclass(frozen=True)
class Dataset:
    """A data set ready for training.

    Attributes:
        name: the name or path it was loaded by.
        train_x: (N, *event) float32 in [-1, 1]; event is (D,), (C, H, W) or ().
        train_y: (N,) int64 class labels, or None where the data has none.
        test_x: (M, *event), the held-out part, never trained on.
        test_y: (M,) or None.
        num_classes: number of classes, or None.
        scaling: the raw range, to undo the scaling on output.
        class_names: one name per class, in the order of the labels.
    """

    name: str
    train_x: Tensor
    train_y: Tensor | None
    test_x: Tensor
    test_y: Tensor | None
    num_classes: int | None
    scaling: Scaling
    class_names: tuple[str, ...] = ()

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one sample: (D,), (C, H, W) or ()."""
        return tuple(self.train_x.shape[1:])

    def describe(self) -> dict[str, Any]:
        """What a model folder keeps of the data, as JSON-able values."""
        return {
            "name": self.name,
            "event_shape": list(self.event_shape),
            "num_classes": self.num_classes,
            "class_names": list(self.class_names),
            "scaling": asdict(self.scaling),
            "train_size": len(self.train_x),
            "test_size": len(self.test_x),
        }


def data_names() -> tuple[str, ...]:
    """Names of the built-in data sets that `load_data` knows."""
    return tuple(sorted(_BUILT_IN))


def load_data(
    source: str | Path,
    *,
    labels: Sequence[int] | np.ndarray | Tensor | str | Path | None = None,
    test_fraction: float = HELD_OUT,
    seed: int = SPLIT_SEED,
) -> Dataset:
    """Load a data set by name or path, scale it to [-1, 1] and hold a part of it out.

    Args:
        source: a built-in name (``digits``); a ``.npy`` file of shape (N,), (N, D), (N, H, W) or
            (N, C, H, W), whose labels, if any, lie beside it as ``<stem>_labels.npy``; or a folder of
            images, where sub-folders are classes and a flat folder is unlabelled.
        labels: labels of a ``.npy`` file, (N,) integers 0..K-1 or strings, or a ``.npy`` file of them.
        test_fraction: share of each class that is held out, in (0, 1).
        seed: of the split. The same seed gives the same split.

    The raw range is 0..255 for 8-bit values, 0..65535 for 16-bit ones, otherwise the smallest and the
    largest value found. Labels that name a single class say nothing and are dropped.

    Raises:
        ValueError: unknown name, unreadable or non-finite data, shapes or labels that do not fit;
            the message names the argument, what was found, and the remedy.
    """
    if not 0.0 < test_fraction < 1.0:
        raise ValueError(f"test_fraction must lie in (0, 1), got {test_fraction}")
    name = str(source)
    path = Path(source).expanduser()
    if name in _BUILT_IN:
        _no_labels(labels, f"{name!r} brings its own labels")
        raw, codes, names, scaling = _BUILT_IN[name]()
    elif path.is_dir():
        _no_labels(labels, "a folder of images takes its labels from its sub-folders")
        raw, codes, names, scaling = _read_folder(path)
    elif path.suffix == ".npy":
        raw, codes, names, scaling = _read_npy(path, labels)
    elif path.exists():
        raise ValueError(
            f"data {name!r} is neither a .npy file nor a folder of images; "
            "save the array with numpy.save(path, array)"
        )
    elif path.suffix or len(path.parts) > 1:
        raise ValueError(
            f"data {name!r} does not exist; give a .npy file, a folder of images, "
            f"or one of: {', '.join(data_names())}"
        )
    else:
        raise unknown_name("data set", name, data_names())
    return _split(name, raw, codes, names, scaling, test_fraction, seed)


_Raw = tuple[np.ndarray, np.ndarray | None, tuple[str, ...], Scaling]


def _no_labels(labels: object, reason: str) -> None:
    if labels is not None:
        raise ValueError(f"labels cannot be given here: {reason}; leave labels out")


def _split(
    name: str,
    raw: np.ndarray,
    codes: np.ndarray | None,
    class_names: tuple[str, ...],
    scaling: Scaling,
    test_fraction: float,
    seed: int,
) -> Dataset:
    count = len(raw)
    if count < 2:
        raise ValueError(f"data {name!r} holds {count} sample(s); at least 2 are needed to hold one out")
    if len(class_names) < 2:
        codes = None
    generator = torch.Generator().manual_seed(seed)
    groups = [np.arange(count)] if codes is None else [
        np.flatnonzero(codes == k) for k in range(len(class_names))
    ]
    held: list[np.ndarray] = []
    for group in groups:
        order = group[torch.randperm(len(group), generator=generator).numpy()]
        held.append(order[: round(test_fraction * len(group))])
    test = np.sort(np.concatenate(held))
    if len(test) == 0:
        test = np.array([count - 1])
    mask = np.zeros(count, dtype=bool)
    mask[test] = True
    x = scaling.to_model(torch.from_numpy(raw.astype(np.float64))).to(torch.float32)
    y = None if codes is None else torch.from_numpy(codes.astype(np.int64))
    kept, out = torch.from_numpy(np.flatnonzero(~mask)), torch.from_numpy(np.flatnonzero(mask))
    if len(kept) == 0:
        raise ValueError(f"test_fraction={test_fraction} leaves nothing of {name!r} to train on; lower it")
    return Dataset(
        name=name,
        train_x=x[kept],
        train_y=None if y is None else y[kept],
        test_x=x[out],
        test_y=None if y is None else y[out],
        num_classes=None if codes is None else len(class_names),
        scaling=scaling,
        class_names=class_names if codes is not None else (),
    )


def _digits() -> _Raw:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            "data 'digits' comes with scikit-learn, which is not installed; "
            "install it with: python -m pip install scikit-learn"
        ) from error
    digits = load_digits()
    images = np.asarray(digits.images)[:, None]
    return images, np.asarray(digits.target), tuple(str(k) for k in range(10)), Scaling(0.0, 16.0)


_BUILT_IN: dict[str, Callable[[], _Raw]] = {"digits": _digits}


def _read_npy(path: Path, labels: Any) -> _Raw:
    array = _load_array(path, "data")
    if array.dtype.kind not in "buif":
        raise ValueError(f"data {str(path)!r} holds {array.dtype} values; save it as numbers, e.g. float32")
    if not 1 <= array.ndim <= 4 or 0 in array.shape:
        raise ValueError(
            f"data {str(path)!r} has shape {array.shape}; expected (N,), (N, D), (N, H, W) or (N, C, H, W)"
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
        raise ValueError(f"data {str(path)!r} holds {bad} NaN or infinite value(s); remove or replace them")
    beside = path.with_name(f"{path.stem}_labels.npy")
    if labels is None and beside.exists():
        labels = beside
    codes, names = None, ()
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
        raise ValueError(f"data {name!r} holds the one value {low} everywhere; there is nothing to learn")
    return Scaling(low, high)


def _load_array(path: Path, what: str) -> np.ndarray:
    try:
        return np.asarray(np.load(path, allow_pickle=False))
    except FileNotFoundError as error:
        raise ValueError(f"{what} {str(path)!r} does not exist; give an existing .npy file") from error
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"{what} {str(path)!r} cannot be read as a .npy array ({error}); pickled object arrays are "
            "refused, write it with numpy.save(path, numeric_array)"
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


def _read_folder(path: Path) -> _Raw:
    flat = _images_in(path)
    classes = {d.name: _images_in(d) for d in sorted(path.iterdir()) if d.is_dir() and d.name[0] != "."}
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
        f for f in folder.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES and f.name[0] != "." and f.is_file()
    )


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
            f"{len(unreadable)} of {len(files)} images cannot be read: {shown}; repair or remove them"
        )
    for file, image in zip(files, images, strict=True):
        if image.size != images[0].size:
            raise ValueError(
                f"images must have one size: {str(files[0])!r} is {images[0].size[0]}x{images[0].size[1]}, "
                f"{str(file)!r} is {image.size[0]}x{image.size[1]}; resize them first"
            )
    deep = [image.mode.startswith(("I", "F")) for image in images]
    if any(deep):
        if not all(deep):
            raise ValueError("images of 8 and of more bits are mixed; convert them to one depth first")
        array = np.stack([np.asarray(image, dtype=np.float32) for image in images])[:, None]
        if images[0].mode.startswith("I") and array.min() >= 0 and array.max() <= 65535:
            return array, Scaling(0.0, 65535.0)
        if not np.isfinite(array).all():
            raise ValueError(f"images beside {str(files[0])!r} hold NaN or infinite values; remove them")
        return array, _range_of(array, str(files[0].parent))
    grey = all(image.mode in ("1", "L", "LA") for image in images)
    array = np.stack([np.asarray(image.convert("L" if grey else "RGB")) for image in images])
    array = array[:, None] if grey else array.transpose(0, 3, 1, 2)
    return array, Scaling(0.0, 255.0)
