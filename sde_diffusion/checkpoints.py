"""A model folder: what a trained model is, in safetensors and JSON.

    model.json              format, SDE, parametrization, network configurations, data, training
    score.safetensors       the score network (average of weights)
    classifier.safetensors  the classifier of noised inputs, where the data has labels
    judge.safetensors       the feature map and classifier of clean inputs that metrics use
    reference.safetensors   mean and covariance of the judge's features of the training and held-out
    data

Files are written whole or not at all, model.json last with the checksums of the others. Pickle is
never read or written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sde_diffusion.data import DataDescription
from sde_diffusion.errors import unknown_name
from sde_diffusion.networks import JudgeNet, NoisedClassifier, RandomFeatures, build_network
from sde_diffusion.networks.classifier import ClassifierNet
from sde_diffusion.parametrization import (
    EDMModel,
    EpsModel,
    ParametrizedModel,
    ScoreModel,
    TableIndex,
    VModel,
    X0Model,
    continuous_time,
    edm_noise_label,
    no_time,
)
from sde_diffusion.samples import Samples, chunks
from sde_diffusion.schedules import sde_from_config
from sde_diffusion.sde import SDE
from sde_diffusion.seeding import seeded
from sde_diffusion.storage import (
    PICKLED,
    CheckpointError,
    fit_tensors,
    halved,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from sde_diffusion.training_checkpoints import holds_checkpoints

__all__ = [
    "CheckpointError",
    "FeatureStatistics",
    "LoadedModel",
    "describe",
    "load_model",
    "save_model",
    "shipped_models",
]

FORMAT = "sde-diffusion-model"
VERSION = 1
MODEL_FILE = "model.json"
SHIPPED = Path(__file__).parent / "weights"
_PARAMETRIZATIONS = {c.__name__: c for c in (EpsModel, X0Model, VModel, ScoreModel, EDMModel)}
_TIME_LABELS = {
    "continuous_time": continuous_time,
    "edm_noise_label": edm_noise_label,
    "no_time": no_time,
}
_RETRAIN = "train the model again or restore the folder"


@dataclass(frozen=True)
class FeatureStatistics:
    """First two moments of a judge's features over a data set.

    Attributes:
        mean: (F,) float64.
        covariance: (F, F) float64, with the n - 1 denominator.
        count: number of samples they come from.
    """

    mean: Tensor
    covariance: Tensor
    count: int

    @classmethod
    @torch.no_grad()
    def of(
        cls, judge: JudgeNet | RandomFeatures, x: Samples, chunk: int = 1024
    ) -> FeatureStatistics:
        """Of clean samples x (N, *event) in [-1, 1], N at least 2, read `chunk` at a time."""
        features = torch.cat([judge.features(part) for part in chunks(x, chunk)]).double()
        size = features.shape[1]
        covariance = torch.cov(features.T) if len(features) > 1 else features.new_zeros(size, size)
        return cls(features.mean(0), covariance.reshape(size, size), len(features))


@dataclass(frozen=True)
class LoadedModel:
    """A model folder, read.

    Attributes:
        path: the folder.
        model: called (x, level, label=None) -> Prediction; in eval mode, without gradients to
            weights.
        sde: the SDE it was trained under.
        classifier: called (x, level) -> logits, for guidance; None where the data had no labels.
        judge: ``features(x)`` of clean samples for Fréchet distances; with labels also ``judge(x)``
            -> logits. Guidance never sees it.
        data: what it was trained on; ``data.scaling`` undoes the scaling of samples.
        reference: feature statistics, ``train`` and ``test``.
        training: settings and figures of the training run.
    """

    path: Path
    model: ParametrizedModel
    sde: SDE
    classifier: NoisedClassifier | None
    judge: JudgeNet | RandomFeatures
    data: DataDescription
    reference: dict[str, FeatureStatistics]
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def null_label(self) -> int | None:
        """The label that stands for no label, or None for an unconditional model."""
        return self.model.null_label

    @property
    def num_classes(self) -> int | None:
        """Number of classes, or None for an unconditional model."""
        return self.data.num_classes

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self.data.event_shape

    def to(self, device: torch.device | str) -> LoadedModel:
        """Move the networks to `device`, in place; the statistics stay where they are."""
        self.model.to(device)
        self.judge.to(device)
        if self.classifier is not None:
            self.classifier.to(device)
        return self


def shipped_models() -> tuple[str, ...]:
    """Names of the models that come with the package; `load_model` takes them like paths."""
    return tuple(sorted(p.parent.name for p in SHIPPED.glob(f"*/{MODEL_FILE}")))


def save_model(
    path: str | Path,
    model: ParametrizedModel,
    *,
    data: DataDescription,
    judge: JudgeNet | RandomFeatures,
    reference: dict[str, FeatureStatistics],
    classifier: NoisedClassifier | None = None,
    training: dict[str, Any] | None = None,
    half: bool = True,
) -> Path:
    """Write a model folder and return its path.

    Args:
        path: folder, made if missing.
        model: a parametrization around one of this package's networks.
        data, judge, reference, classifier, training: as in `LoadedModel`.
        half: store weights as float16 (statistics stay as they are); they are computed with in
            float32.

    Raises:
        CheckpointError: the folder cannot be written, or the model cannot be described in JSON.
    """
    folder = Path(path)
    networks: dict[str, nn.Module | None] = {
        "score": model.net,
        "classifier": None if classifier is None else classifier.net,
        "judge": judge,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"cannot make the folder {str(folder)!r} ({error.strerror or error}); give another one"
        ) from error
    configs: dict[str, Any] = {}
    files: dict[str, str] = {}
    for name, network in networks.items():
        configs[name] = None if network is None else _config_of(network)
        if network is not None:
            state = network.state_dict()
            file = f"{name}.safetensors"
            files[file] = write_tensors(folder / file, halved(state) if half else state)
    statistics: dict[str, Tensor] = {}
    for part, moments in reference.items():
        statistics[f"{part}.mean"] = moments.mean.double()
        statistics[f"{part}.covariance"] = moments.covariance.double()
        statistics[f"{part}.count"] = torch.tensor(moments.count)
    files["reference.safetensors"] = write_tensors(folder / "reference.safetensors", statistics)
    write_json(
        folder / MODEL_FILE,
        {
            "format": FORMAT,
            "version": VERSION,
            "sde": model.sde.config(),
            "parametrization": _parametrization_config(model),
            "networks": configs,
            "data": data.config(),
            "training": training or {},
            "files": files,
        },
    )
    return folder


def _config_of(network: nn.Module) -> dict[str, Any]:
    config = getattr(network, "config", None)
    if config is None:
        raise CheckpointError(
            f"{type(network).__name__} has no config() and cannot be stored; "
            "use a network of sde_diffusion.networks"
        )
    return dict(config())


def _parametrization_config(model: ParametrizedModel) -> dict[str, Any]:
    kind = type(model).__name__
    labels = [name for name, function in _TIME_LABELS.items() if function is model.time_label]
    if isinstance(model.time_label, TableIndex):
        labels = ["table_index"]
    if kind not in _PARAMETRIZATIONS or not labels:
        what = kind if kind not in _PARAMETRIZATIONS else "its own time_label function"
        raise CheckpointError(
            f"a model with {what} cannot be stored; use one of {', '.join(_PARAMETRIZATIONS)} "
            f"with time_label {' or '.join(_TIME_LABELS)}"
        )
    config: dict[str, Any] = {"kind": kind, "time_label": labels[0], "null_label": model.null_label}
    if isinstance(model.time_label, TableIndex):
        config["table_steps"] = model.time_label.n
    if isinstance(model, EDMModel):
        config["sigma_data"] = model.sigma_data
    if isinstance(model, ScoreModel):
        config["divide_by_sigma"] = model.divide_by_sigma
    return config


def _open(path: str | Path) -> tuple[Path, dict[str, Any]]:
    folder = Path(path).expanduser()
    if not folder.exists() and str(path) in shipped_models():
        folder = SHIPPED / str(path)
    if folder.suffix.lower() in PICKLED and not folder.is_dir():
        raise CheckpointError(
            f"{str(folder)!r} is a pickled file, which can run code when it is read, and is "
            "refused; give a model folder as written by save_model"
        )
    if folder.name == MODEL_FILE and folder.is_file():
        folder = folder.parent
    if not folder.exists():
        if len(Path(path).parts) == 1:
            raise CheckpointError(
                f"{unknown_name('model', str(path), shipped_models())} "
                "Or give the folder of a trained model, made by: sde-diffusion train DATA"
            )
        raise CheckpointError(
            f"model folder {str(folder)!r} does not exist; train one with: "
            f"sde-diffusion train DATA, or use a shipped one ({', '.join(shipped_models())})"
        )
    if not folder.is_dir():
        raise CheckpointError(
            f"model {str(folder)!r} is a file; give the folder that holds {MODEL_FILE}"
        )
    if not (folder / MODEL_FILE).exists():
        unfinished = holds_checkpoints(folder)
        remedy = "its training is unfinished, continue it with --resume" if unfinished else _RETRAIN
        raise CheckpointError(f"{str(folder)!r} is not a model folder: no {MODEL_FILE}; {remedy}")
    info = read_json(folder / MODEL_FILE, _RETRAIN)
    if info.get("format") != FORMAT:
        raise CheckpointError(
            f"{str(folder / MODEL_FILE)!r} is of format {info.get('format')!r}, not {FORMAT!r}; "
            "give a folder written by save_model"
        )
    version = info.get("version")
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise CheckpointError(
            f"{str(folder)!r} is of version {version!r}; this program reads up to {VERSION}: "
            "upgrade it"
        )
    return folder, info


def load_model(path: str | Path) -> LoadedModel:
    """Read a model folder, or a shipped model by name (see `shipped_models`).

    Raises:
        CheckpointError: missing, truncated, corrupt, foreign, newer or pickled files, or tensors
            that do not fit; the message names the path, what is wrong and the remedy.
    """
    folder, info = _open(path)
    try:
        sde = sde_from_config(info["sde"])
        data = DataDescription.from_config(info["data"])
        networks = {
            name: None if config is None else seeded(partial(build_network, config))
            for name, config in info["networks"].items()
        }
        settings = dict(info["parametrization"])
        kind = settings.pop("kind")
        steps = settings.pop("table_steps", None)
        settings["time_label"] = (
            _TIME_LABELS[settings["time_label"]] if steps is None else TableIndex(steps)
        )
        net, classifier, judge = (networks[name] for name in ("score", "classifier", "judge"))
        if net is None or not isinstance(judge, (JudgeNet, RandomFeatures)):
            raise ValueError("networks.score or networks.judge is missing")
        if not isinstance(classifier, ClassifierNet | None):
            raise ValueError("networks.classifier is of another kind")
        model = _PARAMETRIZATIONS[kind](net, sde, **settings)
        files: dict[str, str] = dict(info["files"])
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{error} is missing or unknown" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"{str(folder / MODEL_FILE)!r} is not valid: {what}; {_RETRAIN}"
        ) from error
    for name, network in networks.items():
        if network is not None:
            file = folder / f"{name}.safetensors"
            tensors, _ = read_tensors(file, files.get(file.name), _RETRAIN)
            network.load_state_dict(fit_tensors(file, network.state_dict(), tensors))
            network.eval().requires_grad_(False)
    return LoadedModel(
        path=folder,
        model=model.eval(),
        sde=sde,
        classifier=None if classifier is None else NoisedClassifier(classifier).eval(),
        judge=judge,
        data=data,
        reference=_read_reference(folder / "reference.safetensors", files),
        training=dict(info.get("training", {})),
    )


def _read_reference(file: Path, files: dict[str, str]) -> dict[str, FeatureStatistics]:
    tensors, _ = read_tensors(file, files.get(file.name), _RETRAIN)
    try:
        return {
            part: FeatureStatistics(
                tensors[f"{part}.mean"],
                tensors[f"{part}.covariance"],
                int(tensors[f"{part}.count"]),
            )
            for part in ("train", "test")
        }
    except KeyError as error:
        raise CheckpointError(f"{str(file)!r} lacks the tensor {error}; {_RETRAIN}") from error


def describe(path: str | Path) -> dict[str, Any]:
    """What a model folder holds, read from its JSON alone: for a listing.

    Keys: path, sde, parametrization, networks, data, training, parameters (of the score network)
        and
    bytes (of all files).

    Raises:
        CheckpointError: as `load_model`, as far as the JSON goes.
    """
    folder, info = _open(path)
    try:
        config = info["networks"]["score"]
        with torch.device("meta"):
            parameters = sum(math.prod(p.shape) for p in build_network(config).parameters())
        keys = ("sde", "parametrization", "networks", "data", "training")
        return {
            "path": str(folder),
            **{key: info[key] for key in keys},
            "parameters": parameters,
            "bytes": sum(f.stat().st_size for f in folder.iterdir() if f.is_file()),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{str(folder / MODEL_FILE)!r} is not valid: {error}; {_RETRAIN}"
        ) from error
