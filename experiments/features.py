"""A judge's feature space: Fréchet distance to real data, label accuracy, and their floor."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from experiments.conditions import ALL
from experiments.feature_metrics import NEIGHBOUR_METRICS, Neighbourhoods, kernel_distance
from experiments.metrics import frechet_from_moments, label_accuracy
from sde_diffusion.checkpoints import FeatureStatistics, LoadedModel
from sde_diffusion.data import Dataset
from sde_diffusion.networks import JudgeNet
from sde_diffusion.samples import StoredSamples

_CHUNK = 1024
Which = int | Literal["all"] | None


class FeatureSpace:
    """What a judge sees of samples, and of real data beside them.

    The reference is the training data: all of it; of one class; or, for samples whose labels go
    through all classes in turn, the classes in equal parts. Without the data itself, the moments
    that the model folder keeps stand for all of it.

    Args:
        model: whose judge it is.
        data: real data in the judge's scaling, or None.
        metrics: which; all but Fréchet and accuracy need the data.
    """

    def __init__(
        self,
        model: LoadedModel,
        data: Dataset | None,
        metrics: Sequence[str] = ("frechet", "accuracy"),
    ) -> None:
        self.metrics = tuple(metrics)
        self._judge = copy.deepcopy(model.judge).cpu()
        self._model = model
        self._data = data
        self._moments: dict[Which, tuple[Tensor, Tensor]] = {}
        self._kept: dict[tuple[Which, int], tuple[Tensor, Neighbourhoods | None]] = {}

    @property
    def can_classify(self) -> bool:
        return isinstance(self._judge, JudgeNet)

    def evaluate(self, x: Tensor, label: Which, labels: Tensor | None) -> dict[str, float]:
        """Every metric of samples (N, *event), N >= 2, ``labels`` (N,) being those asked for."""
        found: dict[str, float] = {}
        if "frechet" in self.metrics:
            found["frechet"] = self.distance(x, label)
        beyond = [name for name in self.metrics if name in NEIGHBOUR_METRICS]
        if beyond or "kid" in self.metrics:
            features = self._features(x.float())
            real, neighbourhoods = self._real(label, len(x))
            if "kid" in self.metrics:
                found["kid"] = kernel_distance(features, real)
            if neighbourhoods is not None:
                found |= neighbourhoods.compare(features, beyond)
        if "accuracy" in self.metrics and labels is not None and self.can_classify:
            found["accuracy"] = self.accuracy(x, labels)
        return found

    def distance(self, x: Tensor, label: Which) -> float:
        """Fréchet distance of samples (N, *event), N >= 2, from real data."""
        found = FeatureStatistics.of(self._judge, x.float())
        return frechet_from_moments(found.mean, found.covariance, *self._reference(label))

    @torch.no_grad()
    def accuracy(self, x: Tensor, labels: Tensor) -> float:
        """Share of samples (N, *event) that the judge takes for their label."""
        return label_accuracy(self.logits(x), labels)

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """The judge's logits (N, C) of samples (N, *event)."""
        logits: Tensor = self._judge(x.float())
        return logits

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """The judge's features (N, F) of samples (N, *event)."""
        return self._judge.features(x.float())

    def floor(self, samples: int, repeat: int, label: Which) -> dict[str, float]:
        """What a block of ``samples`` held-out real samples scores, the ``repeat``-th one.

        Held-out data serves no two blocks; where there is less than one block of it, all of it is
        one, and its size is the smaller one. Empty where the data is not at hand or used up.
        """
        if self._data is None:
            stored = self._model.reference
            if label is not None or "test" not in stored or repeat:
                return {}
            train, test = stored["train"], stored["test"]
            if "frechet" not in self.metrics:
                return {}
            value = frechet_from_moments(test.mean, test.covariance, train.mean, train.covariance)
            return {"frechet": value}
        order = self._held_out(label)
        size = min(samples, len(order))
        block = order[repeat * size : (repeat + 1) * size]
        if size < 2 or len(block) < size:
            return {}
        x, y = self._data.test_x, self._data.test_y
        return self.evaluate(x[block], label, None if label is None or y is None else y[block])

    def floor_size(self, samples: int, label: Which) -> int:
        """Samples in a block of the floor."""
        if self._data is None:
            return self._model.data.test_size
        return min(samples, len(self._held_out(label)))

    def real_samples(self, label: Which, size: int | None = None, repeat: int = 0) -> Tensor | None:
        """A block of held-out real samples, of which no more is read than is asked for.

        Args:
            size: of a block; where there is less, or with None, all of it is one.
            repeat: which block; after the last comes the first again.
        """
        if self._data is None:
            return None
        order = self._held_out(label)
        size = len(order) if size is None else min(size, len(order))
        blocks = order[: len(order) // max(1, size) * size].split(max(1, size))
        return self._data.test_x[blocks[repeat % len(blocks)]]

    def _held_out(self, label: Which) -> Tensor:
        """Indices of held-out samples in the order in which blocks are filled."""
        data = self._data
        if data is None:
            return torch.empty(0, dtype=torch.long)
        return _order(len(data.test_x), data.test_y, label, data.num_classes or 0)

    def _real(self, label: Which, count: int) -> tuple[Tensor, Neighbourhoods | None]:
        """Features of as many training samples, where there are as many: nearest neighbours are
        nearer in larger sets."""
        if (label, count) not in self._kept:
            data = self._data
            if data is None:
                raise ValueError("metrics beyond the moments need real samples, given by --data")
            x, y = data.train_x, data.train_y
            rows = _order(len(x), y, label, data.num_classes or 0)[:count]
            real = torch.cat([self._features(x[part]) for part in rows.split(_CHUNK)])
            wanted = any(name in NEIGHBOUR_METRICS for name in self.metrics)
            self._kept[label, count] = real, Neighbourhoods(real) if wanted else None
        return self._kept[label, count]

    @torch.no_grad()
    def _features(self, x: Tensor) -> Tensor:
        return torch.cat([self._judge.features(part) for part in x.split(_CHUNK)])

    def _reference(self, label: Which) -> tuple[Tensor, Tensor]:
        if label not in self._moments:
            self._moments[label] = self._fit(label)
        return self._moments[label]

    def _fit(self, label: Which) -> tuple[Tensor, Tensor]:
        data = self._data
        if data is None or (label is not None and data.train_y is None):
            stored = self._model.reference["train"]
            return stored.mean, stored.covariance
        if label is None:
            return _pair(FeatureStatistics.of(self._judge, data.train_x))
        if label != ALL:
            return _pair(FeatureStatistics.of(self._judge, _of_class(data, label)))
        parts = [
            FeatureStatistics.of(self._judge, _of_class(data, c))
            for c in range(data.num_classes or 0)
        ]
        means = torch.stack([part.mean for part in parts])
        mean = means.mean(0)
        within = torch.stack([part.covariance for part in parts]).mean(0)
        return mean, within + (means - mean).T @ (means - mean) / len(parts)


def _order(size: int, labels: Tensor | None, label: Which, classes: int) -> Tensor:
    """Indices of samples of a label, in an order of chance that is always the same."""
    shuffled = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    if labels is None or label is None:
        return shuffled
    if label != ALL:
        return shuffled[labels[shuffled] == label]
    # Class after class, as the labels of the samples go, as far as the rarest class reaches.
    of_class = [shuffled[labels[shuffled] == c] for c in range(classes)]
    least = min(map(len, of_class))
    return torch.stack([c[:least] for c in of_class], 1).flatten()


def _of_class(data: Dataset, label: int | str) -> StoredSamples | Tensor:
    """The training samples of one class, not read yet where they are stored."""
    rows = torch.arange(len(data.train_x))[data.train_y == label]
    x = data.train_x
    return x.at(rows) if isinstance(x, StoredSamples) else x[rows]


def _pair(moments: FeatureStatistics) -> tuple[Tensor, Tensor]:
    return moments.mean, moments.covariance
