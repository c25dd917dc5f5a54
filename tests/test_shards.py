"""Large sets in shards: the samples of one process, whoever drew them, and nothing drawn twice."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from experiments import generate_shards, shards
from experiments.cli import app
from experiments.draw import Drawn
from experiments.generate import draw_ids
from experiments.shards import layout
from tests.test_cli import tiny_model
from tests.test_processes import free_port

BASE = ("sample", "--target", "ring", "--solver", "ancestral", "--nfe", "5", "--label", "all")
COUNT, SIZE = 47, 10


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def sharded(folder: Path, *more: str | int, count: int = COUNT) -> Any:
    size = () if "--shard-size" in more else ("--shard-size", SIZE)
    arguments = (*BASE, "-n", count, *size, *more, "--out", folder)
    return run(*map(str, arguments))


def samples(folder: Path) -> np.ndarray:
    paths = [p for p in sorted((folder / "shards").glob("*.npy")) if "labels" not in p.name]
    return np.concatenate([np.load(path, allow_pickle=False) for path in paths])


def labels(folder: Path) -> np.ndarray:
    paths = sorted((folder / "shards").glob("*.labels.npy"))
    return np.concatenate([np.load(path, allow_pickle=False) for path in paths])


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found


def seen(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in (folder / "shards").iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """The samples by the small command, in one file."""
    out = tmp_path_factory.mktemp("small") / "s"
    assert run(*BASE, "-n", str(COUNT), "--out", out).exit_code == 0
    return np.asarray(np.load(out / "samples.npy"))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The first and last id of each shard that is drawn."""
    calls: list[list[int]] = []

    def counted(plan: Any, ids: torch.Tensor) -> Drawn:
        calls.append([int(ids[0]), int(ids[-1])])
        return draw_ids(plan, ids)

    monkeypatch.setattr(generate_shards, "draw_ids", counted)
    return calls


def process(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))


def test_layout_covers_every_id_once() -> None:
    for count, size in ((47, 10), (50, 10), (1, 10), (10, 1)):
        ids = torch.cat([shard.ids for shard in layout(count, size)])
        assert torch.equal(ids, torch.arange(count))
        assert all(shard.samples <= size for shard in layout(count, size))


def test_shards_hold_the_samples_of_one_file(tmp_path: Path, whole: np.ndarray) -> None:
    done = sharded(tmp_path / "a")
    assert done.exit_code == 0, done.output
    assert "5 shards drawn, 0 found finished" in done.stdout
    assert np.array_equal(samples(tmp_path / "a"), whole)
    assert labels(tmp_path / "a").tolist() == [i % 8 for i in range(COUNT)]
    found = manifest(tmp_path / "a")
    assert (found["status"], found["samples"], found["seed"]) == ("finished", COUNT, 0)
    assert [(s["first_id"], s["samples"]) for s in found["shards"]] == [
        *((first, 10) for first in (0, 10, 20, 30)),
        (40, 7),
    ]
    assert all(s["nfe"] == 5 for s in found["shards"])
    assert (tmp_path / "a" / "samples.png").exists()
    other = sharded(tmp_path / "b", "--shard-size", 13, "--format", "safetensors")
    assert other.exit_code == 0, other.output
    stored = [load_file(p) for p in sorted((tmp_path / "b" / "shards").glob("*.safetensors"))]
    for name, expected in (("samples", whole), ("ids", np.arange(COUNT)), ("labels", None)):
        array = torch.cat([s[name] for s in stored]).numpy()
        assert np.array_equal(array, np.arange(COUNT) % 8 if expected is None else expected)


def test_a_network_without_classes_has_no_labels(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    done = run(
        *("sample", "--model", model, "--nfe", "4", "-n", "7", "--shard-size", "4"),
        *("--out", tmp_path / "s"),
    )
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in (tmp_path / "s" / "shards").iterdir()) == [
        *("00000.json", "00000.npy", "00001.json", "00001.npy")
    ]
    assert manifest(tmp_path / "s")["data_range"] == {"low": -3.0, "high": 3.0}
    again = run(
        *("sample", "--model", model, "--nfe", "4", "-n", "7", "--shard-size", "4"),
        *("--out", tmp_path / "s"),
    )
    assert "0 shards drawn, 2 found finished" in again.stdout


def test_processes_take_shards_in_turn(
    tmp_path: Path, whole: np.ndarray, drawn: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    process(monkeypatch, 1, 2)
    done = sharded(tmp_path)
    assert done.exit_code == 0, done.output
    assert "process 1 of 2: 2 shards drawn" in done.stdout
    assert drawn == [[10, 19], [30, 39]]
    assert manifest(tmp_path)["status"] == "unfinished"
    process(monkeypatch, 0, 2)
    assert sharded(tmp_path).exit_code == 0
    assert drawn[2:] == [[0, 9], [20, 29], [40, 46]]
    assert manifest(tmp_path)["status"] == "finished"
    assert np.array_equal(samples(tmp_path), whole)
    # A process that comes late finds nothing to do, and leaves the set finished.
    process(monkeypatch, 1, 2)
    before = seen(tmp_path)
    assert "0 shards drawn, 2 found finished" in sharded(tmp_path).stdout
    assert manifest(tmp_path)["status"] == "finished"
    assert seen(tmp_path) == before


class Killed(BaseException):
    """What nothing catches."""


@pytest.mark.parametrize("write", ["write_bytes", "write_whole"])
def test_a_run_killed_while_it_writes_goes_on(
    write: str,
    tmp_path: Path,
    whole: np.ndarray,
    drawn: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = getattr(shards, write)

    def deadly(path: Path, content: Any) -> None:
        if path.name.startswith("00002."):
            raise Killed
        real(path, content)

    monkeypatch.setattr(shards, write, deadly)
    with pytest.raises(Killed):
        run(*BASE, "-n", COUNT, "--shard-size", SIZE, "--out", tmp_path / "s")
    monkeypatch.setattr(shards, write, real)
    assert manifest(tmp_path / "s")["status"] == "unfinished"
    del drawn[:]
    done = sharded(tmp_path / "s")
    assert done.exit_code == 0, done.output
    assert drawn == [[20, 29], [30, 39], [40, 46]]
    assert np.array_equal(samples(tmp_path / "s"), whole)


def test_damaged_and_missing_files_are_drawn_again(
    tmp_path: Path, whole: np.ndarray, drawn: list[list[int]]
) -> None:
    assert sharded(tmp_path).exit_code == 0
    folder = tmp_path / "shards"
    content = bytearray((folder / "00001.npy").read_bytes())
    content[-1] ^= 1
    (folder / "00001.npy").write_bytes(content)
    (folder / "00002.labels.npy").unlink()
    (folder / "00003.json").write_text("{")
    del drawn[:]
    assert sharded(tmp_path).exit_code == 0
    assert drawn == [[10, 19], [20, 29], [30, 39]]
    assert np.array_equal(samples(tmp_path), whole)


def test_a_larger_n_adds_to_the_set(
    tmp_path: Path, whole: np.ndarray, drawn: list[list[int]]
) -> None:
    assert sharded(tmp_path, count=23).exit_code == 0
    assert np.array_equal(samples(tmp_path), whole[:23])
    del drawn[:]
    assert sharded(tmp_path).exit_code == 0
    assert drawn == [[20, 29], [30, 39], [40, 46]]  # the third was not full
    assert manifest(tmp_path)["samples"] == COUNT
    assert np.array_equal(samples(tmp_path), whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seed", "1"), "holds samples of other settings (ring, ancestral, seed 0; their key is"),
        (("--nfe", "6"), "holds samples of other settings"),
        (("--label", "1"), "holds samples of other settings"),
        (("--grid", "karras"), "holds samples of other settings"),
        (("--shard-size", "9"), "was begun with --shard-size 10, got 9; keep it"),
        (("--format", "safetensors"), "was begun with --format npy, got safetensors; keep it"),
        (("-n", "46"), "is a set of 47 samples, got -n 46; give at least as many"),
        (("--shard-size", "0"), "--shard-size must be at least 1, got 0"),
        (("--format", "npz"), "unknown --format 'npz'. Did you mean 'npy'?"),
        (("--trajectory",), "--trajectory is kept of small sets only"),
    ],
)
def test_other_settings_are_refused(
    arguments: tuple[str, ...], message: str, one_set: Path
) -> None:
    before = seen(one_set), (one_set / "manifest.json").read_bytes()
    done = sharded(one_set, *arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert (seen(one_set), (one_set / "manifest.json").read_bytes()) == before


@pytest.fixture(scope="module")
def one_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    assert sharded(folder).exit_code == 0
    return folder


def test_other_folders_are_refused(
    one_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = run(*BASE, "-n", "4", "--out", one_set)
    assert small.exit_code == 2
    assert "holds a set in shards; name another folder" in small.stderr
    assert run(*BASE, "-n", "4", "--out", tmp_path / "small").exit_code == 0
    assert "that is of no set in shards" in sharded(tmp_path / "small").stderr
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thesis.tex").touch()
    assert "is not empty and holds no earlier run" in sharded(tmp_path / "else").stderr
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "RANK=2 and WORLD_SIZE=2 of the environment do not fit" in sharded(tmp_path).stderr


def test_a_large_set_is_sharded_without_being_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = (generate_shards.SampleOptions(count=n) for n in (10_000, 10_001))
    one, two = generate_shards.Process(), generate_shards.Process(0, 2)
    assert not generate_shards.is_sharded(small, one)
    assert generate_shards.is_sharded(large, one)
    assert generate_shards.is_sharded(small, two)
    # One folder for one set, whatever its size so far.
    plans = [
        generate_shards.make_shard_plan(generate_shards.SampleOptions(target="ring", count=n), one)
        for n in (20_000, 50_000)
    ]
    assert plans[0].out == plans[1].out
    assert generate_shards.key_of(plans[0]) == generate_shards.key_of(plans[1])


def test_a_full_disk_keeps_finished_shards_and_says_so(
    tmp_path: Path, whole: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync
    left = [6]  # manifest.json, two shards with labels and JSON are 7 files

    def fsync(descriptor: int) -> None:
        left[0] -= not os.path.isdir(f"/proc/self/fd/{descriptor}")
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    done = sharded(tmp_path)
    assert done.exit_code == 1, done.output
    (line,) = done.stderr.strip().splitlines()
    assert "00001.json' (No space left on device); 1 of 5 shards are finished and stay in" in line
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith((".partial", ".tmp"))]
    monkeypatch.undo()
    assert "4 shards drawn, 1 found finished" in sharded(tmp_path).stdout
    assert np.array_equal(samples(tmp_path), whole)


def environment(**more: str) -> dict[str, str]:
    repository = str(Path(__file__).parents[1])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": repository, **more}


@pytest.mark.slow
def test_torchrun_writes_the_samples_of_one_process(tmp_path: Path, whole: np.ndarray) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    launcher += ["--master-addr=127.0.0.1", f"--master-port={free_port()}", "-m", "experiments"]
    arguments = [*BASE, "-n", str(COUNT), "--shard-size", str(SIZE), "--out", "s"]
    done = subprocess.run(
        [*launcher, *arguments],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "process 0 of 2: 3 shards drawn" in done.stdout
    assert "process 1 of 2: 2 shards drawn" in done.stdout
    assert np.array_equal(samples(tmp_path / "s"), whole)
    assert manifest(tmp_path / "s")["status"] == "finished"


@pytest.mark.slow
def test_a_process_ended_by_kill_9_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments", "sample", "--target", "ring", "--nfe", "100"]
    command += ["-n", "4000", "--shard-size", "100", "--out"]
    child = subprocess.Popen(
        [*command, "killed"], cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL
    )
    while child.poll() is None and len(list(tmp_path.glob("killed/shards/*.json"))) < 4:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait(60)
    kept = {p.name for p in tmp_path.glob("killed/shards/*.json")}
    assert 4 <= len(kept) < 40
    before = seen(tmp_path / "killed")
    for out in ("killed", "alone"):
        subprocess.run([*command, out], cwd=tmp_path, env=environment(), check=True, timeout=300)
    after = seen(tmp_path / "killed")
    assert all(after[name] == before[name] for name in kept)
    assert np.array_equal(samples(tmp_path / "killed"), samples(tmp_path / "alone"))
