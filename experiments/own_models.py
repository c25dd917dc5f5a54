"""Networks from elsewhere as models: ``package.module:factory``, or a diffusers folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.extractors import Raw, source_digest
from sde_diffusion import SDE, Prediction
from sde_diffusion.checkpoints import MODEL_FILE, LoadedModel, load_model
from sde_diffusion.data import DataDescription, Dataset, Scaling
from sde_diffusion.diffusers_model import from_diffusers
from sde_diffusion.importing import imported, is_import_path
from sde_diffusion.seeding import seeded
from sde_diffusion.storage import read_json

_GIVES = (
    "must return (model, sde), or an object with .model, .sde, .event_shape and, where it has "
    "them, .num_classes, .classifier and .data_range"
)


@dataclass(frozen=True)
class OwnModel(LoadedModel):
    """A network that was not trained here: no judge, no reference, no data of its own.

    Attributes:
        identity: what it is known by in keys.
    """

    identity: dict[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> OwnModel:
        for part in (self.model, self.classifier):
            if isinstance(part, nn.Module):
                part.to(device)
        return self


def is_own(text: str) -> bool:
    """Whether ``--model`` names a factory or a diffusers folder, and no model folder."""
    folder = Path(text).expanduser()
    if folder.exists():
        marks = ("config.json", "model_index.json", "unet")
        return not (folder / MODEL_FILE).exists() and any((folder / m).exists() for m in marks)
    return is_import_path(text)


def any_model(text: str, data: Dataset | None = None) -> LoadedModel:
    """The model that ``--model`` names.

    Args:
        data: real samples, whose scaling and, where a network does not tell its own, whose shape
            and classes are the model's.
    Raises:
        ValueError: whatever is missing or does not fit.
    """
    if not is_own(text):
        return load_model(text)
    if Path(text).expanduser().exists():
        found: Any = from_diffusers(text)
        known: dict[str, Any] = {}
    else:
        factory = imported(text, "--model")
        if not callable(factory):
            raise ValueError(f"--model {text} is not a function; it {_GIVES}")
        found = _made(text, factory)
        known = {"factory": text, "source": source_digest(text)}
    return _model(text, found, known, data)


def identity_of(model: LoadedModel) -> dict[str, Any]:
    """JSON-like values by which a model is known from all others."""
    if isinstance(model, OwnModel):
        return model.identity
    files: dict[str, Any] = read_json(model.path / MODEL_FILE)["files"]
    return files


def _made(text: str, factory: Callable[[], Any]) -> Any:
    """What the factory gives; its weights, where they are random, are the same in all processes."""
    try:
        found = seeded(factory)
    except Exception as error:  # whatever a user's factory does
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"--model {text} cannot be made ({why})") from error
    return found


def _model(text: str, found: Any, known: dict[str, Any], data: Dataset | None) -> OwnModel:
    if isinstance(found, tuple) and len(found) == 2:
        model, sde = found
        source = model
    else:
        source, model, sde = found, getattr(found, "model", None), getattr(found, "sde", None)
    if not callable(model) or not isinstance(sde, SDE):
        raise ValueError(f"--model {text} {_GIVES}; got {type(found).__name__}")
    shape = getattr(source, "event_shape", None) or (data and data.event_shape)
    if not shape:
        raise ValueError(
            f"--model {text} does not say the shape of a sample: return an object with "
            ".event_shape, or give --data"
        )
    if data is not None and tuple(shape) != data.event_shape:
        raise ValueError(
            f"--data {data.name!r} holds samples of shape {data.event_shape}, and the model {text} "
            f"makes {tuple(shape)}; give data of the model's shape"
        )
    classes = getattr(source, "num_classes", None)
    if isinstance(model, nn.Module):
        model = model.eval().requires_grad_(False)
        known |= {"weights": _weights_digest(model)}
    _try(text, model, sde, tuple(shape), classes)
    return OwnModel(
        path=Path(text),
        model=model,
        sde=sde,
        classifier=getattr(source, "classifier", None),
        judge=Raw(),  # type: ignore[arg-type]  # until --features names one
        data=DataDescription(
            name=text,
            event_shape=tuple(int(n) for n in shape),
            num_classes=classes,
            class_names=data.class_names if data is not None else (),
            scaling=_scaling(text, source, data),
            train_size=0,
            test_size=0,
        ),
        reference={},
        identity=known,
    )


def _scaling(text: str, source: Any, data: Dataset | None) -> Scaling:
    """Which raw values are -1 and 1 to the network: as it says, or the data's smallest and
    largest."""
    given = getattr(source, "data_range", None)
    if given is None:
        return Scaling(-1.0, 1.0) if data is None else data.scaling
    try:
        low, high = given
        return Scaling(float(low), float(high))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"--model {text} has data_range={given!r}, which must be (low, high): the raw values "
            f"that are -1 and 1 to the network ({error})"
        ) from None


@torch.no_grad()
def _try(text: str, model: Any, sde: SDE, shape: tuple[int, ...], classes: int | None) -> None:
    """One call, to find out now what is wrong with it."""
    label = None if classes is None else torch.zeros(2, dtype=torch.long)
    x = torch.zeros(2, *shape)
    try:
        found = model(x, sde.at(float(sde.t_max)), label)
        if not isinstance(found, Prediction):
            raise TypeError(f"it returned {type(found).__name__}, not a Prediction")
        given = found.eps.shape
    except Exception as error:  # whatever a user's network does
        raise ValueError(
            f"--model {text} cannot be called as model(x, level, label) with x of shape "
            f"{tuple(x.shape)} ({type(error).__name__}: {error}); wrap a network in EpsModel, "
            "X0Model, VModel, ScoreModel or EDMModel"
        ) from error
    if given != x.shape:
        raise ValueError(
            f"--model {text} gives {tuple(given)} for x of shape {tuple(x.shape)}; its output must "
            "have the shape of x"
        )


def _weights_digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
