"""Images that are decoded when they are asked for, or once into memory: folders, and whatever else
can open its i-th image.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sde_diffusion.data_files import RawData, level_range
from sde_diffusion.scaling import Scaling

__all__ = ["ImageOptions", "ImageSource", "read_folder", "read_images"]

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
CACHE_BYTES = 2**30
THREADS = 4


@dataclass(frozen=True)
class ImageOptions:
    """How images become one array.

    Attributes:
        size: (height, width) to which every image is brought: its middle is cut out in that
            aspect and resized (bicubic). None: images must have one size already.
        on_unreadable: ``error``, or ``skip`` to leave unreadable images out and count them.
        cache: whether decoded images are kept in memory (8-bit ones in 8 bits); None: where they
            take at most 1 GiB.
    """

    size: tuple[int, int] | None = None
    on_unreadable: str = "error"
    cache: bool | None = None

    def __post_init__(self) -> None:
        if self.on_unreadable not in ("error", "skip"):
            raise ValueError(f"on_unreadable must be 'error' or 'skip', got {self.on_unreadable!r}")
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise ValueError(f"size must be (height, width) in pixels, got {self.size!r}")


class ImageSource(Protocol):
    """Images by number, wherever they lie."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What the image is called in messages."""
        ...

    def open(self, index: int) -> Any:
        """A PIL image, loaded or not; whatever it raises makes the image unreadable."""
        ...

    def stamp(self) -> str:
        """A digest that changes when the images do, found without decoding them."""
        ...


@dataclass(frozen=True)
class _Files:
    files: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return str(self.files[index])

    def open(self, index: int) -> Any:
        from PIL import Image

        return Image.open(self.files[index])

    def stamp(self) -> str:
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.parent.name}/{file.name}:{os.path.getsize(file)};".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class _Form:
    """The one form all images of a source are brought to."""

    size: tuple[int, int]
    mode: str  # of PIL: L, RGB or F
    resize: bool

    @property
    def event_shape(self) -> tuple[int, int, int]:
        return (3 if self.mode == "RGB" else 1, *self.size)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float32 if self.mode == "F" else np.uint8)

    def apply(self, image: Any) -> np.ndarray:
        """A PIL image as (C, H, W)."""
        if self.mode == "F":
            from PIL import Image

            image = Image.fromarray(np.asarray(image, dtype=np.float32))
        elif image.mode != self.mode:
            image = image.convert(self.mode)
        if self.resize:
            image = _middle(image, self.size)
        if (image.height, image.width) != self.size:
            raise ValueError(f"it is {image.width}x{image.height} now; it changed on disk")
        array = np.asarray(image, dtype=self.dtype)
        return array.transpose(2, 0, 1) if self.mode == "RGB" else array[None]


def _middle(image: Any, size: tuple[int, int]) -> Any:
    """The largest middle part of the aspect of `size` (height, width), resized to it."""
    from PIL import Image

    height, width = size
    scale = min(image.width / width, image.height / height)
    across, down = (max(1, round(scale * side)) for side in (width, height))
    left, top = (image.width - across) // 2, (image.height - down) // 2
    part = image.crop((left, top, left + across, top + down))
    return part.resize((width, height), Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class DecodedImages:
    """Images of a source as a raw array (N, C, H, W) that is decoded when rows are asked for."""

    source: ImageSource
    form: _Form
    kept: np.ndarray
    stamp: str

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.kept), *self.form.event_shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.form.dtype

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        def decode(row: int) -> np.ndarray:
            try:
                return _decode(self.source, row, self.form)
            except _unreadable() as error:
                raise ValueError(
                    f"image {self.source.name(row)!r} can no longer be read ({error}); "
                    "restore it, or load the data again"
                ) from error

        rows = _in_threads(decode, [int(row) for row in self.kept[index]])
        return np.stack(rows) if rows else np.empty((0, *self.shape[1:]), self.dtype)


def read_folder(path: Path, options: ImageOptions) -> RawData:
    """A folder of images as (N, C, H, W); its sub-folders, at any depth below, are classes."""
    flat = _images_in(path, "*")
    classes = {
        d.name: _images_in(d, "**/*")
        for d in sorted(path.iterdir())
        if d.is_dir() and d.name[0] != "."
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
    return read_images(_Files(tuple(files)), str(path), codes, names, options)


def _images_in(folder: Path, pattern: str) -> list[Path]:
    return sorted(
        f
        for f in folder.glob(pattern)
        if f.suffix.lower() in IMAGE_SUFFIXES and f.name[0] != "." and f.is_file()
    )


def read_images(
    source: ImageSource,
    name: str,
    codes: np.ndarray | None,
    class_names: tuple[str, ...],
    options: ImageOptions,
) -> RawData:
    """All images of a source: C = 1 if all are grey, else 3; in memory or decoded on demand.

    Every image is decoded once here, so that no unreadable one is met hours into training.

    Raises:
        ValueError: unreadable images (named) unless they are to be skipped, images of different
            sizes or depths (named), none left, or a class that lost all its images.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "reading images needs Pillow; install it with: python -m pip install pillow"
        ) from error
    found = _in_threads(lambda row: _look(source, row), range(len(source)))
    bad = [row for row, seen in enumerate(found) if seen is None]
    good = [row for row, seen in enumerate(found) if seen is not None]
    if options.on_unreadable == "skip" and not good:
        raise ValueError(f"none of the {len(source)} images of {name!r} can be read; replace them")
    form = _common_form(source, {row: s for row, s in enumerate(found) if s is not None}, options)
    cache: np.ndarray | None = None
    if form is not None:
        needed = len(good) * int(np.prod(form.event_shape)) * form.dtype.itemsize
        if options.cache or (options.cache is None and needed <= CACHE_BYTES):
            cache = np.empty((len(good), *form.event_shape), form.dtype)
        bad += _decode_all(source, good, form, cache)
    if bad and options.on_unreadable == "error":
        named = ", ".join(source.name(row) for row in sorted(bad)[:5])
        raise ValueError(
            f"{len(bad)} of {len(source)} images cannot be read: {named}"
            f"{', ...' if len(bad) > 5 else ''}; "
            "repair or remove them, or leave them out with on_unreadable='skip'"
        )
    if form is None:
        raise ValueError(f"no image of {name!r} can be read; replace them")
    kept = np.setdiff1d(np.array(good, dtype=np.int64), np.array(bad, dtype=np.int64))
    codes = None if codes is None else codes[kept]
    if codes is not None and len(np.unique(codes)) < len(class_names):
        lost = [n for k, n in enumerate(class_names) if k not in set(codes.tolist())]
        raise ValueError(
            f"no image of the class {lost[0]!r} of {name!r} can be read; replace or remove it"
        )
    array: Any = (
        DecodedImages(source, form, kept, source.stamp())
        if cache is None
        else cache[np.isin(good, kept)]
        if bad
        else cache
    )
    return RawData(array, codes, class_names, _scaling(array, form, name), skipped=len(bad))


def _look(source: ImageSource, row: int) -> tuple[str, tuple[int, int]] | None:
    """Mode and (height, width), from the header alone where the source can; None: unreadable."""
    try:
        with source.open(row) as image:
            return image.mode, (image.height, image.width)
    except _unreadable():
        return None


def _decode(source: ImageSource, row: int, form: _Form) -> np.ndarray:
    with source.open(row) as image:
        image.load()
        return form.apply(image)


def _decode_all(
    source: ImageSource, rows: Sequence[int], form: _Form, cache: np.ndarray | None
) -> list[int]:
    """Decode every row, into the cache where there is one; returns the rows that cannot be read."""

    def decode(place: int) -> int | None:
        try:
            array = _decode(source, rows[place], form)
        except _unreadable():
            return rows[place]
        if cache is not None:
            cache[place] = array
        return None

    return [row for row in _in_threads(decode, range(len(rows))) if row is not None]


def _common_form(
    source: ImageSource, found: dict[int, tuple[str, tuple[int, int]]], options: ImageOptions
) -> _Form | None:
    if not found:
        return None
    first, (_, size) = next(iter(found.items()))
    if options.size is None:
        for row, (_, its_size) in found.items():
            if its_size != size:
                raise ValueError(
                    f"images must have one size: {source.name(first)!r} is {size[1]}x{size[0]}, "
                    f"{source.name(row)!r} is {its_size[1]}x{its_size[0]}; resize them first, "
                    "or give size=(height, width) to cut out their middles and resize those"
                )
    deep = {row: mode.startswith(("I", "F")) for row, (mode, _) in found.items()}
    if any(deep.values()) and not all(deep.values()):
        other = next(row for row, is_deep in deep.items() if is_deep != deep[first])
        raise ValueError(
            "images of 8 and of more bits are mixed "
            f"({source.name(first)!r} and {source.name(other)!r}); convert them to one depth first"
        )
    grey = all(mode in ("1", "L", "LA") for mode, _ in found.values())
    mode = "F" if deep[first] else "L" if grey else "RGB"
    return _Form(options.size or size, mode, resize=options.size is not None)


def _scaling(array: Any, form: _Form, name: str) -> Scaling:
    if form.mode != "F":
        return Scaling(0.0, 255.0, 256)
    scaling = level_range(array, name)
    whole = all(float(edge).is_integer() for edge in (scaling.low, scaling.high))
    if whole and scaling.low >= 0 and 1 < scaling.high <= 65535 and not form.resize:
        return Scaling(0.0, 65535.0, 65536)  # 16-bit pictures, as PIL gives them
    return scaling


def _unreadable() -> tuple[type[Exception], ...]:
    from PIL import Image

    return (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def _in_threads(work: Callable[[int], Any], rows: Sequence[int]) -> list[Any]:
    """``[work(row) for row in rows]``; decoding runs outside Python's lock."""
    if len(rows) < 2 * THREADS:
        return [work(row) for row in rows]
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(work, rows))
