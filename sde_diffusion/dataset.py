"""A data set ready for training, and what a model folder keeps of it."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sde_diffusion import samples
from sde_diffusion.samples import Samples, StoredSamples
from sde_diffusion.scaling import Preparation, Scaling

__all__ = ["DataDescription", "Dataset"]


@dataclass(frozen=True)
class DataDescription:
    """What a model folder keeps of the data it was trained on.

    Attributes:
        name: the name or path it was loaded by.
        event_shape: shape of one sample: (D,), (C, H, W) or ().
        num_classes: number of classes, or None.
        class_names: one name per class.
        scaling: raw range and levels of the data; its ``quantise`` gives samples back in them.
        train_size: number of training samples.
        test_size: number of held-out samples.
        preparation: what was done to each training batch.
        skipped: samples left out because they could not be read.
        options: what `load_data` was called with besides the name, where that was not the default;
            ``load_data(name, **options)`` loads the same data.
    """

    name: str
    event_shape: tuple[int, ...]
    num_classes: int | None
    class_names: tuple[str, ...]
    scaling: Scaling
    train_size: int
    test_size: int
    preparation: Preparation = field(default_factory=Preparation)
    skipped: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def bits_offset(self) -> float:
        """Bits per dimension to add to the model's own; see `Scaling.bits_offset`."""
        return self.scaling.bits_offset

    def config(self) -> dict[str, Any]:
        """JSON-able values; `from_config` is the inverse."""
        return asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DataDescription:
        """From `config`'s values; those that older folders lack take their defaults.

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
            preparation=Preparation(**config.get("preparation", {})),
            skipped=int(config.get("skipped", 0)),
            options=dict(config.get("options", {})),
        )


@dataclass(frozen=True)
class Dataset:
    """A data set ready for training.

    `train_x` and `test_x` are tensors, or stores that read rows when they are asked for; both have
    ``len(x)``, ``x.shape`` and ``x[index]``, a float32 tensor. What goes over all of them uses
    `sde_diffusion.samples` (``chunks``, ``root_mean_square``, ``as_tensor``).

    Attributes:
        name: the name or path it was loaded by.
        train_x: (N, *event) float32 in [-1, 1]; event is (D,), (C, H, W) or ().
        train_y: (N,) int64 class labels, or None where the data has none.
        test_x: (M, *event), the held-out part, never trained on.
        test_y: (M,) or None.
        num_classes: number of classes, or None.
        scaling: the raw range, to undo the scaling on output.
        class_names: one name per class, in the order of the labels.
        preparation: what `batch` does at random to the samples it takes.
        skipped: samples left out because they could not be read.
        options: as in `DataDescription`.
    """

    name: str
    train_x: Samples
    train_y: Tensor | None
    test_x: Samples
    test_y: Tensor | None
    num_classes: int | None
    scaling: Scaling
    class_names: tuple[str, ...] = ()
    preparation: Preparation = field(default_factory=Preparation)
    skipped: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.preparation.dequantise != self.scaling.dequantised:
            raise ValueError(
                f"preparation.dequantise={self.preparation.dequantise} needs a scaling with "
                f"dequantised={self.preparation.dequantise}; load_data makes both"
            )
        if self.preparation.flip and len(self.event_shape) != 3:
            raise ValueError(
                f"flip needs images (C, H, W), and samples of {self.name!r} have shape "
                f"{self.event_shape}; leave flip out"
            )

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one sample: (D,), (C, H, W) or ()."""
        return tuple(self.train_x.shape[1:])

    @cached_property
    def root_mean_square(self) -> float:
        """``sqrt(mean x^2)`` over the training samples; EDM's sigma_data of centred data."""
        return samples.root_mean_square(self.train_x)

    def batch(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Training samples and their labels, prepared: dequantised and flipped as asked for.

        Args:
            index: (B,) int64, of training samples. Any number of them, in any order, with
                repetitions: a batch may be larger than the data set.
            generator: on the CPU. With no preparation it is not used, and the result is
                ``train_x[index], train_y[index]``.

        Returns:
            x (B, *event) float32 and y (B,) int64, or None where the data has no labels.
        """
        x = self.preparation.apply(self.train_x[index], self.scaling, generator)
        return x, None if self.train_y is None else self.train_y[index]

    def require_labels(self, purpose: str) -> int:
        """The number of classes.

        Raises:
            ValueError: the data has no labels; the message says that `purpose` needs them.
        """
        if self.train_y is None or self.num_classes is None:
            raise ValueError(
                f"{purpose} needs labels, and data {self.name!r} has none; sort images into one "
                "sub-folder per class, give labels (a .npy file <stem>_labels.npy beside the "
                "array, or labels=), or train an unconditional model"
            )
        return self.num_classes

    def digest(self) -> str:
        """SHA-256 of what is trained on: the training samples and their preparation."""
        content = samples.content_digest(self.train_x)
        if self.preparation == Preparation():
            return content
        return hashlib.sha256(f"{content} {self.preparation}".encode()).hexdigest()

    def rescaled(self, scaling: Scaling) -> Dataset:
        """The same raw values under another scaling, without preparation."""

        def convert(x: Samples) -> Samples:
            if isinstance(x, StoredSamples):
                return x.rescaled(scaling)
            return scaling.to_model(self.scaling.to_raw(samples.as_tensor(x)))

        return replace(
            self,
            train_x=convert(self.train_x),
            test_x=convert(self.test_x),
            scaling=scaling,
            preparation=Preparation(dequantise=scaling.dequantised),
        )

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
            preparation=self.preparation,
            skipped=self.skipped,
            options=self.options,
        )
