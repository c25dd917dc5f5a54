"""Training in processes of its own: killed at any moment, shared by two, told to stop."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from sde_diffusion.checkpoints import load_model
from sde_diffusion.storage import read_json
from sde_diffusion.training_checkpoints import CheckpointStore
from tests.trained import assert_same, weights

ROOT = Path(__file__).parents[1]
CONFIG = """
[data]
source = "points.npy"
[network]
width = 32
blocks = 1
[score]
steps = {steps}
batch_size = 32
[classifier]
steps = {others}
batch_size = 32
[judge]
steps = {others}
batch_size = 32
[run]
out = "{out}"
checkpoint_every = 3
keep_last = 2
validate_every = 20
"""


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "experiments", "train", *words]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def prepare(folder: Path, out: str, steps: int = 60, others: int = 20) -> str:
    generator = np.random.default_rng(0)
    y = np.arange(200) % 2
    np.save(folder / "points.npy", (generator.normal(size=(200, 2)) + 3 * y[:, None]))
    np.save(folder / "points_labels.npy", y)
    (folder / f"{out}.toml").write_text(CONFIG.format(out=out, steps=steps, others=others))
    return f"{out}.toml"


def finished(folder: Path, words: list[str]) -> None:
    done = subprocess.run(
        words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_it_ends_as_if_uninterrupted(tmp_path: Path) -> None:
    """SIGKILL at seeded moments of a run that writes every third step: soon after its manifest was
    replaced for the n-th time, so before, in and after steps, checkpoints and stages."""
    finished(tmp_path, command(prepare(tmp_path, "whole")))
    config = prepare(tmp_path, "parts")
    moments, out = random.Random(3), tmp_path / "parts"
    states: list[object] = []
    for _ in range(6):
        resume = ["--resume"] if out.exists() else []
        child = subprocess.Popen(
            command(config, *resume),
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(moments.randrange(1, 8)):
            before = snapshot(out)
            while child.poll() is None and snapshot(out) == before:
                time.sleep(0.0005)
        time.sleep(moments.uniform(0.0, 0.02))
        child.send_signal(signal.SIGKILL)
        child.wait()
        if child.returncode != -signal.SIGKILL:
            break
        states.append(newest(out))
    assert len(states) >= 3
    assert len(set(states)) >= 3, states  # at different places, and forward
    if (out / "checkpoints").exists():
        finished(tmp_path, command(config, "--resume"))
    assert_same(tmp_path / "whole", out)
    history = [read_json(p / "model.json")["training"] for p in (out, tmp_path / "whole")]
    assert history[0]["validation"] == history[1]["validation"]
    assert not (out / "checkpoints").exists()


def snapshot(out: Path) -> object:
    manifest = out / "checkpoints" / "manifest.json"
    return manifest.stat().st_mtime_ns if manifest.exists() else None


def newest(out: Path) -> object:
    if not (out / "checkpoints" / "manifest.json").exists():
        return "none"
    _, _, info = CheckpointStore(out).read()
    return info["current"], info["done"], len(info["finished"])


@pytest.mark.slow
def test_two_processes_reach_the_validation_loss_of_one(tmp_path: Path) -> None:
    """At the same global batch the gradients are the same but for rounding, float32 epsilon 1e-7 a
    step; 60 steps of AdamW, which divides small gradients by their own size, may enlarge it to
    1e-4 of the loss. Without the exchange of gradients the two differ by a hundred times that."""
    finished(tmp_path, command(prepare(tmp_path, "one")))
    config = prepare(tmp_path, "two")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    launcher += ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    finished(tmp_path, [*launcher, "-m", "experiments", "train", config])
    one, two = (load_model(tmp_path / name) for name in ("one", "two"))
    assert two.training["processes"] == 2
    losses = [m.training["validation"][-1]["loss"] for m in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for bucket, other in zip(
        *(m.training["validation"][-1]["by_time"] for m in (one, two)), strict=True
    ):
        assert other["mean"] == pytest.approx(bucket["mean"], rel=1e-3)
    for name, tensor in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], tensor, rtol=5e-3, atol=5e-4)


def free_port() -> int:
    import socket

    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        return port


@pytest.mark.slow
def test_sigterm_leaves_a_checkpoint_and_the_runner_can_go_on(tmp_path: Path) -> None:
    config = prepare(tmp_path, "m", 100_000)
    child = subprocess.Popen(
        command(config),
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        stdout=subprocess.DEVNULL,
    )
    out = tmp_path / "m"
    while child.poll() is None and (snapshot(out) is None or newest_step(out) < 6):
        time.sleep(0.02)
    child.terminate()
    _, error = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "continue with resume (--resume)" in error
    assert newest_step(out) >= 6


def newest_step(out: Path) -> int:
    entries = read_json(out / "checkpoints" / "manifest.json")["checkpoints"]
    step: int = entries[-1]["step"]
    return step
