"""Real samples that a model's are compared with."""

from __future__ import annotations

from experiments.own_models import OwnModel
from sde_diffusion.checkpoints import LoadedModel
from sde_diffusion.data import Dataset, load_data


def given_data(source: str | None) -> Dataset | None:
    """What --data names.

    Raises:
        ValueError: it cannot be read.
    """
    if source is None:
        return None
    try:
        return load_data(source)
    except ValueError as error:
        raise ValueError(f"--data: {error}") from None


def real_data(model: LoadedModel, source: str | None) -> Dataset | None:
    """Real data in the model's own scaling: what --data names, else what it was trained on."""
    given = given_data(source)
    if given is None and isinstance(model, OwnModel):
        return None
    if given is None:
        try:
            data = load_data(model.data.name, **model.data.options)
        except (ValueError, TypeError):  # moved since; the moments in the folder remain
            return None
        return data if data.describe().scaling == model.data.scaling else None
    if given.event_shape != model.event_shape:
        raise ValueError(
            f"--data {source!r} holds samples of shape {given.event_shape}, and the model "
            f"{str(model.path)!r} makes {model.event_shape}; give data of the model's shape"
        )
    if given.num_classes is not None and model.num_classes not in (None, given.num_classes):
        raise ValueError(
            f"--data {source!r} has {given.num_classes} classes, and the model "
            f"{str(model.path)!r} {model.num_classes}; give data with the model's classes"
        )

    return given.rescaled(model.data.scaling)
