"""The command line: what it writes, and one clear line with an exit code for every mistake."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from experiments.cli import app
from experiments.results import load_results, results_schema
from sde_diffusion import VPSDE, EpsModel
from sde_diffusion.checkpoints import FeatureStatistics, save_model
from sde_diffusion.data import DataDescription, Scaling
from sde_diffusion.networks import MLP, RandomFeatures

SCRIPT = Path(sys.executable).with_name("sde-diffusion")


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def script(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """The installed console script, with warnings on stderr."""
    return subprocess.run(
        [str(SCRIPT), *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def run_script(*arguments: str | Path) -> Any:
    """What ``run`` does in this process, by the installed script."""
    done = script(*arguments, folder=Path.cwd())
    return SimpleNamespace(
        exit_code=done.returncode,
        stdout=done.stdout,
        stderr=done.stderr,
        output=done.stdout + done.stderr,
    )


@pytest.fixture(
    params=[
        pytest.param(run, id="in-process"),
        pytest.param(run_script, id="installed-script", marks=pytest.mark.slow),
    ]
)
def call(request: pytest.FixtureRequest) -> Any:
    """The command line in this process; in the slow suite also the installed script."""
    return request.param


def refused(result: Any) -> str:
    """The one line of an error; checks that it is one, without a traceback, with exit code 2."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


def tiny_model(folder: Path, *, broken: bool = False) -> Path:
    """An untrained model of 2-D data without classes; a broken one overflows."""
    net = MLP((2,), None, width=8, blocks=1)
    if broken:
        with torch.no_grad():
            for weights in net.parameters():
                weights.fill_(3e38)
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    judge = RandomFeatures((2,))
    judge.fit(x, torch.Generator().manual_seed(0))
    return save_model(
        folder,
        EpsModel(net, VPSDE()),
        data=DataDescription("gone.npy", (2,), None, (), Scaling(-3.0, 3.0), 48, 16),
        judge=judge,
        reference={k: FeatureStatistics.of(judge, x) for k in ("train", "test")},
        half=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


def test_help_is_quick_and_shows_examples(folder: Path) -> None:
    started = time.monotonic()
    shown = script("--help", folder=folder)
    assert time.monotonic() - started < 3
    assert shown.returncode == 0
    assert shown.stderr == ""
    for command in ("compare", "steps", "train", "sample", "solvers", "targets"):
        assert command in shown.stdout
    assert "Examples" in run("compare", "--help").stdout


def test_compare_through_the_installed_script(folder: Path) -> None:
    done = script(
        *("compare", "--target", "ring", "--nfe", "6,12", "--samples", "60", "--repeats", "2"),
        *("--out", "run"),
        folder=folder,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "floor: true vs true" in done.stdout
    assert "±" in done.stdout
    results = load_results(folder / "run")
    jsonschema.Draft202012Validator(results_schema()).validate(results)
    assert len(results["rows"]) == 2 * 4 * 2
    assert results["command"].startswith("sde-diffusion compare --target ring")
    for name in ("quality_vs_nfe.png", "quality_vs_seconds.png", "samples.png"):
        with Image.open(folder / "run" / name) as picture:
            assert picture.width >= 1000


@pytest.mark.parametrize(
    ("jobs", "where"), [("1", " at ring · vp · ancestral · 2000 evaluations"), ("2", "")]
)
def test_ctrl_c_keeps_finished_rows_and_says_where(folder: Path, jobs: str, where: str) -> None:
    arguments = ["compare", "--target", "ring", "--nfe", "5,2000", "--out", f"stopped{jobs}"]
    arguments += ["--samples", "3000", "--jobs", jobs]
    process = subprocess.Popen(
        [str(SCRIPT), *arguments], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    file = folder / f"stopped{jobs}" / "results.json"
    try:
        for _ in range(600):
            if file.exists() and json.loads(file.read_text())["rows"]:
                break
            time.sleep(0.1)
        time.sleep(0.5)  # the next cell, which takes many seconds, is under way
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    message = stderr.decode().strip()
    assert message.startswith(f"error: interrupted{where}; 1 of 16 rows are finished and kept in")
    results = load_results(folder / f"stopped{jobs}")
    assert results["status"] == "interrupted"
    assert len(results["rows"]) == 1


def test_train_compare_and_sample_with_data_of_ones_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    generator = np.random.default_rng(0)
    labels = np.arange(120) % 2
    points = generator.normal(size=(120, 2)).astype(np.float32) + 4 * labels[:, None]
    np.save("mine.npy", points)
    np.save("mine_labels.npy", labels)
    trained = run("train", "mine.npy", "--steps", "20", "--out", "model")
    assert trained.exit_code == 0, trained.output
    assert "96 samples of shape (2,), 2 classes; 24 held out" in trained.stdout
    assert "next: sde-diffusion compare --model model" in trained.stdout

    again = run("train", "mine.npy", "--steps", "20", "--out", "model")
    assert "is not empty" in refused_after_output(again)

    guided = ("--guidance", "cfg", "--scale", "2", "--samples", "20", "--repeats", "2")
    nfe = ("--nfe", "6", "--solver", "ddim", "--solver", "ancestral")
    compared = run("compare", "--model", "model", "--data", "mine.npy", *guided, *nfe, "--out", "c")
    assert compared.exit_code == 0, compared.output
    rows = load_results("c")["rows"]
    assert {row["target"] for row in rows} == {"model"}
    assert {row["guidance"] for row in rows} == {"cfg"}
    assert all(row["network_passes"] == 2 * row["nfe"] == 12 for row in rows)
    assert all(set(row["metrics"]) >= {"frechet", "accuracy"} for row in rows)
    assert load_results("c")["floor"]["model"]["frechet"]["value"] >= 0

    sampled = run(
        *("sample", "--model", "model", "-n", "10", "--nfe", "8", "--label", "1"),
        *("--trajectory", "--batch-size", "3", "--out", "s"),
    )
    assert sampled.exit_code == 0, sampled.output
    manifest = json.loads(Path("s/manifest.json").read_text())
    x = np.load("s/samples.npy")
    assert x.shape == (10, 2)
    assert manifest["nfe"] == 8
    assert manifest["label"] == 1
    assert manifest["data_range"]["low"] == pytest.approx(float(points.min()))
    assert sorted(manifest["files"]) == sorted(p.name for p in Path("s").iterdir())
    assert np.load("s/labels.npy").tolist() == [1] * 10
    assert np.load("s/trajectory.npy").shape == (5, 10, 2)


def refused_after_output(result: Any) -> str:
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_images_of_ones_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    generator = np.random.default_rng(0)
    Path("faces").mkdir()
    for i in range(12):
        pixels = generator.integers(0, 255, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(f"faces/{i}.png")
    trained = run("train", "faces", "--sde", "ve", "--steps", "3", "--out", "faces-model")
    assert trained.exit_code == 0, trained.output
    sampled = run(
        *("sample", "--model", "faces-model", "-n", "4", "--nfe", "4", "--trajectory", "--out", "f")
    )
    assert sampled.exit_code == 0, sampled.output
    assert np.load("f/samples.npy").shape == (4, 1, 8, 8)
    with Image.open("f/samples.png") as picture:
        assert picture.width > 400
    message = refused(run("compare", "--model", "faces-model", "--guidance", "cfg"))
    assert "'faces-model' is not class-conditional" in message


def test_steps_fits_the_order(folder: Path) -> None:
    out = folder / "steps"
    done = run(
        *("steps", "--target", "gaussian", "--sde", "vp", "--steps", "16,32,64", "--out", out),
        *("--solver", "probability_flow", "--solver", "euler_maruyama", "--samples", "200"),
    )
    assert done.exit_code == 0, done.output
    assert (out / "error_vs_steps.png").exists()
    results = load_results(out)
    jsonschema.Draft202012Validator(results_schema()).validate(results)
    errors = {r["steps"]: r["metrics"]["error"]["value"] for r in results["rows"][:3]}
    assert errors[32] / errors[64] == pytest.approx(4, rel=0.15)  # order 2
    assert results["rows"][3]["error"].startswith("weak")


def test_lists_show_every_solver_and_target() -> None:
    shown = run("solvers").stdout
    for name in ("ancestral", "torchdiffeq_ode", "langevin", "order 2", "method=heun"):
        assert name in shown
    shown = run("targets").stdout
    for name in ("ring", "moons", "spiral", "gmm16", "gaussian"):
        assert name in shown


def test_a_network_that_overflows_fails_its_cells_and_the_rest_go_on(
    call: Any, tmp_path: Path
) -> None:
    broken = tiny_model(tmp_path / "broken", broken=True)
    out = tmp_path / "out"
    partly = call(
        *("compare", "--target", "ring", "--model", broken, "--sde", "vp", "--solver", "ddim"),
        *("--nfe", "5", "--samples", "10", "--repeats", "1", "--out", out),
    )
    assert partly.exit_code == 3, partly.output
    said = " ".join(partly.stdout.split())
    assert "failed: broken · vp · ddim · 5: NonFiniteError" in said
    assert "NaN or infinity at step 0, t = 1" in said
    results = load_results(out)
    assert results["status"] == "finished"
    assert [row["status"] for row in results["rows"]] == ["ok", "failed"]
    assert results["rows"][1]["metrics"] == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("compare --target rnig", "unknown --target 'rnig'. Did you mean 'ring'? Known: digits,"),
        ("compare --target ring --sde v", "unknown --sde 'v'. Did you mean"),
        ("compare --target ring --solver ancestrl", "--solver: unknown solver 'ancestrl'. Did you"),
        ("compare --target ring --solver ddim:eta=x", "--solver 'ddim': eta must be a number"),
        ("compare --target ring --solver langevin", "use predictor_corrector:corrector=langevin"),
        ("compare --target ring --nfe 0", "--nfe must be at least 1, got 0"),
        ("compare --target ring --nfe ten", "--nfe must be whole numbers, as in --nfe 10,20"),
        ("compare --target ring --nfe 3 --solver probability_flow:method=rk4", "at least 4"),
        ("compare --target ring --guidance cfg --label 9", "--label must lie in 0..7 for 'ring'"),
        ("compare --target ring --scale 3", "add --guidance cfg"),
        ("compare --target ring --guidance cfg --scale x", "--scale must be numbers"),
        ("compare --target ring --device gpu", "--device 'gpu' cannot be used here"),
        ("compare --model no-such", "--model: unknown model 'no-such'"),
        ("compare --target ring --out /proc/no", "--out '/proc/no' cannot be written"),
        ("compare --nfee 3", "No such option: --nfee"),
        ("sample --nfe 0", "--nfe must be at least 1"),
        ("sample -n 0", "-n must be at least 1"),
        ("sample -n many", "Invalid value for '-n'"),
        ("sample --target ring --model x", "--model and --target are two things"),
        ("sample --target ring --trajectory --solver scipy_ode", "--trajectory needs a solver"),
        ("sample --target ring --scale 2", "--scale 2 has nothing to scale"),
        ("steps --steps 8", "--steps needs at least two different numbers"),
        ("steps --steps 0,8", "--steps must be at least 1, got 0"),
        ("steps --solver torchdiffeq_ode", "chooses its own steps"),
        ("train dgits", "unknown data set 'dgits'. Did you mean 'digits'"),
        ("train digits --steps 0", "--steps must be at least 1, got 0"),
        ("train digits --sde vx", "unknown --sde 'vx'. Did you mean"),
        ("train nothing.npy", "'nothing.npy' does not exist"),
        ("train", "Missing argument 'DATA'"),
        ("compair", "No such command 'compair'"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(
    call: Any, arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(call(*arguments.split()))
    assert list(tmp_path.iterdir()) == []


def test_data_and_models_that_do_not_fit(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("nan.npy", np.array([[1.0, np.nan], [0.0, np.inf]]))
    np.save("text.npy", np.array(["a", "b"]))
    np.save("wide.npy", np.random.default_rng(0).normal(size=(20, 3)))
    tiny_model(tmp_path / "model")
    (tmp_path / "empty").mkdir()

    assert "holds 2 NaN or infinite value(s)" in refused(call("train", "nan.npy"))
    assert "save it as numbers" in refused(call("train", "text.npy"))
    assert "is not a model folder" in refused(call("compare", "--model", "empty"))
    message = refused(call("compare", "--model", "model", "--data", "wide.npy"))
    assert "shape (3,)" in message
    assert "makes (2,)" in message
    assert "NaN" in refused(call("compare", "--model", "model", "--data", "nan.npy"))
    assert "trained under vp" in refused(call("compare", "--model", "model", "--sde", "ve"))
    message = refused(call("compare", "--model", "model", "--label", "1"))
    assert "--label 1 needs classes, and 'model' is not class-conditional" in message
    assert "needs classes" in refused(
        call("sample", "--model", "model", "--guidance", "classifier")
    )
    assert "--model" in refused(call("compare", "--target", "model"))

    weights = tmp_path / "model" / "score.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "truncated or corrupt" in refused(call("compare", "--model", "model"))
    (tmp_path / "model" / "model.json").write_text("{")
    assert "not valid JSON" in refused(call("sample", "--model", "model"))


def test_a_folder_that_cannot_be_written(call: Any, tmp_path: Path) -> None:
    """Below a file there is no folder, for root neither."""
    (tmp_path / "run").write_text("")
    message = refused(call("compare", "--target", "ring", "--out", tmp_path / "run" / "a"))
    assert "cannot be written" in message
