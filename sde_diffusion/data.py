"""Real data sets by name: scikit-learn's digits, a ``.npy`` array, or a folder of images.

Every one becomes a `Dataset`: float32 tensors scaled to [-1, 1], split once into a training part
and a held-out part. The scaling is recorded, so that samples can be given back in the data's own
range.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sde_diffusion.data_files import Raw, Scaling, read_folder, read_npy
from sde_diffusion.errors import unknown_name

__all__ = ["DataDescription", "Dataset", "Scaling", "data_names", "load_data"]

HELD_OUT = 0.2
SPLIT_SEED = 20_240


@dataclass(frozen=True)
class DataDescription:
    """What a model folder keeps of the data it was trained on.

    Attributes:
        name: the name or path it was loaded by.
        event_shape: shape of one sample: (D,), (C, H, W) or ().
        num_classes: number of classes, or None.
        class_names: one name per class.
        scaling: raw range of the data.
        train_size: number of training samples.
        test_size: number of held-out samples.
    """

    name: str
    event_shape: tuple[int, ...]
    num_classes: int | None
    class_names: tuple[str, ...]
    scaling: Scaling
    train_size: int
    test_size: int

    def config(self) -> dict[str, Any]:
        """JSON-able values; `from_config` is the inverse."""
        return asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DataDescription:
        """From `config`'s values.

        Raises:
            KeyError, TypeError, ValueError: a value is missing or does not fit.
        """
        classes = config["num_classes"]
        return cls(
            name=str(config["name"]),
            event_shape=tuple(int(n) for n in config["event_shape"]),
            num_classes=None if classes is None else int(classes),
            class_names=tuple(str(name) for name in config["class_names"]),
            scaling=Scaling(**config["scaling"]),
            train_size=int(config["train_size"]),
            test_size=int(config["test_size"]),
        )


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

    def describe(self) -> DataDescription:
        """What a model folder keeps of this data set."""
        return DataDescription(
            name=self.name,
            event_shape=self.event_shape,
            num_classes=self.num_classes,
            class_names=self.class_names,
            scaling=self.scaling,
            train_size=len(self.train_x),
            test_size=len(self.test_x),
        )


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
            (N, C, H, W), whose labels, if any, lie beside it as ``<stem>_labels.npy``; or a folder
            of images, where sub-folders are classes and a flat folder is unlabelled.
        labels: labels of a ``.npy`` file, (N,) integers 0..K-1 or strings, or a ``.npy`` file of
            them.
        test_fraction: share of each class that is held out, in (0, 1).
        seed: of the split. The same seed gives the same split.

    The raw range is 0..255 for 8-bit values, 0..65535 for 16-bit ones, otherwise the smallest and
    the largest value found. Labels that name a single class say nothing and are dropped.

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
        raw, codes, names, scaling = read_folder(path)
    elif path.suffix == ".npy":
        raw, codes, names, scaling = read_npy(path, labels)
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
        raise ValueError(
            f"data {name!r} holds {count} sample(s); at least 2 are needed to hold one out"
        )
    if len(class_names) < 2:
        codes = None
    generator = torch.Generator().manual_seed(seed)
    groups = (
        [np.arange(count)]
        if codes is None
        else [np.flatnonzero(codes == k) for k in range(len(class_names))]
    )
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
        raise ValueError(
            f"test_fraction={test_fraction} leaves nothing of {name!r} to train on; lower it"
        )
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


def _digits() -> Raw:
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


_BUILT_IN: dict[str, Callable[[], Raw]] = {"digits": _digits}
