"""What is sampled: exact targets by name and trained models by folder, with their scores."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from experiments.conditions import ALL, Condition
from experiments.draw import ScoreOf
from experiments.extractors import FORMS, make_extractor
from experiments.feature_metrics import FEATURE_METRICS
from experiments.own_models import OwnModel, any_model, identity_of, is_own
from experiments.real_data import given_data, real_data
from sde_diffusion import (
    SDE,
    SDES,
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
    CheckpointError,
    LoadedModel,
    load_model,
    shipped_models,
)
from sde_diffusion.data import DataDescription, Dataset
from sde_diffusion.errors import unknown_name
from sde_diffusion.named_targets import EMPIRICAL

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

    @abstractmethod
    def identity(self, sde: str) -> dict[str, Any]:
        """JSON-like values by which this, under an SDE, is known from all others."""

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
        target, process = self.target, self.sdes[sde]

        def score(ids: Tensor) -> Any:
            label = condition.labels(ids, self.num_classes)
            if label is None or condition.guidance == "none":
                return target.score_fn(process, label)
            if condition.guidance == "cfg":
                return classifier_free_guided(
                    target.model(process), label, condition.scale or 0.0, condition.interval
                )
            return classifier_guided(
                target.score_fn(process), target.classifier(process), label, condition.weight
            )

        return score

    def to(self, device: torch.device) -> None:
        """Nothing to do: a mixture follows its inputs."""

    def identity(self, sde: str) -> dict[str, Any]:
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

        def score(ids: Tensor) -> Any:
            label = condition.labels(ids, self.num_classes)
            if label is None or condition.guidance == "none":
                return bind(model.model, label)
            if condition.guidance == "cfg":
                return classifier_free_guided(
                    model.model, label, condition.scale or 0.0, condition.interval
                )
            classifier: Any = model.classifier
            return classifier_guided(bind(model.model, None), classifier, label, condition.weight)

        return score

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

    def identity(self, sde: str) -> dict[str, Any]:
        model = self.models[sde]
        data = self.data
        known = {
            "model": identity_of(model),
            "judge": self._features or identity_of(self.judge),
            "sde": model.sde.config(),
            "data": None if data is None else data.digest(),
        }
        return known if self.metrics == MODEL_METRICS else known | {"metrics": self.metrics}


@dataclass(frozen=True)
class SubjectOptions:
    """What the options --target, --model, --sde, --data, --features and --metrics say."""

    targets: Sequence[str] = ()
    models: Sequence[str] = ()
    sdes: Sequence[str] = ()
    data: str | None = None
    features: str | None = None
    metrics: Sequence[str] = ()


def make_subjects(options: SubjectOptions) -> list[Subject]:
    """The subjects of a run, all that can be wrong with them found out.

    Raises:
        ValueError: unknown names, missing or corrupt model folders, data that does not fit.
    """
    for name in options.sdes:
        if name not in SDES:
            raise unknown_name("--sde", name, SDES)
    sdes = list(dict.fromkeys(options.sdes)) or ["vp", "ve"]
    if options.data is not None and not (options.models or DIGITS in options.targets):
        raise ValueError("--data is compared with a model's samples: name the model with --model")
    if (options.features or options.metrics) and not (options.models or DIGITS in options.targets):
        raise ValueError(
            "--features and --metrics are for networks, and an exact target has exact distances; "
            "leave them out, or name a model with --model"
        )
    for name in options.metrics:
        if name not in ALL_MODEL_METRICS:
            raise unknown_name("--metrics", name, ALL_MODEL_METRICS)
    subjects: list[Subject] = []
    for name in dict.fromkeys(options.targets):
        if name == DIGITS:
            subjects.append(_digits(sdes, options))
        else:
            exact = ExactSubject(name, sdes)
            while exact.name in [other.name for other in subjects]:
                exact.name += "'"
            subjects.append(exact)
    judges: list[LoadedModel] = []
    names = [subject.name for subject in subjects]
    for folder in dict.fromkeys(options.models):
        subject = _from_folder(folder, options, judges, names)
        names.append(subject.name)
        subjects.append(subject)
    return subjects


def target_names() -> tuple[str, ...]:
    """Every name that --target takes, besides ``empirical:DATA`` and TOML files."""
    return tuple(sorted([*TARGETS, DIGITS]))


def sde_name(sde: SDE) -> str:
    """The name of an SDE's kind, as --sde takes it."""
    for name, kind in SDES.items():
        if type(sde) is kind:
            return name
    return type(sde).__name__.removesuffix("SDE").lower()


def _digits(sdes: Sequence[str], options: SubjectOptions) -> ModelSubject:
    shipped = [name for name in shipped_models() if name.startswith(f"{DIGITS}-")]
    there = {name.removeprefix(f"{DIGITS}-"): name for name in shipped}
    for sde in sdes:
        if sde not in there:
            known = f"only for {', '.join(sorted(there))}" if there else "not at all"
            raise ValueError(
                f"--target digits has shipped networks {known}, not for --sde {sde}; train one: "
                f"sde-diffusion train digits --sde {sde} --out runs/digits-{sde}, and use it: "
                f"--model runs/digits-{sde}"
            )
    models = {sde: load_model(there[sde]) for sde in sdes}
    # Always the same judge, so that figures from different runs can be compared.
    judge = load_model(there["vp"] if "vp" in there else sorted(there.values())[0])
    return _subject(DIGITS, models, judge, options)


def _from_folder(
    folder: str, options: SubjectOptions, judges: list[LoadedModel], taken: Sequence[str]
) -> ModelSubject:
    try:
        model = any_model(folder, given_data(options.data) if is_own(folder) else None)
    except CheckpointError as error:
        raise ValueError(f"--model: {error}") from None
    sde = sde_name(model.sde)
    if options.sdes and sde not in options.sdes:
        raise ValueError(
            f"--model {folder!r} was trained under {sde}, and --sde asks for "
            f"{', '.join(options.sdes)}; leave --sde out, or train a model under it"
        )
    name = folder
    if Path(folder).expanduser().exists() or not is_own(folder):
        name = Path(folder).expanduser().resolve().name
    while name in taken:
        name += "'"
    same = [j for j in judges if same_data(j.data, model.data)]
    judge = same[0] if same else model
    judges.append(model)
    return _subject(name, {sde: model}, judge, options)


def _subject(
    name: str, models: Mapping[str, LoadedModel], judge: LoadedModel, options: SubjectOptions
) -> ModelSubject:
    """The subject, with the judge's features or those asked for."""
    data = real_data(judge, options.data)
    metrics = tuple(dict.fromkeys(options.metrics)) or MODEL_METRICS
    beyond = [metric for metric in metrics if metric not in MODEL_METRICS]
    if data is None and (beyond or options.features):
        what = f"--metrics {beyond[0]}" if beyond else f"--features {options.features}"
        raise ValueError(f"{what} needs real samples, and {name!r} has none at hand: give --data")
    if "accuracy" in options.metrics and (options.features or not judge.num_classes):
        raise ValueError(
            f"--metrics accuracy needs a judge that knows classes, and that of {name!r} has none "
            "with these options; leave accuracy or --features out"
        )
    if options.features is None or data is None:
        return ModelSubject(name, models, judge, data, metrics)
    extractor, known = make_extractor(options.features, judge.event_shape, data)
    judge = replace(judge, judge=extractor, reference={})  # type: ignore[arg-type]
    return ModelSubject(name, models, judge, data, metrics, known)


def same_data(a: DataDescription, b: DataDescription) -> bool:
    """Whether two models were trained on the same data in the same scaling."""
    return (a.name, a.event_shape, a.scaling) == (b.name, b.event_shape, b.scaling)


def _tensor_digest(x: Tensor) -> str:
    return hashlib.sha256(x.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


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
