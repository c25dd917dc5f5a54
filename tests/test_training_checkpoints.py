"""The checkpoints of a run: whole, the last few, never a torn one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from sde_diffusion import VPSDE
from sde_diffusion.checkpoints import CheckpointError, load_model
from sde_diffusion.storage import read_json, read_tensors, write_json, write_tensors
from sde_diffusion.training import RunOptions, TrainingInterrupted, train
from sde_diffusion.training_checkpoints import CheckpointStore, holds_checkpoints
from tests.trained import SETTINGS, assert_same, points, run, stop_at


def store(folder: Path, keep: int = 2, written: int = 3) -> CheckpointStore:
    made = CheckpointStore(folder, keep)
    for n in range(written):
        made.write({"x": torch.full((4,), float(n))}, {"current": "s", "done": n})
    return made


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in (folder / "checkpoints").iterdir())


def test_the_last_few_are_kept_and_the_newest_is_read(tmp_path: Path) -> None:
    made = store(tmp_path)
    assert names(tmp_path) == ["000002.safetensors", "000003.safetensors", "manifest.json"]
    file, tensors, info = CheckpointStore(tmp_path).read()
    assert file == made.newest
    assert tensors["x"].tolist() == [2.0] * 4
    assert info["done"] == 2
    made.clear()
    assert not holds_checkpoints(tmp_path)


def test_a_torn_file_is_never_chosen(tmp_path: Path) -> None:
    """What a crash may leave: a partial file, a whole one that is in no manifest."""
    made = store(tmp_path)
    folder = tmp_path / "checkpoints"
    (folder / "000004.safetensors").write_bytes(b"half of a chec")
    (folder / "000005.safetensors.partial").write_bytes(b"")
    assert CheckpointStore(tmp_path).read()[0].name == "000003.safetensors"
    made.write({"x": torch.zeros(1)}, {})
    assert names(tmp_path) == ["000003.safetensors", "000004.safetensors", "manifest.json"]
    assert CheckpointStore(tmp_path).read()[1]["x"].tolist() == [0.0]


@pytest.mark.parametrize("fails_at", [1, 2, 3, 4])
def test_a_full_disk_leaves_the_old_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    """A writer that fails at each of its writes: the file, its name, the manifest, its name."""
    made, calls, real = store(tmp_path), 0, os.fsync

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*has room"):
        made.write({"x": torch.zeros(4)}, {"done": 99})
    monkeypatch.undo()
    _, tensors, info = CheckpointStore(tmp_path).read()
    # At the last of them the new checkpoint is in place already; either is whole.
    assert (info["done"], tensors["x"].tolist()) in ((2, [2.0] * 4), (99, [0.0] * 4))
    assert (info["done"] == 2) == (fails_at < 4)
    made.write({"x": torch.ones(4)}, {"done": 100})
    assert CheckpointStore(tmp_path).read()[2]["done"] == 100


def test_a_run_on_a_full_disk_can_be_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole")
    calls, real = 0, os.fsync

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 7:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        run(tmp_path / "m")
    monkeypatch.undo()
    run(tmp_path / "m", resume=True)
    assert_same(tmp_path / "whole", tmp_path / "m")


def interrupted(out: Path, step: int = 5) -> Path:
    with pytest.raises(TrainingInterrupted) as caught:
        run(out, on_step=stop_at("score network", step))
    return caught.value.checkpoint


@pytest.mark.parametrize("keep", [0, 50, -2])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, keep: int) -> None:
    run(tmp_path / "whole")
    file = interrupted(tmp_path / "m")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.warns(UserWarning, match="truncated or corrupt.*Going on from the one before"):
        run(tmp_path / "m", resume=True)
    assert_same(tmp_path / "whole", tmp_path / "m")


def test_damaged_checkpoints_are_named_where_all_are(tmp_path: Path) -> None:
    newest = interrupted(tmp_path / "m")
    for file in newest.parent.glob("*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=rf"{newest.name}' is not the file .*checksum"):
        run(tmp_path / "m", resume=True)
    for file in newest.parent.glob("*.safetensors"):
        torch.save({"x": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match="is a pickled file, which can run code"):
        run(tmp_path / "m", resume=True)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"version": 99}, "version 99; this program reads 2: upgrade it"),
        ({"format": "other"}, "of format 'other'"),
        ({"checkpoints": []}, "names no checkpoint"),
        ({"checkpoints": [{"step": 3}]}, "is not valid"),
    ],
)
def test_manifests_from_elsewhere(tmp_path: Path, changes: dict, message: str) -> None:
    manifest = interrupted(tmp_path / "m").parent / "manifest.json"
    write_json(manifest, read_json(manifest) | changes)
    with pytest.raises(CheckpointError, match=message):
        run(tmp_path / "m", resume=True)
    manifest.write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        run(tmp_path / "m", resume=True)


def test_weights_that_do_not_match_the_config_are_named(tmp_path: Path) -> None:
    file = interrupted(tmp_path / "m")
    tensors, metadata = read_tensors(file)
    tensors["current/ema.inlet.weight"] = torch.zeros(2, 2)
    del tensors["current/net.inlet.bias"]
    checksum = write_tensors(file, tensors, metadata)
    manifest = file.parent / "manifest.json"
    found = read_json(manifest)
    found["checkpoints"][-1]["sha256"] = checksum
    write_json(manifest, found)
    with pytest.raises(CheckpointError) as caught:
        run(tmp_path / "m", resume=True)
    assert "net.inlet.bias is missing" in str(caught.value)
    assert "ema.inlet.weight is (2, 2), not" in str(caught.value)


def test_a_foreign_file_in_the_manifest(tmp_path: Path) -> None:
    file = interrupted(tmp_path / "m")
    manifest = file.parent / "manifest.json"
    checksum = write_tensors(file, {"x": torch.zeros(1)}, {"training": json.dumps({})})
    found = read_json(manifest)
    found["checkpoints"] = [{"file": file.name, "sha256": checksum}]
    write_json(manifest, found)
    with pytest.raises(CheckpointError, match="is not a training checkpoint"):
        run(tmp_path / "m", resume=True)


def test_resume_says_which_setting_differs(tmp_path: Path) -> None:
    interrupted(tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"settings \(score.steps was 8, is 9\)"):
        run(tmp_path / "m", resume=True, steps=9)


def test_killed_before_its_first_checkpoint_a_run_starts(tmp_path: Path) -> None:
    (tmp_path / "m" / "checkpoints").mkdir(parents=True)
    (tmp_path / "m" / "checkpoints" / "000001.safetensors.partial").touch()
    run(tmp_path / "m", resume=True)
    run(tmp_path / "whole")
    assert_same(tmp_path / "whole", tmp_path / "m")


def test_validation_is_the_same_after_a_resume_and_stored(tmp_path: Path) -> None:
    options = RunOptions(checkpoint_every=3, validate_every=2, validation_buckets=3)
    train(points(), VPSDE(), tmp_path / "a", settings=SETTINGS, options=options, progress=False)
    with pytest.raises(TrainingInterrupted):
        run(tmp_path / "b", options=options, on_step=stop_at("score network", 5))
    run(tmp_path / "b", options=options, resume=True)
    first, second = (load_model(tmp_path / name).training for name in ("a", "b"))
    assert first["validation"] == second["validation"]
    assert [entry["step"] for entry in first["validation"]] == [2, 4, 6, 8]
    assert [len(entry["by_time"]) for entry in first["validation"]] == [3] * 4
    assert len(first["classifier_accuracy"]) == 3
    assert all(0 <= bucket["mean"] <= 1 for bucket in first["classifier_accuracy"])
