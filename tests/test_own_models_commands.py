"""Networks from elsewhere in every command with --model: factories, and a diffusers folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from experiments.cli import app
from experiments.features import FeatureSpace
from experiments.subjects import ModelSubject, SubjectOptions, make_subjects
from sde_diffusion.data import load_data
from sde_diffusion.samples import StoredSamples, as_tensor
from tests import own_models

HERE = "tests.own_models"
LABELLED, PLAIN, DIFFUSERS = f"{HERE}:labelled_vp", f"{HERE}:plain_ve", "a diffusers folder"
FEW = "--steps 8 --solver probability_flow"
COMMANDS = {
    "likelihood": f"-n 3 --probes 2 --bound 2 --draws 0 {FEW} --data DATA",
    "restore": "-n 2 --samples 2 --steps 4 --method replacement --method dps --data DATA",
    "interpolate": f"--pairs 2 --points 3 {FEW} --data DATA",
    "error-budget": "--nfe 4 --solver ddim --samples 6 --repeats 2",
    "steps": "--steps 4,8 --solver probability_flow --samples 2",
    "compare": "--nfe 4 --solver ddim --samples 12 --repeats 2 --features raw --data DATA --jobs 1",
}
WRITTEN = {
    "likelihood": "likelihood.json",
    "restore": "restored.json",
    "interpolate": "interpolation.json",
    "error-budget": "results.json",
    "steps": "results.json",
    "compare": "results.json",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of the networks' own law, as 8-bit images, with their classes."""
    file = tmp_path_factory.mktemp("data") / "images.npy"
    x, labels = own_models.IMAGES.sample(300, 0)
    np.save(file, ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy())
    np.save(file.with_name("images_labels.npy"), labels.numpy())
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("diffusers")
    from tests.test_diffusers_model import ddpm
    from tests.test_diffusers_model import folder as make

    path = tmp_path_factory.mktemp("diffusers")
    make(path, ddpm())
    return str(path)


def invoke(command: str, arguments: str, model: str, data: Path, out: Path) -> Any:
    given = arguments.replace("DATA", str(data)).split()
    return CliRunner().invoke(app, [command, "--model", model, *given, "--out", str(out)])


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("model", [LABELLED, PLAIN, DIFFUSERS])
def test_every_command_takes_them(
    request: pytest.FixtureRequest, tmp_path: Path, data: Path, model: str, command: str
) -> None:
    named = request.getfixturevalue("folder") if model == DIFFUSERS else model
    done = invoke(command, COMMANDS[command], named, data, tmp_path)
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / WRITTEN[command]).read_text())
    known = [row["status"] for row in written.get("rows", []) if "status" in row]
    assert set(known) <= {"ok"}


@pytest.mark.parametrize("label", ["none", "own"])
def test_the_likelihood_is_that_of_the_law(tmp_path: Path, data: Path, label: str) -> None:
    """Of the exact score by a factory: the density of the mixture at t_min, or of a class."""
    options = (
        f"-n 3 --divergence exact --bound 0 --draws 0 --data DATA --label {label} --steps 60 "
        "--solver probability_flow:method=rk4"
    )
    done = invoke("likelihood", options, LABELLED, data, tmp_path)
    assert done.exit_code == 0, done.output
    table = np.genfromtxt(tmp_path / "likelihood.csv", delimiter=",", names=True)
    held = load_data(str(data))
    x, classes = as_tensor(held.test_x[torch.arange(3)]).double(), held.test_y
    assert classes is not None
    level = own_models.VPSDE().at(1e-3)
    own = [own_models.IMAGES.conditional(int(c)) for c in classes[:3]]
    laws = own if label == "own" else [own_models.IMAGES] * 3
    known = torch.cat([law.log_prob_at(x[i : i + 1], level) for i, law in enumerate(laws)])
    # 64 numbers in float32 along 240 evaluations; the step error of rk4 is below it.
    assert table["log_prob"] == pytest.approx(known.numpy(), abs=0.05)
    assert np.abs(known.numpy()).min() > 10


def test_guidance_of_a_network_with_classes(tmp_path: Path, data: Path) -> None:
    options = "--nfe 4 --solver ddim --scale 1,3 --samples 24 --repeats 2 --jobs 1 --data DATA"
    done = invoke("guidance", options, LABELLED, data, tmp_path)
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {row["guidance"] for row in rows} == {"classifier", "cfg"}
    # Three blobs far apart: guided samples are nearer to their class than real ones are.
    variance = {row["scale"]: row["metrics"]["variance"]["value"] for row in rows}
    assert variance[3.0] < variance[1.0]


@pytest.mark.parametrize(
    ("command", "options", "words"),
    [
        ("guidance", "--nfe 4 --data DATA", "needs classes"),
        ("likelihood", "-n 3", "name some with --data"),
        ("interpolate", "--pairs 1", "name some with --data"),
        ("restore", "-n 1", "--data"),
    ],
)
def test_what_is_missing_is_named(
    tmp_path: Path, data: Path, command: str, options: str, words: str
) -> None:
    done = invoke(command, options, PLAIN, data, tmp_path)
    assert done.exit_code == 2, done.output
    assert words in " ".join(done.output.split())


def test_data_of_no_levels_are_told_the_remedy(tmp_path: Path) -> None:
    file = tmp_path / "real.npy"
    np.save(file, own_models.MIXTURE.sample(40, 0)[0].numpy())
    done = invoke("likelihood", "-n 2 --data DATA", f"{HERE}:mixture", file, tmp_path / "out")
    assert done.exit_code == 2
    words = " ".join(done.output.split())
    assert "--levels: " in words
    assert "or --draws 0" in words


def test_held_out_blocks_read_no_more_than_they_hold(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (subject,) = make_subjects(SubjectOptions((), (PLAIN,), (), str(data), "raw"))
    assert isinstance(subject, ModelSubject)
    assert subject.data is not None
    space = FeatureSpace(subject.judge, subject.data)
    everything = space.real_samples(None)
    assert everything is not None
    size = 25
    asked: list[int] = []
    read = StoredSamples.__getitem__
    monkeypatch.setattr(
        StoredSamples, "__getitem__", lambda x, rows: (asked.append(len(rows)), read(x, rows))[1]
    )
    count = len(everything) // size
    blocks = [space.real_samples(None, size, repeat) for repeat in range(count + 1)]
    assert asked == [size] * (count + 1)
    assert count > 1
    first, *others, again = [block for block in blocks if block is not None]
    assert torch.equal(first, again)
    assert torch.equal(torch.cat([first, *others]), everything[: count * size])
    large = space.real_samples(None, 10_000)
    assert large is not None
    assert len(large) == len(everything)
