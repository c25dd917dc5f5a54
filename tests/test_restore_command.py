"""``sde-diffusion restore``: what it writes, what it measures, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.restoration import METHODS, TASKS, Settings, measurement_of, restore
from sde_diffusion import VPSDE, EpsModel, named_target
from sde_diffusion.checkpoints import FeatureStatistics, save_model
from sde_diffusion.data import DataDescription, Scaling
from sde_diffusion.networks import MLP, RandomFeatures
from solvers import Ancestral
from tests.test_cli import refused, run


def colour_model(folder: Path) -> tuple[Path, Path]:
    """An untrained model of 3 x 4 x 4 images, and some images."""
    shape = (3, 4, 4)
    net = MLP(shape, None, width=8, blocks=1)
    x = torch.rand(40, *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    judge = RandomFeatures(shape)
    judge.fit(x, torch.Generator().manual_seed(0))
    np.save(folder / "images.npy", ((x + 1) * 127.5).round().byte().numpy())
    model = save_model(
        folder / "model",
        EpsModel(net, VPSDE()),
        data=DataDescription("gone.npy", shape, None, (), Scaling(0.0, 255.0), 32, 8),
        judge=judge,
        reference={k: FeatureStatistics.of(judge, x) for k in ("train", "test")},
        half=False,
    )
    return model, folder / "images.npy"


def test_colour_of_own_files_with_every_method(tmp_path: Path) -> None:
    model, images = colour_model(tmp_path)
    out = tmp_path / "out"
    done = run(
        *("restore", "--task", "color", "--model", model, "--data", images, "--out", out),
        *("--steps", "4", "-n", "3", "--samples", "2", "--particles", "3", "--walks", "2"),
    )
    assert done.exit_code == 0, done.output
    restored = np.load(out / "restored.npy")
    assert restored.shape == (len(METHODS), 3, 2, 3, 4, 4)
    assert np.load(out / "originals.npy").shape == (3, 3, 4, 4)
    assert np.load(out / "measured.npy").shape == (3, 1, 4, 4)
    manifest = json.loads((out / "restored.json").read_text())
    assert [row["method"] for row in manifest["rows"]] == list(METHODS)
    passes = {row["method"]: (row["nfe"], row["network_passes"]) for row in manifest["rows"]}
    assert passes["replacement"] == (5, 5)  # four steps and the last estimate
    assert passes["repaint"] == (9, 9)
    assert passes["pigdm"] == (5, 10)
    assert passes["smc"][0] == 3 * 5
    with Image.open(out / "restored.png") as picture:
        assert picture.width == 1280
    refusal = refused(run("restore", "--task", "color"))
    assert "no colour to restore" in refusal


def test_digits(tmp_path: Path) -> None:
    """Lower halves restored: what was measured is kept, and the rest is nearer than the mean."""
    done = run(
        *("restore", "--method", "pigdm", "--method", "mcg", "--steps", "25", "-n", "4"),
        *("--samples", "1", "--out", tmp_path / "out"),
    )
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "out" / "restored.json").read_text())["rows"]
    for row in rows:
        assert row["to_measurement"] < 0.2  # the noise is 0.1
        # Digits in [-1, 1] have a deviation of 0.75 about their common mean; half is known.
        assert row["to_original"] < 0.75


def test_table(tmp_path: Path) -> None:
    done = run(
        *("restore", "--table", "--target", "ring", "--samples", "100", "--steps", "12"),
        *("--repeats", "2", "--method", "replacement", "--method", "pigdm", "--noise", "0.3"),
        *("--out", tmp_path),
    )
    assert done.exit_code == 0, done.output
    table = json.loads((tmp_path / "table.json").read_text())
    rows = {row["method"]: row for row in table["rows"]}
    assert list(rows) == ["floor", "exact score", "replacement", "pigdm", "nothing known"]
    value = {name: row["w2"]["value"] for name, row in rows.items()}
    assert value["floor"] < value["pigdm"] < value["nothing known"]
    assert all(row["w2"]["stderr"] > 0 for row in rows.values())
    for name in rows:
        assert name in done.stdout


@pytest.mark.parametrize("task", TASKS)
def test_methods_do_not_depend_on_how_rows_are_split(task: str) -> None:
    """On a mixture seen as vectors, or as colour images of four pixels."""
    target, sde = named_target("gmm16"), VPSDE()
    if task == "color":
        with pytest.raises(ValueError, match="no colour"):
            measurement_of(task, (16,), 0.2)
        return
    measurement = measurement_of(task, (16,), 0.2)
    y = measurement.draw(target.sample(5, 3)[0], 0)
    for method in METHODS:
        found = [
            restore(
                method,
                target.score_fn(sde),
                sde,
                measurement,
                y,
                (16,),
                Settings(Ancestral(), 6, 0, jump=2, walks=2, particles=3, rows=rows),
            ).x
            for rows in (6, 4096)
        ]
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--task", "paint"], "Did you mean 'inpaint'"),
        (["--method", "smcc"], "Did you mean 'smc'"),
        (["--method", "smc", "--noise", "0"], "--noise"),
        (["--noise", "-1"], "--noise"),
        (["--known", "2"], "--known"),
        (["--task", "super", "--factor", "3"], "--factor 3 must divide"),
        (["--task", "deblur", "--blur", "0"], "--blur"),
        (["--solver", "scipy_ode"], "owns its loop"),
        (["--target", "ring"], "--table"),
        (["--table", "--target", "rings"], "unknown --target"),
        (["--table", "--model", "x"], "posterior is known"),
        (["--table", "--task", "color"], "no colour"),
        (["--table", "-n", "3"], "leave -n out"),
        (["--steps", "0"], "--steps"),
        (["--below", "0"], "--below"),
        (["--walks", "0"], "--walks"),
    ],
)
def test_mistakes(arguments: list[Any], says: str) -> None:
    assert says in refused(run("restore", *arguments))
