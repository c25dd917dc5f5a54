"""A judge's feature space: Fréchet distance to real data, label accuracy, and their floor."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor

from experiments.conditions import ALL
from experiments.metrics import frechet_from_moments, label_accuracy
from sde_diffusion.checkpoints import FeatureStatistics, LoadedModel
from sde_diffusion.data import Dataset
from sde_diffusion.networks import JudgeNet
from sde_diffusion.samples import StoredSamples

Which = int | Literal["all"] | None


class FeatureSpace:
    """What a judge sees of samples, and of real data beside them.

    The reference is the training data: all of it; of one class; or, for samples whose labels go
    through all classes in turn, the classes in equal parts. Without the data itself, the moments
    that the model folder keeps stand for all of it.

    Args:
        model: whose judge it is.
        data: real data in the judge's scaling, or None.
    """

    def __init__(self, model: LoadedModel, data: Dataset | None) -> None:
        self._judge = copy.deepcopy(model.judge).cpu()
        self._model = model
        self._data = data
        self._moments: dict[Which, tuple[Tensor, Tensor]] = {}

    @property
    def can_classify(self) -> bool:
        return isinstance(self._judge, JudgeNet)

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
            value = frechet_from_moments(test.mean, test.covariance, train.mean, train.covariance)
            return {"frechet": value}
        order = self._held_out(label)
        size = min(samples, len(order))
        block = order[repeat * size : (repeat + 1) * size]
        if size < 2 or len(block) < size:
            return {}
        x, y = self._data.test_x, self._data.test_y
        found = {"frechet": self.distance(x[block], label)}
        if label is not None and y is not None and self.can_classify:
            found["accuracy"] = self.accuracy(x[block], y[block])
        return found

    def floor_size(self, samples: int, label: Which) -> int:
        """Samples in a block of the floor."""
        if self._data is None:
            return self._model.data.test_size
        return min(samples, len(self._held_out(label)))

    def real_samples(self, label: Which) -> Tensor | None:
        """Held-out real samples, for pictures."""
        return None if self._data is None else self._data.test_x[self._held_out(label)]

    def _held_out(self, label: Which) -> Tensor:
        """Indices of held-out samples in the order in which blocks are filled."""
        data = self._data
        if data is None:
            return torch.empty(0, dtype=torch.long)
        shuffled = torch.randperm(len(data.test_x), generator=torch.Generator().manual_seed(0))
        if data.test_y is None or label is None:
            return shuffled
        if label != ALL:
            return shuffled[data.test_y[shuffled] == label]
        # Class after class, as the labels of the samples go, as far as the rarest class reaches.
        classes = [shuffled[data.test_y[shuffled] == c] for c in range(data.num_classes or 0)]
        least = min(map(len, classes))
        return torch.stack([c[:least] for c in classes], 1).flatten()

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


def _of_class(data: Dataset, label: int | str) -> StoredSamples | Tensor:
    """The training samples of one class, not read yet where they are stored."""
    rows = torch.arange(len(data.train_x))[data.train_y == label]
    x = data.train_x
    return x.at(rows) if isinstance(x, StoredSamples) else x[rows]


def _pair(moments: FeatureStatistics) -> tuple[Tensor, Tensor]:
    return moments.mean, moments.covariance
