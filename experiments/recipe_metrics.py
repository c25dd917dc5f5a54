"""Figures of a recipe's samples: how good, whether of their class, and how various."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from experiments.conditions import ALL
from experiments.diversity import within_class_variance
from experiments.estimates import Estimate, estimate
from experiments.feature_metrics import recall
from experiments.features import FeatureSpace
from experiments.metrics import label_accuracy
from experiments.recipe_models import RecipeModels
from sde_diffusion.checkpoints import LoadedModel

__all__ = ["RecipeMetrics"]


class RecipeMetrics:
    """Metrics of samples whose labels go through all classes in turn, in blocks of equal size.

    ``frechet``: to the training data, in the judge's features. ``accuracy``: share that the judge
    takes for their label. ``own_accuracy``: the same by the classifier that guides, at its lowest
    noise. ``variance``: within classes, of pixels in the data's range, over that of the training
    data. ``recall``: share of held-out data near a sample, in the judge's features.

    Args:
        models: whose judge and data measure.
        samples: in a block.
        repeats: blocks.
    """

    def __init__(self, models: RecipeModels, samples: int, repeats: int) -> None:
        self.space = FeatureSpace(models.judge, models.data)
        self.samples, self.repeats = samples, repeats
        self._data = models.data
        y = models.data.train_y
        if y is None:
            raise ValueError("a recipe compares classes, and its data has no labels")
        self._y = y
        self._variance = within_class_variance(self._train(), y)

    def of(self, x: Tensor, labels: Tensor, model: LoadedModel) -> dict[str, Estimate]:
        """Of samples (repeats * samples, *event), block after block."""
        found: dict[str, Callable[[int, Tensor, Tensor], float]] = {
            "frechet": lambda r, b, y: self.space.distance(b, ALL),
            "accuracy": lambda r, b, y: self.space.accuracy(b, y),
            "variance": lambda r, b, y: self._spread(b, y),
            "recall": self._recall,
        }
        if model.classifier is not None:
            found["own_accuracy"] = lambda r, b, y: _own_accuracy(model, b, y)
        return self._over_blocks(found, x, labels)

    def floor(self) -> dict[str, Estimate]:
        """What held-out data scores, in blocks of the same size as far as it goes."""
        blocks = [self.space.floor(self.samples, r, ALL) for r in range(self.repeats)]
        known = [block for block in blocks if block]
        held, order = self._held_out()
        found = {name: estimate(block[name] for block in known) for name in known[0]}
        parts = self._parts(len(held))
        train = self._train()
        chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        spreads = [self._spread(held[part], order[part]) for part in parts]
        recalls = [
            recall(self.space.features(held[part]), self.space.features(train[chosen[: len(part)]]))
            for part in parts
        ]
        return {**found, "variance": estimate(spreads), "recall": estimate(recalls)}

    def _over_blocks(
        self,
        metrics: Mapping[str, Callable[[int, Tensor, Tensor], float]],
        x: Tensor,
        labels: Tensor,
    ) -> dict[str, Estimate]:
        blocks = list(zip(x.split(self.samples), labels.split(self.samples), strict=True))
        return {
            name: estimate(metric(r, *block) for r, block in enumerate(blocks))
            for name, metric in metrics.items()
        }

    def _spread(self, x: Tensor, labels: Tensor) -> float:
        return within_class_variance(x.clamp(-1.0, 1.0), labels) / self._variance

    def _recall(self, repeat: int, x: Tensor, labels: Tensor) -> float:
        held, _ = self._held_out()
        parts = self._parts(len(held))
        real = held[parts[repeat % len(parts)]]
        return recall(self.space.features(real), self.space.features(x[: len(real)]))

    def _parts(self, count: int) -> Sequence[Tensor]:
        """Indices of the blocks that held-out data has enough for; one smaller block at least."""
        size = min(self.samples, count)
        whole = torch.arange(count // size * size).split(size)
        return whole[: self.repeats]

    def _held_out(self) -> tuple[Tensor, Tensor]:
        """Held-out samples with all classes in turn, and their labels."""
        held = self.space.real_samples(ALL)
        if held is None:
            raise ValueError("a recipe needs its data at hand")
        classes = self._data.num_classes or 1
        return held, torch.arange(len(held)) % classes

    def _train(self) -> Tensor:
        x = self._data.train_x
        return x if isinstance(x, Tensor) else x[torch.arange(len(x))]


@torch.no_grad()
def _own_accuracy(model: LoadedModel, x: Tensor, labels: Tensor) -> float:
    """Share of samples that the classifier which guides takes for their label, at t_min."""
    classifier = model.classifier
    if classifier is None:
        raise ValueError("this model has no classifier of noised inputs")
    device = next(classifier.parameters()).device
    level = model.sde.at(model.sde.t_min).map(lambda value: value.to(device, x.dtype))
    return label_accuracy(classifier(x.to(device), level).cpu(), labels)
