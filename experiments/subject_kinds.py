"""What is sampled: exact targets and trained models, with their scores."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from experiments.conditions import ALL, Condition
from experiments.draw import ScoreOf
from experiments.extractors import FORMS
from experiments.feature_metrics import FEATURE_METRICS
from experiments.own_models import OwnModel, identity_of
from sde_diffusion import (
    SDE,
    TARGETS,
    GaussianMixture,
    bind,
    classifier_free_guided,
    classifier_guided,
    load_target,
    named_sde,
    named_target,
)
from sde_diffusion.checkpoints import (
    LoadedModel,
)
from sde_diffusion.data import Dataset
from sde_diffusion.errors import unknown_name
from sde_diffusion.named_targets import EMPIRICAL
from sde_diffusion.prediction import ScoreFn

DIGITS = "digits"
MODEL_METRICS = ("frechet", "accuracy")
ALL_MODEL_METRICS = (*MODEL_METRICS, *FEATURE_METRICS)


class Subject(ABC):
    """Something to sample, under one or several SDEs.

    Attributes:
        name: as rows and pictures call it.
        sdes: SDE name -> SDE.
        event_shape: shape of one sample.
        num_classes: number of classes, or None.
        suggested: samples in one chunk.
    """

    name: str
    sdes: Mapping[str, SDE]
    event_shape: tuple[int, ...]
    num_classes: int | None
    suggested: int

    @property
    def unguided(self) -> Literal["all"] | None:
        """Labels of samples where neither a label nor guidance is asked for."""
        return None

    @abstractmethod
    def score_of(self, sde: str, condition: Condition) -> ScoreOf:
        """The score functions of batches under an SDE, guided as the condition says."""

    @abstractmethod
    def to(self, device: torch.device) -> None:
        """Move what computes the score."""

    def identity(self, sde: str) -> dict[str, Any]:
        """JSON-like values by which this, under an SDE, is known from all others.

        Worked out once: every cell's key asks for it, and it may read all of a data set.
        """
        known: dict[str, dict[str, Any]] = self.__dict__.setdefault("_identities", {})
        if sde not in known:
            known[sde] = self._identity(sde)
        return known[sde]

    @abstractmethod
    def _identity(self, sde: str) -> dict[str, Any]:
        """What `identity` gives."""

    def check(self, condition: Condition) -> None:
        """Whether this can be guided so.

        Raises:
            ValueError: no classes, a label out of range, or no classifier.
        """
        classes = self.num_classes
        if condition.label is None:
            return
        if classes is None or (classes < 2 and condition.guidance != "none"):
            option = f"--guidance {condition.guidance}"
            if condition.guidance == "none":
                option = f"--label {condition.label}"
            what = "is not class-conditional" if classes is None else "has a single class"
            raise ValueError(
                f"{option} needs classes, and {self.name!r} {what}; leave the option out, or train "
                "a conditional model on labelled data"
            )
        if condition.label != ALL and not 0 <= int(condition.label) < classes:
            raise ValueError(
                f"--label must lie in 0..{classes - 1} for {self.name!r} ({classes} classes), or "
                f"be 'all', got {condition.label}"
            )


class ExactSubject(Subject):
    """A Gaussian mixture, whose scores, classes and samples are exact.

    Args:
        source: a name, ``empirical:DATA``, or a TOML file, whose stem is the name.
    """

    suggested = 4096

    def __init__(self, source: str, sdes: Sequence[str]) -> None:
        self.name, self.target = _exact_target(source)
        self.sdes = {sde: named_sde(sde) for sde in sdes}
        self.event_shape = self.target.event_shape
        self.num_classes = self.target.num_classes

    def score_of(self, sde: str, condition: Condition) -> ScoreOf:
        return exact_score(self.target, self.sdes[sde], condition)

    def to(self, device: torch.device) -> None:
        """Nothing to do: a mixture follows its inputs."""

    def _identity(self, sde: str) -> dict[str, Any]:
        target = self.target
        parts = (target.means, target.variances, target.rotation, target.weights, target.labels)
        shape = list(self.event_shape) if len(self.event_shape) > 1 else None
        return {
            "target": [None if part is None else _tensor_digest(part) for part in parts],
            "sde": self.sdes[sde].config(),
            **({} if shape is None else {"event_shape": shape}),
        }


class ModelSubject(Subject):
    """Trained networks of one data set, one per SDE, and the judge that all of them share.

    Attributes:
        models: SDE name -> model.
        judge: whose feature map and classes metrics use.
        data: real data for references and floors, in the judge's scaling; None: not to be had.
        metrics: what samples are judged by, the first standing for quality.
    """

    suggested = 256

    def __init__(
        self,
        name: str,
        models: Mapping[str, LoadedModel],
        judge: LoadedModel,
        data: Dataset | None,
        metrics: Sequence[str] = MODEL_METRICS,
        features: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.metrics = tuple(metrics)
        self._features = features
        self.models = models
        self.judge = judge
        self.data = data
        self.sdes = {sde: model.sde for sde, model in models.items()}
        self.event_shape = judge.event_shape
        self.num_classes = min(
            (m.num_classes for m in models.values() if m.num_classes), default=None
        )

    @property
    def unguided(self) -> Literal["all"] | None:
        """A class-conditional network is asked for each class in turn.

        Their proportions are then no matter of chance, which would drown a Fréchet distance
        between a few hundred samples.
        """
        return "all" if self.num_classes else None

    def score_of(self, sde: str, condition: Condition) -> ScoreOf:
        model = self.models[sde]
        return network_score(model.model, model.classifier, condition, self.num_classes)

    def check(self, condition: Condition) -> None:
        super().check(condition)
        if condition.guidance == "classifier":
            for model in self.models.values():
                if model.classifier is None:
                    raise ValueError(
                        f"--guidance classifier needs a classifier of noised inputs, and "
                        f"{str(model.path)!r} has none; train on labelled data, or use cfg"
                    )

    def check_judge(self) -> None:
        """Whether samples can be judged.

        Raises:
            ValueError: a network from elsewhere without features or real samples.
        """
        if not isinstance(self.judge, OwnModel):
            return
        missing = []
        if self._features is None:
            missing.append(f"features to compare samples in: give --features ({FORMS})")
        if self.data is None:
            missing.append("real samples to compare with: give --data")
        if missing:
            raise ValueError(f"--model {self.judge.path} has no {'; and no '.join(missing)}")

    def to(self, device: torch.device) -> None:
        for model in self.models.values():
            model.to(device)

    def _identity(self, sde: str) -> dict[str, Any]:
        model = self.models[sde]
        data = self.data
        known = {
            "model": identity_of(model),
            "judge": self._features or identity_of(self.judge),
            "sde": model.sde.config(),
            "data": None if data is None else data.digest(),
        }
        return known if self.metrics == MODEL_METRICS else known | {"metrics": self.metrics}


def exact_score(target: GaussianMixture, sde: SDE, condition: Condition) -> ScoreOf:
    """The score of a mixture, guided as the condition says, for each batch of ids."""

    def score(ids: Tensor) -> ScoreFn:
        label = condition.labels(ids, target.num_classes)
        if label is None or condition.guidance == "none":
            return target.score_fn(sde, label)
        if condition.guidance == "cfg":
            return classifier_free_guided(
                target.model(sde), label, condition.scale or 0.0, condition.interval
            )
        return classifier_guided(
            target.score_fn(sde), target.classifier(sde), label, condition.weight
        )

    return score


def network_score(
    model: Any, classifier: Any, condition: Condition, num_classes: int | None
) -> ScoreOf:
    """The score of a network, guided as the condition says, for each batch of ids.

    Args:
        model: called (x, level, label) -> Prediction.
        classifier: of noised inputs; None where the condition needs none.
        num_classes: of the classes that are asked for in turn.
    """

    def score(ids: Tensor) -> ScoreFn:
        label = condition.labels(ids, num_classes)
        if label is None or condition.guidance == "none":
            return bind(model, label)
        if condition.guidance == "cfg":
            return classifier_free_guided(model, label, condition.scale or 0.0, condition.interval)
        return classifier_guided(bind(model, None), classifier, label, condition.weight)

    return score


def _tensor_digest(x: Tensor) -> str:
    return hashlib.sha256(x.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def target_names() -> tuple[str, ...]:
    """Every name that --target takes, besides ``empirical:DATA`` and TOML files."""
    return tuple(sorted([*TARGETS, DIGITS]))


def _exact_target(source: str) -> tuple[str, GaussianMixture]:
    path = Path(source).expanduser()
    try:
        if path.suffix == ".toml":
            return path.stem, load_target(path)
        return source, named_target(source)
    except ValueError as error:
        if path.suffix == ".toml" or source.startswith(EMPIRICAL):
            raise ValueError(f"--target {source}: {error}") from None
    if path.exists():
        raise ValueError(
            f"--target {source!r} is a file or folder: a model folder is given by --model; the law "
            f"of the data itself is --target {EMPIRICAL}{source}; for a network, train one first: "
            f"sde-diffusion train {source} --out runs/mine"
        )
    raise unknown_name("--target", source, target_names())
