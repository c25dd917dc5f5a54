"""The models of a recipe: trained where they are not there, and who judges their samples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from experiments.recipe_file import Recipe
from experiments.subjects import ModelSubject, same_data, sde_name
from experiments.training import train_config
from sde_diffusion.checkpoints import LoadedModel, load_model
from sde_diffusion.dataset import Dataset

__all__ = ["RecipeModels", "models_of"]

MODELS = "models"


@dataclass(frozen=True)
class RecipeModels:
    """What a recipe samples.

    Attributes:
        subjects: model name -> what is sampled.
        judge: whose classifier and features measure.
        data: what all were trained on, scaled as the models are.
    """

    subjects: dict[str, ModelSubject]
    judge: LoadedModel
    data: Dataset


def models_of(recipe: Recipe, out: Path) -> RecipeModels:
    """Load the models of a recipe; train those that are not in ``out/models`` yet, or go on with
    training that was interrupted.

    Raises:
        ValueError: models or a judge of different data.
        CheckpointError: the folder holds a model of other settings; it names the setting.
    """
    named = recipe.experiment.judge
    judge = None if named is None else load_model(named)
    data = _data_of(recipe, judge)
    loaded: dict[str, LoadedModel] = {}
    for name, config in recipe.models.items():
        if name in recipe.shipped:
            loaded[name] = load_model(recipe.shipped[name])
            continue
        folder = out / MODELS / name
        config = replace(config, run=replace(config.run, out=str(folder)))
        loaded[name] = load_model(train_config(config, resume=folder.is_dir()))
    judge = judge or next(iter(loaded.values()))
    subjects = {
        name: ModelSubject(name, {sde_name(model.sde): model}, judge, data)
        for name, model in loaded.items()
    }
    return RecipeModels(subjects, judge, data)


def _data_of(recipe: Recipe, judge: LoadedModel | None) -> Dataset:
    """The data that all models of a recipe, and its judge, learn from."""
    first, *others = recipe.models.items()
    data = first[1].data.load()
    for name, config in others:
        if config.data != first[1].data:
            raise ValueError(
                f"models {first[0]!r} and {name!r} of recipe {recipe.name!r} learn from different "
                "data, and cannot be compared; give [train.data] alone"
            )
    own = data.describe()
    for what, model in (
        ("the judge", judge),
        *((f"model {name!r}", load_model(known)) for name, known in recipe.shipped.items()),
    ):
        if model is not None and not same_data(own, model.data):
            raise ValueError(
                f"{what} of recipe {recipe.name!r} learned from {model.data.name!r}, and "
                f"[train.data] names {own.name!r}; leave it out, or name another"
            )
    return data
