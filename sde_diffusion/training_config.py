"""A training run as one TOML file: read, checked, completed, printed.

    [data] [sde] [network] [model] [objective] [score] [classifier] [judge] [run]

Every table may be left out, and every key in it: what is left out has a default. A key that does
not exist, or a value of the wrong type, is an error that names the nearest key and the place.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from sde_diffusion.data import HELD_OUT, SPLIT_SEED, load_data
from sde_diffusion.dataset import Dataset
from sde_diffusion.errors import unknown_name
from sde_diffusion.networks import build_network
from sde_diffusion.noise_scales import suggest_noise_scales
from sde_diffusion.parametrization import EDMModel
from sde_diffusion.schedules import SDES, LinearChain
from sde_diffusion.sde import SDE
from sde_diffusion.stage_settings import StageSettings
from sde_diffusion.toml_files import (
    first_complaint,
    parse_toml,
    read_text,
    toml_value,
    validated,
)
from sde_diffusion.training_settings import RunOptions, TrainSettings
from sde_diffusion.training_tasks import CLASSIFIER, JUDGE, SCORE, Tasks

__all__ = [
    "DataTable",
    "ModelTable",
    "RunTable",
    "TrainConfig",
    "completed",
    "noise_scales_chosen",
    "overlaid",
    "override",
    "parse_config",
    "read_config",
    "to_toml",
]

AUTO = "auto"
_DEFAULTS, _RUN = TrainSettings(), RunOptions()


@dataclass(frozen=True)
class DataTable:
    """``[data]``: what is learned; the keys are `load_data`'s arguments."""

    source: str = "digits"
    labels: str | None = None
    test_fraction: float = HELD_OUT
    split_seed: int = SPLIT_SEED
    size: int | tuple[int, int] | None = None
    dequantise: bool = False
    flip: bool = False
    on_unreadable: str = "error"
    cache: bool | None = None
    image_column: str | None = None
    label_column: str | None = None
    split: str | None = None

    def load(self) -> Dataset:
        """The data set; raises as `load_data` does."""
        given = asdict(self)
        return load_data(given.pop("source"), seed=given.pop("split_seed"), **given)


@dataclass(frozen=True)
class ModelTable:
    """``[model]``: the form of the score network; the keys are those of `TrainSettings`."""

    parametrization: str | None = None
    sigma_data: float | None = None
    time_label: str | None = None
    conditional: bool | None = None
    p_uncond: float = _DEFAULTS.p_uncond
    with_classifier: bool | None = None
    judge_noise: float = _DEFAULTS.judge_noise


@dataclass(frozen=True)
class RunTable:
    """``[run]``: seed and folder, and the keys of `RunOptions`."""

    seed: int = 0
    out: str | None = None
    device: str = _RUN.device
    mixed_precision: str = "no"
    accumulate: int = 1
    compile: bool = _RUN.compile
    checkpoint_every: int = _RUN.checkpoint_every
    keep_last: int = _RUN.keep_last
    validate_every: int = _RUN.validate_every
    validation_buckets: int = _RUN.validation_buckets
    validation_samples: int = _RUN.validation_samples
    samples_every: int = _RUN.samples_every
    log_every: int = _RUN.log_every
    trackers: tuple[str, ...] = _RUN.trackers


@dataclass(frozen=True)
class TrainConfig:
    """A whole training run. Free tables: ``sde`` and ``network`` have a ``kind``, ``objective`` a
    ``name``, and the settings of what they name."""

    data: DataTable = DataTable()
    sde: dict[str, Any] = field(default_factory=lambda: {"kind": "vp"})
    network: dict[str, Any] = field(default_factory=dict)
    model: ModelTable = ModelTable()
    objective: dict[str, Any] = field(default_factory=dict)
    score: StageSettings = _DEFAULTS.score
    classifier: StageSettings = _DEFAULTS.classifier
    classifier_network: dict[str, Any] = field(default_factory=dict)
    judge: StageSettings = _DEFAULTS.judge
    judge_network: dict[str, Any] = field(default_factory=dict)
    run: RunTable = RunTable()

    def settings(self) -> TrainSettings:
        """What `train` takes as `settings`."""
        objective = dict(self.objective)
        return TrainSettings(
            score=self.score,
            classifier=self.classifier,
            judge=self.judge,
            network=self.network or None,
            classifier_network=self.classifier_network or None,
            judge_network=self.judge_network or None,
            objective=objective.pop("name", None),
            objective_settings=objective,
            mixed_precision=self.run.mixed_precision,
            accumulate=self.run.accumulate,
            **asdict(self.model),
        )

    def options(self) -> RunOptions:
        """What `train` takes as `options`; the config itself is stored with the model."""
        names = [f.name for f in fields(RunOptions) if f.name != "config"]
        return RunOptions(**{name: getattr(self.run, name) for name in names}, config=to_toml(self))

    def with_steps(self, steps: int) -> TrainConfig:
        """The same with `steps` for the score network and the others in proportion."""
        scaled = self.settings().with_steps(steps)
        return replace(self, score=scaled.score, classifier=scaled.classifier, judge=scaled.judge)

    def check_sde(self) -> None:
        """Raise as `make_sde` does, before any data is read."""
        if self.sde.get("sigma_max") != AUTO:
            self.make_sde()
            return
        replace(self, sde=_without(self.sde, "sigma_max")).make_sde()
        if not hasattr(SDES.get(self.sde["kind"]), "sigma_max"):
            raise ValueError(
                f"[sde] sigma_max is no key of kind {self.sde['kind']!r}; use ve or edm"
            )

    def make_sde(self) -> SDE:
        """The SDE of ``[sde]``.

        Raises:
            ValueError: an unknown kind or setting (the nearest is named), or a value out of range.
        """
        settings = dict(self.sde)
        kind = settings.pop("kind", None)
        if kind == "ddpm":
            chain = _filled(LinearChain(), settings, "[sde]")
            return chain.sde()
        if kind not in SDES:
            raise unknown_name("[sde] kind", kind, [*SDES, "ddpm"])
        return _filled(SDES[kind](), settings, "[sde]")


def read_config(path: str | Path) -> TrainConfig:
    """Read a TOML file.

    Raises:
        ValueError: it cannot be read, is not TOML, or has keys or values that do not fit; the
            message names the file and the key.
    """
    return parse_config(read_text(path, "config"), str(path))


def parse_config(text: str, where: str) -> TrainConfig:
    """The config in a text; `where` is its name in messages. Raises as `read_config` does."""
    return overlaid(TrainConfig(), parse_toml(text, where), where)


def overlaid(config: TrainConfig, values: Mapping[str, Any], where: str) -> TrainConfig:
    """The config with the tables and keys of `values` put over its own. Raises as `read_config`
    does; `where` is what its messages name."""
    return _checked(_overlaid(_plain(config), values, where), where)


def override(config: TrainConfig, assignment: str, where: str = "--set") -> TrainConfig:
    """The config with one value replaced, given as ``table.key=value``, the value in TOML.

    A value that is not TOML is taken as text, so that quotes may be left out.

    Raises:
        ValueError: no such table or key, or a value of the wrong type.
    """
    path, equals, text = assignment.partition("=")
    keys = path.strip().split(".")
    if not equals or len(keys) < 2 or not all(keys):
        raise ValueError(
            f"{where} takes table.key=value, as in score.steps=100; got {assignment!r}"
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    for key in reversed(keys):
        value = {key: value}
    return overlaid(config, value, f"{where} {assignment}")


def noise_scales_chosen(config: TrainConfig, data: Dataset) -> tuple[TrainConfig, str]:
    """The config with ``sigma_max = "auto"`` replaced by what the data asks for, and how it follows
    (empty where nothing was asked for)."""
    if config.sde.get("sigma_max") != AUTO:
        return config, ""
    smallest = {key: value for key, value in config.sde.items() if key == "sigma_min"}
    scales = suggest_noise_scales(data.train_x, **smallest)
    objective = dict(config.objective)
    if objective.get("name") == "ncsn":
        objective = {"levels": scales.levels} | objective
    sde = {**config.sde, "sigma_min": scales.sigma_min, "sigma_max": scales.sigma_max}
    return replace(config, sde=sde, objective=objective), scales.explain()


def completed(config: TrainConfig, data: Dataset) -> TrainConfig:
    """The config with all that was left open filled in, as it will be for this data.

    Raises:
        ValueError: settings that fit neither the data nor each other.
    """
    sde = config.make_sde()
    tasks = Tasks(data, sde, config.settings(), config.run.seed)
    model = tasks.model(tasks.network(SCORE))
    objective = {"name": tasks.objective_name(), **config.objective}
    if not config.objective and isinstance(model, EDMModel):
        mean, std = tasks.log_sigma()
        objective |= {"mean": mean, "std": std}
    classified = data.num_classes is not None and config.model.with_classifier is not False
    kind = config.sde["kind"]
    schedule = (
        asdict(_filled(LinearChain(), _without(config.sde, "kind"), "[sde]"))
        if (kind == "ddpm")
        else _without(sde.config(), "kind")
    )
    changes: dict[str, Any] = {
        "sde": {"kind": kind, **schedule},
        "network": _network(tasks, SCORE),
        "model": replace(
            config.model,
            parametrization=tasks.parametrization(),
            sigma_data=model.sigma_data if isinstance(model, EDMModel) else None,
            conditional=tasks.classes is not None,
            with_classifier=classified,
        ),
        "objective": objective,
    }
    if data.num_classes is not None:
        changes["judge_network"] = _network(tasks, JUDGE)
        if classified:
            changes["classifier_network"] = _network(tasks, CLASSIFIER)
    return replace(config, **changes)


def _network(tasks: Tasks, stage: str) -> dict[str, Any]:
    config = tasks.config(stage)
    with torch.device("meta"):
        full: dict[str, Any] = build_network(config).config()  # type: ignore[operator]
    kept = {key: value for key, value in full.items() if value is not None}
    return {"kind": config["kind"], **_without(kept, "kind", "event_shape", "num_classes")}


def _without(values: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


def _plain(config: TrainConfig) -> dict[str, Any]:
    return asdict(config)


def _overlaid(base: dict[str, Any], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`values` over `base`, every key of which must exist, but in free tables."""
    out = dict(base)
    for table, entries in values.items():
        if table not in base:
            raise _unknown(where, "table", table, base)
        if not isinstance(entries, Mapping):
            raise ValueError(f"{where}: [{table}] must be a table of keys, got {entries!r}")
        given = {f.name: f for f in fields(TrainConfig)}[table].default
        if is_dataclass(given):
            for key in entries:
                if key not in base[table]:
                    raise _unknown(where, f"key in [{table}]", key, base[table])
        kind = {"sde": "kind", "network": "kind", "objective": "name"}.get(table)
        changed = kind in entries and base[table].get(kind) != entries[kind]
        out[table] = dict(entries) if changed else {**base[table], **entries}
    return out


def _unknown(where: str, what: str, name: str, known: Mapping[str, Any]) -> ValueError:
    return ValueError(f"{where}: {unknown_name(what, name, known)}")


def _checked(values: dict[str, Any], where: str) -> TrainConfig:
    try:
        config: TrainConfig = validated(TrainConfig, values)
        config.settings(), config.options()  # their own checks
    except ValidationError as error:
        raise ValueError(f"{where}: {first_complaint(error)}") from None
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from None
    if "kind" not in config.sde:
        raise ValueError(f"{where}: [sde] needs a kind, one of {', '.join([*SDES, 'ddpm'])}")
    return config


def _filled(default: Any, settings: Mapping[str, Any], where: str) -> Any:
    """A dataclass with some fields replaced, names and types checked."""
    names = [f.name for f in fields(default) if f.init]
    for key in settings:
        if key not in names:
            raise unknown_name(f"key in {where}", key, names)
    try:
        return validated(type(default), {**asdict(default), **settings})
    except ValidationError as error:
        raise ValueError(f"{where} {first_complaint(error)}") from None


def to_toml(config: TrainConfig) -> str:
    """The config as TOML text; `parse_config` is the inverse. What is None is left out."""
    lines: list[str] = []
    for table, values in _plain(config).items():
        present = {key: value for key, value in values.items() if value is not None}
        if present:
            lines += [f"[{table}]", *(f"{key} = {toml_value(v)}" for key, v in present.items()), ""]
    return "\n".join(lines)
