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
        ValueError: models of different data.
        CheckpointError: the folder holds a model of other settings; it names the setting.
    """
    loaded: dict[str, LoadedModel] = {}
    for name, config in recipe.models.items():
        if name in recipe.shipped:
            loaded[name] = load_model(recipe.shipped[name])
            continue
        folder = out / MODELS / name
        config = replace(config, run=replace(config.run, out=str(folder)))
        loaded[name] = load_model(train_config(config, resume=folder.is_dir()))
    first = next(iter(loaded.values()))
    judge = first if recipe.experiment.judge is None else load_model(recipe.experiment.judge)
    for name, model in loaded.items():
        if not same_data(judge, model):
            raise ValueError(
                f"model {name!r} was trained on {model.data.name}, and the judge on "
                f"{judge.data.name}; name another judge in [experiment], or none"
            )
    data = next(iter(recipe.models.values())).data.load()
    subjects = {
        name: ModelSubject(name, {sde_name(model.sde): model}, judge, data)
        for name, model in loaded.items()
    }
    return RecipeModels(subjects, judge, data)
