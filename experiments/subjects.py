"""What is sampled: exact targets by name and trained models by folder, with their scores."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from experiments.conditions import ALL, Condition
from experiments.draw import ScoreOf
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
    MODEL_FILE,
    CheckpointError,
    LoadedModel,
    load_model,
    shipped_models,
)
from sde_diffusion.data import Dataset, load_data
from sde_diffusion.errors import unknown_name
from sde_diffusion.named_targets import EMPIRICAL
from sde_diffusion.storage import read_json

DIGITS = "digits"


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
    """

    suggested = 256

    def __init__(
        self, name: str, models: Mapping[str, LoadedModel], judge: LoadedModel, data: Dataset | None
    ) -> None:
        self.name = name
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

    def to(self, device: torch.device) -> None:
        for model in self.models.values():
            model.to(device)

    def identity(self, sde: str) -> dict[str, Any]:
        model = self.models[sde]
        data = self.data
        return {
            "model": read_json(model.path / MODEL_FILE)["files"],
            "judge": read_json(self.judge.path / MODEL_FILE)["files"],
            "sde": model.sde.config(),
            "data": None if data is None else data.digest(),
        }


@dataclass(frozen=True)
class SubjectOptions:
    """What the options --target, --model, --sde and --data say."""

    targets: Sequence[str] = ()
    models: Sequence[str] = ()
    sdes: Sequence[str] = ()
    data: str | None = None


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
    subjects: list[Subject] = []
    for name in dict.fromkeys(options.targets):
        if name == DIGITS:
            subjects.append(_digits(sdes, options.data))
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


def _digits(sdes: Sequence[str], data: str | None) -> ModelSubject:
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
    return ModelSubject(DIGITS, models, judge, _real_data(judge, data))


def _from_folder(
    folder: str, options: SubjectOptions, judges: list[LoadedModel], taken: Sequence[str]
) -> ModelSubject:
    try:
        model = load_model(folder)
    except CheckpointError as error:
        raise ValueError(f"--model: {error}") from None
    sde = sde_name(model.sde)
    if options.sdes and sde not in options.sdes:
        raise ValueError(
            f"--model {folder!r} was trained under {sde}, and --sde asks for "
            f"{', '.join(options.sdes)}; leave --sde out, or train a model under it"
        )
    name = Path(folder).expanduser().resolve().name
    while name in taken:
        name += "'"
    same = [j for j in judges if _same_data(j, model)]
    judge = same[0] if same else model
    judges.append(model)
    return ModelSubject(name, {sde: model}, judge, _real_data(judge, options.data))


def _same_data(a: LoadedModel, b: LoadedModel) -> bool:
    return (a.data.name, a.event_shape, a.data.scaling) == (
        b.data.name,
        b.event_shape,
        b.data.scaling,
    )


def _real_data(model: LoadedModel, source: str | None) -> Dataset | None:
    """Real data in the model's own scaling: what --data names, else what it was trained on."""
    if source is None:
        try:
            data = load_data(model.data.name, **model.data.options)
        except (ValueError, TypeError):  # moved since; the moments in the folder remain
            return None
        return data if data.describe().scaling == model.data.scaling else None
    try:
        data = load_data(source)
    except ValueError as error:
        raise ValueError(f"--data: {error}") from None
    if data.event_shape != model.event_shape:
        raise ValueError(
            f"--data {source!r} holds samples of shape {data.event_shape}, and the model "
            f"{str(model.path)!r} makes {model.event_shape}; give data of the model's shape"
        )
    if data.num_classes is not None and model.num_classes not in (None, data.num_classes):
        raise ValueError(
            f"--data {source!r} has {data.num_classes} classes, and the model "
            f"{str(model.path)!r} {model.num_classes}; give data with the model's classes"
        )

    return data.rescaled(model.data.scaling)


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
