"""Model folders: what comes back, and every way in which one can be broken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from sde_diffusion import (
    EDMSDE,
    SDE,
    VESDE,
    VPSDE,
    CosineVPSDE,
    EDMModel,
    EpsModel,
    ScoreModel,
    SubVPSDE,
    TabulatedVPSDE,
    VModel,
    X0Model,
    scaled_time,
)
from sde_diffusion.checkpoints import (
    CheckpointError,
    FeatureStatistics,
    LoadedModel,
    describe,
    load_model,
    save_model,
    shipped_models,
)
from sde_diffusion.data import DataDescription, Scaling
from sde_diffusion.loop import seeded
from sde_diffusion.networks import MLP, ClassifierNet, JudgeNet, NoisedClassifier
from sde_diffusion.parametrization import ParametrizedModel
from sde_diffusion.storage import read_tensors, write_bytes, write_tensors

DATA = DataDescription("points", (3,), 4, ("a", "b", "c", "d"), Scaling(-2.0, 2.0), 8, 2)
X = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
LABEL = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4])


def network() -> MLP:
    net = seeded(lambda: MLP((3,), 4, width=8, blocks=1), 1)
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))
    return net


def save(path: Path, model: ParametrizedModel, half: bool = False) -> Path:
    judge = seeded(lambda: JudgeNet((3,), 4, width=8, size=5), 3)
    return save_model(
        path,
        model,
        data=DATA,
        judge=judge,
        reference={part: FeatureStatistics.of(judge, X) for part in ("train", "test")},
        classifier=NoisedClassifier(seeded(lambda: ClassifierNet((3,), 4, width=8), 4)),
        training={"seed": 0},
        half=half,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "model", EpsModel(network(), VPSDE()))


@pytest.mark.parametrize(
    "sde",
    [
        VPSDE(beta_max=10.0),
        CosineVPSDE(),
        SubVPSDE(),
        VESDE(sigma_max=7.0),
        EDMSDE(t_max=9.0),
        TabulatedVPSDE.from_betas(torch.linspace(1e-4, 0.02, 20)),
    ],
    ids=lambda sde: type(sde).__name__,
)
def test_every_sde_comes_back(tmp_path: Path, sde: SDE) -> None:
    assert load_model(save(tmp_path / "m", EpsModel(network(), sde))).sde == sde


@pytest.mark.parametrize(
    "make",
    [
        EpsModel,
        X0Model,
        VModel,
        ScoreModel,
        lambda net, sde: ScoreModel(net, sde, divide_by_sigma=True),
        lambda net, sde: EDMModel(net, sde, sigma_data=0.8),
    ],
)
def test_every_parametrization_comes_back_exactly(tmp_path: Path, make) -> None:
    sde = VPSDE()
    model = make(network(), sde)
    loaded = load_model(save(tmp_path / "m", model))
    level = sde.at(torch.linspace(0.1, 1, 10))
    assert torch.equal(loaded.model(X, level, LABEL).x0, model(X, level, LABEL).x0)
    assert torch.equal(loaded.model(X, level).x0, model(X, level).x0)
    assert loaded.null_label == loaded.num_classes == 4


def test_the_whole_folder_comes_back(folder: Path) -> None:
    before = torch.get_rng_state()
    loaded = load_model(folder)
    assert torch.equal(before, torch.get_rng_state())
    assert isinstance(loaded, LoadedModel)
    assert loaded.data == DATA
    assert loaded.event_shape == (3,)
    assert loaded.classifier is not None
    assert loaded.classifier(X, loaded.sde.at(torch.tensor(0.5))).shape == (10, 4)
    again = FeatureStatistics.of(loaded.judge, X)
    for part in ("train", "test"):
        assert loaded.reference[part].count == 10
        torch.testing.assert_close(loaded.reference[part].mean, again.mean)
        torch.testing.assert_close(loaded.reference[part].covariance, again.covariance)
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert not loaded.model.training
    assert loaded.training == {"seed": 0}
    said = describe(folder)
    assert said["parameters"] == sum(p.numel() for p in loaded.model.parameters())
    assert said["sde"]["kind"] == "VPSDE"
    assert {f.suffix for f in folder.iterdir()} == {".safetensors", ".json"}


def test_half_precision_is_close_and_half_the_size(tmp_path: Path) -> None:
    model = EpsModel(network(), VPSDE())
    whole, half = save(tmp_path / "whole", model), save(tmp_path / "half", model, half=True)
    level = model.sde.at(torch.tensor(0.5))
    exact, near = (load_model(p).model(X, level).eps for p in (whole, half))
    assert near.dtype == torch.float32
    # float16 keeps 11 bits: a relative 5e-4 of each weight.
    torch.testing.assert_close(near, exact, rtol=1e-2, atol=5e-3)
    sizes = [
        sum(v.nbytes for v in read_tensors(p / "score.safetensors")[0].values())
        for p in (whole, half)
    ]
    assert sizes[0] == 2 * sizes[1]


def broken(folder: Path, **changes: object) -> Path:
    file = folder / "model.json"
    info = json.loads(file.read_text())
    info.update(changes)
    file.write_text(json.dumps(info))
    return folder


def test_folders_that_are_not_there(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist; train one with"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no model\.json"):
        load_model(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        load_model(tmp_path / "file")
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other" / "judge.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"judge\.safetensors' is missing"):
        load_model(tmp_path / "other")
    (tmp_path / "other" / "model.json").unlink()
    (tmp_path / "other" / "checkpoints").mkdir()
    (tmp_path / "other" / "checkpoints" / "manifest.json").touch()
    with pytest.raises(CheckpointError, match="unfinished, continue it with --resume"):
        load_model(tmp_path / "other")


def test_a_bare_name_that_is_not_shipped_names_the_nearest() -> None:
    with pytest.raises(CheckpointError, match="Or give the folder of a trained model"):
        load_model("digitz-vp")


def test_pickled_files_are_refused(tmp_path: Path, folder: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"weights\.pt' is a pickled file.*refused"):
        load_model(tmp_path / "weights.pt")
    shutil.copy(tmp_path / "weights.pt", folder / "score.safetensors")
    with pytest.raises(CheckpointError, match=r"score\.safetensors' is a pickled file"):
        load_model(folder)


@pytest.mark.parametrize("size", [0x80, 0x280, 0x4B50], ids=hex)
def test_a_header_whose_length_looks_like_a_pickle_is_none(tmp_path: Path, size: int) -> None:
    """Its first bytes are any number: one in 32 begins like a pickle, some like a zip file."""
    file = tmp_path / "a.safetensors"
    write_tensors(file, {"x": torch.zeros(1)}, {"p": ""})
    missing = size - int.from_bytes(file.read_bytes()[:8], "little")
    write_tensors(file, {"x": torch.zeros(1)}, {"p": "." * missing})
    assert file.read_bytes()[0] == size % 256
    assert torch.equal(read_tensors(file)[0]["x"], torch.zeros(1))


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_files_are_named(folder: Path, keep: int) -> None:
    file = folder / "classifier.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"classifier\.safetensors' is truncated or corrupt"):
        load_model(folder)


def test_a_changed_byte_is_found(folder: Path) -> None:
    file = folder / "score.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="checksum differs"):
        load_model(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe"])
def test_json_that_is_none(folder: Path, content: bytes) -> None:
    (folder / "model.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.json'"):
        load_model(folder)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"version": 99}, "version 99; this program reads up to 1: upgrade"),
        ({"version": None}, "version None"),
        ({"format": "other"}, "format 'other'"),
        ({"sde": {"kind": "VPSD"}}, "Did you mean 'VPSDE'"),
        ({"sde": {"kind": "VPSDE", "gamma": 1}}, "gamma"),
        ({"data": {}}, "is missing or unknown"),
        ({"parametrization": {"kind": "Eps"}}, "is not valid"),
        ({"networks": {"score": None, "classifier": None, "judge": None}}, "is missing"),
        ({"networks": 3}, "is not valid"),
    ],
)
def test_json_that_says_something_else(folder: Path, changes: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_model(broken(folder, **changes))


def test_tensors_that_do_not_match_are_named(folder: Path) -> None:
    file = folder / "score.safetensors"
    tensors, _ = read_tensors(file)
    tensors["inlet.weight"] = torch.zeros(2, 2)
    tensors["extra"] = torch.zeros(1)
    tensors["outlet.bias"] = torch.full((3,), float("nan"))
    del tensors["inlet.bias"]
    write_tensors(file, tensors)
    broken(folder, files={})
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert "inlet.bias is missing" in message
    assert "extra is not in the network" in message
    assert "inlet.weight is (2, 2), not (8, 3)" in message
    assert "outlet.bias holds NaN" in message


def test_models_that_cannot_be_described_are_refused(tmp_path: Path) -> None:
    model = EpsModel(network(), VPSDE(), time_label=scaled_time(999.0))
    with pytest.raises(CheckpointError, match="its own time_label"):
        save(tmp_path / "m", model)
    with pytest.raises(CheckpointError, match=r"no config\(\)"):
        save(tmp_path / "m", EpsModel(torch.nn.Linear(3, 3), VPSDE()))


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a"
    write_bytes(file, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        write_bytes(file, b"new")
    assert file.read_bytes() == b"old"
    assert [f.name for f in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot make the folder"):
        save(tmp_path / "file" / "model", EpsModel(network(), VPSDE()))


@pytest.mark.parametrize("name", shipped_models())
def test_shipped_models_load_by_name_and_recognise_real_digits(name: str) -> None:
    from sde_diffusion.data import load_data

    loaded = load_model(name)
    data = load_data("digits")
    assert loaded.data == data.describe()
    again = FeatureStatistics.of(loaded.judge, data.train_x)
    # The statistics were taken before the judge was rounded to float16.
    torch.testing.assert_close(loaded.reference["train"].mean, again.mean, rtol=2e-2, atol=2e-2)
    assert loaded.classifier is not None
    level = loaded.sde.at(torch.tensor(loaded.sde.t_min))
    for logits in (loaded.judge(data.test_x), loaded.classifier(data.test_x, level)):
        accuracy = float((logits.argmax(1) == data.test_y).float().mean())
        assert accuracy > 0.95


def test_shipped_models_are_small() -> None:
    assert sum(describe(name)["bytes"] for name in shipped_models()) <= 3 * 1024**2
