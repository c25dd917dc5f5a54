"""Samples that need not lie in memory: what a data set's x is, and what is computed over all of it.

A `Tensor` is one kind of `Samples`; `StoredSamples` is the other, which reads and scales rows of
an array on disk, or of images decoded on demand, when they are asked for.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sde_diffusion.scaling import Scaling

__all__ = [
    "RawArray",
    "Samples",
    "StoredSamples",
    "all_finite",
    "as_tensor",
    "chunks",
    "content_digest",
    "root_mean_square",
]

CHUNK_VALUES = 2**21
DIGEST_BYTES = 4 * 2**30
DIGEST_ROWS = 4096


class Samples(Protocol):
    """N samples of one shape: ``len(x)``, ``x.shape`` (N, *event), ``x[index]``."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, *event)."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """Rows by (B,) int64 indices, an (N,) mask or a slice -> (B, *event) float32 in [-1, 1]."""
        ...


class RawArray(Protocol):
    """What a store reads from: a NumPy array or memory map, or images that are decoded."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, *event)."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the raw values."""
        ...

    def __getitem__(self, index: np.ndarray, /) -> np.ndarray:
        """Rows by (B,) integer indices -> (B, *event) raw values."""
        ...


@dataclass(frozen=True, eq=False)
class StoredSamples:
    """Rows of a raw array, read and scaled when they are asked for; `Samples` that are no tensor.

    Attributes:
        raw: (N, *event), in memory or not.
        rows: (M,) int64, the rows of `raw` that belong to these samples.
        scaling: from raw values to [-1, 1].
    """

    raw: RawArray
    rows: np.ndarray
    scaling: Scaling

    @property
    def shape(self) -> tuple[int, ...]:
        """(M, *event)."""
        return (len(self.rows), *self.raw.shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """Rows by (B,) indices, an (M,) mask or a slice -> (B, *event) float32 in [-1, 1]."""
        rows = self.rows[index if isinstance(index, slice) else index.numpy()]
        if rows.ndim != 1:
            raise IndexError(f"index must be one-dimensional or a slice, got {index!r}")
        values = np.asarray(self.raw[rows])
        if self._table is not None:
            return torch.from_numpy(self._table[values])
        return self._scaled(values)

    @cached_property
    def _table(self) -> np.ndarray | None:
        """The scaled value of each 8-bit one: looking them up is several times faster."""
        every = np.arange(256, dtype=np.uint8)
        return self._scaled(every).numpy() if self.raw.dtype == np.uint8 else None

    def _scaled(self, values: np.ndarray) -> Tensor:
        return self.scaling.to_model(torch.from_numpy(values.astype(np.float64))).to(torch.float32)

    def at(self, index: Tensor) -> StoredSamples:
        """The samples at (B,) indices, not read yet."""
        return replace(self, rows=self.rows[index.numpy()])

    def rescaled(self, scaling: Scaling) -> StoredSamples:
        """The same raw values under another scaling."""
        return replace(self, scaling=scaling)

    def row_bytes(self) -> int:
        """Bytes of one raw row."""
        return math.prod(self.shape[1:]) * self.raw.dtype.itemsize


def chunk_rows(shape: tuple[int, ...]) -> int:
    """How many of samples (N, *event) are read at a time: about 2 million values."""
    return max(1, CHUNK_VALUES // max(1, math.prod(shape[1:])))


def chunks(samples: Samples, size: int | None = None) -> Iterator[Tensor]:
    """All samples in order, at most `size` at a time; by default about 2 million values."""
    size = size or chunk_rows(samples.shape)
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


def as_tensor(samples: Samples) -> Tensor:
    """All samples as one (N, *event) float32 tensor in memory."""
    return samples if isinstance(samples, Tensor) else torch.cat(list(chunks(samples)))


def root_mean_square(samples: Samples, chunk: int | None = None) -> float:
    """``sqrt(mean x^2)`` over all values of all samples, in float64, read in `chunks`."""
    total = sum(float(part.double().square().sum()) for part in chunks(samples, chunk))
    return math.sqrt(total / max(math.prod(samples.shape), 1))


def all_finite(samples: Samples) -> bool:
    """Whether no value is NaN or infinite; stores of integers are not read for it."""
    if isinstance(samples, StoredSamples) and samples.raw.dtype.kind in "bui":
        return True
    return all(bool(part.isfinite().all()) for part in chunks(samples))


def content_digest(samples: Samples) -> str:
    """SHA-256 that tells whether training goes on with the same samples.

    Of a tensor: of its bytes. Of a store: of its shape, raw type, scaling and raw rows, read in
    chunks; of 4,096 rows at even distances where they are more than 4 GiB, or where every row is an
    image to decode (``raw.stamp`` then adds names and sizes of the files).
    """
    if isinstance(samples, Tensor):
        return hashlib.sha256(samples.contiguous().numpy().tobytes()).hexdigest()
    digest = hashlib.sha256()
    if not isinstance(samples, StoredSamples):
        for part in chunks(samples):
            digest.update(part.contiguous().numpy().tobytes())
        return digest.hexdigest()
    head = [samples.shape, str(samples.raw.dtype), asdict(samples.scaling)]
    stamp: str | None = getattr(samples.raw, "stamp", None)
    digest.update(json.dumps([*head, stamp]).encode())
    rows = samples.rows
    if stamp is not None or len(rows) * samples.row_bytes() > DIGEST_BYTES:
        chosen = np.linspace(0, len(rows) - 1, min(DIGEST_ROWS, len(rows))).round()
        rows = rows[chosen.astype(np.int64)]
    size = chunk_rows(samples.shape)
    for start in range(0, len(rows), size):
        digest.update(np.ascontiguousarray(samples.raw[rows[start : start + size]]).tobytes())
    return digest.hexdigest()
