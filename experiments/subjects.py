"""What is sampled, by the options that name it: exact targets and trained models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.extractors import make_extractor
from experiments.own_models import any_model, is_own
from experiments.real_data import given_data, real_data
from experiments.subject_kinds import (
    ALL_MODEL_METRICS,
    DIGITS,
    MODEL_METRICS,
    ExactSubject,
    ModelSubject,
    Subject,
    target_names,
)
from sde_diffusion import (
    SDE,
    SDES,
)
from sde_diffusion.checkpoints import (
    CheckpointError,
    LoadedModel,
    load_model,
    shipped_models,
)
from sde_diffusion.data import DataDescription
from sde_diffusion.errors import unknown_name

__all__ = [
    "ALL_MODEL_METRICS",
    "DIGITS",
    "MODEL_METRICS",
    "ExactSubject",
    "ModelSubject",
    "Subject",
    "SubjectOptions",
    "make_subjects",
    "same_data",
    "sde_name",
    "target_names",
]


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
