"""Networks from elsewhere: by factory, by diffusers folder; features and metrics for them."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchmetrics.image import fid
from typer.testing import CliRunner

from experiments import compare, extractors
from experiments.cli import app
from experiments.compare import CompareOptions, make_plan
from experiments.generate import SampleOptions
from experiments.generate import make_plan as sample_plan
from experiments.metrics import frechet_from_moments
from experiments.subjects import SubjectOptions, make_subjects
from sde_diffusion.samples import as_tensor
from tests import own_models
from tests.test_compare import Silent

HERE = "tests.own_models"
SMALL: dict[str, Any] = {"solvers": ("ddim",), "budgets": (10,), "samples": 60, "repeats": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("data") / "mixture.npy"
    np.save(file, own_models.MIXTURE.sample(2000, 0)[0].numpy())
    return str(file)


def rows(tmp_path: Path, **options: Any) -> list[dict[str, Any]]:
    plan = make_plan(CompareOptions(**{**SMALL, **options}, out=str(tmp_path)))
    compare.run(plan, Silent())
    found: list[dict[str, Any]] = json.loads((tmp_path / "results.json").read_text())["rows"]
    return found


def test_a_network_by_its_factory_scores_as_by_its_folder(tmp_path: Path) -> None:
    given: dict[str, Any] = {"samples": 30, "budgets": (4,)}
    (by_folder,) = rows(tmp_path / "a", models=("digits-vp",), **given)
    (by_factory,) = rows(
        tmp_path / "b", models=(f"{HERE}:digits",), data="digits", features="digits-vp", **given
    )
    value = {k: v["value"] for k, v in by_folder["metrics"].items()}
    assert {k: v["value"] for k, v in by_factory["metrics"].items()} == pytest.approx(value)
    assert set(value) == {"frechet", "accuracy", "rms", "median"}
    assert by_factory["floor"] == by_folder["floor"]
    assert by_factory["target"] == f"{HERE}:digits"


def test_every_metric_of_an_exact_network_is_near_its_floor(tmp_path: Path, data: str) -> None:
    metrics = ("kid", "frechet", "precision", "recall", "density", "coverage")
    (row,) = rows(
        tmp_path,
        models=(f"{HERE}:mixture",),
        data=data,
        features="raw",
        metrics=metrics,
        budgets=(40,),
        samples=200,
        repeats=2,
    )
    assert row["primary"] == "kid"
    found, floor = row["metrics"], row["floor"]
    assert set(floor) == set(metrics)
    for name in ("precision", "recall", "coverage"):
        assert found[name]["value"] == pytest.approx(floor[name]["value"], abs=0.1)
        assert floor[name]["value"] > 0.7
    assert found["density"]["value"] == pytest.approx(1.0, abs=0.2)
    # Of two sets of 200 samples the Fréchet distance has a mean of about tr(Sigma) 2/200.
    assert 0 < found["frechet"]["value"] < 0.02
    assert abs(found["kid"]["value"]) < 0.02


def test_features_change_what_is_compared(tmp_path: Path, data: str) -> None:
    def frechet(features: str) -> float:
        options = {"models": (f"{HERE}:mixture",), "data": data, "features": features}
        (row,) = rows(tmp_path / features.replace(":", "-"), **options)
        return float(row["metrics"]["frechet"]["value"])

    (subject,) = make_subjects(SubjectOptions((), (f"{HERE}:mixture",), (), data, "raw"))
    plan = sample_plan(SampleOptions(model=f"{HERE}:mixture", solver="ddim", nfe=10))
    x = plan.machine.draw(
        subject.score_of("vp", plan.condition), subject.sdes["vp"], plan.solver,
        event_shape=(2,), ids=torch.arange(60), steps=10, seed=0,
    ).x.double()  # fmt: skip
    real = as_tensor(subject.data.train_x).double()  # type: ignore[attr-defined]

    def expected(columns: slice) -> float:
        parts = [part[:, columns] for part in (x, real)]
        moments = [(p.mean(0), torch.cov(p.T).reshape(p.shape[1], -1)) for p in parts]
        return frechet_from_moments(*moments[0], *moments[1])

    assert frechet("raw") == pytest.approx(expected(slice(None)), rel=1e-4)
    assert frechet(f"{HERE}:first_value") == pytest.approx(expected(slice(1)), rel=1e-4)
    assert frechet("random") > 0


def test_keys_know_the_weights_the_features_and_the_metrics(data: str) -> None:
    def identity(model: str = "mixture", features: str = "raw", metrics: Any = ()) -> Any:
        options = SubjectOptions((), (f"{HERE}:{model}",), (), data, features, metrics)
        return make_subjects(options)[0].identity("vp")

    assert identity() == identity()
    others = [identity("untrained"), identity(features="random"), identity(metrics=("kid",))]
    assert all(other != identity() for other in others)
    assert identity("untrained") == identity("untrained")  # drawn by a seed of their own


def test_metrics_of_a_model_folder_have_a_floor(tmp_path: Path) -> None:
    metrics = ("frechet", "recall", "accuracy")
    (row,) = rows(
        tmp_path, targets=("digits",), sdes=("vp",), metrics=metrics, samples=40, budgets=(4,)
    )
    assert set(metrics) == set(row["floor"]) == set(row["metrics"]) - {"rms", "median"}
    assert 0 <= row["metrics"]["recall"]["value"] <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": (f"{HERE}:mixture",)}, "no features to compare.*raw, random.*no real samples"),
        ({"models": (f"{HERE}:mixture",), "features": "raw"}, "needs real samples.*give --data"),
        ({"models": (f"{HERE}:untrained",)}, "does not say the shape.*event_shape.*--data"),
        ({"models": (f"{HERE}:breaks",)}, "cannot be made .KeyError: 'weights'"),
        ({"models": (f"{HERE}:gives_nothing",)}, r"must return \(model, sde\).*got NoneType"),
        ({"models": (f"{HERE}:mixtur",)}, "unknown name 'mixtur'. Did you mean 'mixture'"),
        ({"models": ("nowhere:model",)}, "--model: the module 'nowhere' cannot be imported"),
        ({"targets": ("ring",), "metrics": ("kid",)}, "are for networks"),
        ({"targets": ("digits",), "metrics": ("fid",)}, "unknown --metrics 'fid'"),
        ({"targets": ("digits",), "features": "nothing"}, "--features must be raw, random"),
        (
            {"targets": ("digits",), "features": f"{HERE}:of_wrong_shape"},
            r"must give a tensor \(2, F\)",
        ),
        ({"targets": ("digits",), "features": "raw", "metrics": ("accuracy",)}, "knows classes"),
    ],
)
def test_what_is_missing_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(CompareOptions(**{**SMALL, **options}))


def test_a_bare_network_is_told_to_be_wrapped(data: str) -> None:
    with pytest.raises(ValueError, match="wrap a network in EpsModel"):
        make_subjects(SubjectOptions((), (f"{HERE}:bare_network",), (), data))


def test_inception_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch, data: str) -> None:
    def raising(error: Exception) -> Any:
        def made(*_: Any) -> Any:
            raise error

        return made

    monkeypatch.setattr(fid, "NoTrainInceptionV3", raising(ModuleNotFoundError("torch_fidelity")))
    with pytest.raises(ValueError, match=r"needs torch-fidelity; .*sde-diffusion\[fid\]"):
        extractors.Inception()
    monkeypatch.setattr(fid, "NoTrainInceptionV3", raising(URLError("no route to host")))
    with pytest.raises(ValueError, match=r"no route.*put weights-inception.*into .*checkpoints"):
        extractors.Inception()
    with pytest.raises(ValueError, match="needs images"):
        make_subjects(SubjectOptions((), (f"{HERE}:mixture",), (), data, "inception"))


def test_inception_is_given_colours_in_eight_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    class Network(torch.nn.Module):
        def __init__(self, *_: Any) -> None:
            super().__init__()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.dtype == torch.uint8
            return x.flatten(1).float()

    monkeypatch.setattr(fid, "NoTrainInceptionV3", Network)
    grey = torch.tensor([-2.0, -1.0, 0.0, 1.0]).reshape(1, 1, 2, 2)
    found = extractors.Inception().features(grey)
    assert found.tolist() == [[0.0, 0.0, 128.0, 255.0] * 3]


def test_a_folder_of_diffusers_is_a_model(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1,
        block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    unet.save_pretrained(tmp_path / "theirs" / "unet")
    diffusers.DDPMScheduler().save_pretrained(tmp_path / "theirs" / "scheduler")
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((50, 1, 8, 8), dtype=np.float32))
    (row,) = rows(
        tmp_path / "run",
        models=(str(tmp_path / "theirs"),),
        data=str(tmp_path / "x.npy"),
        features="random",
        samples=8,
        budgets=(2,),
    )
    assert (row["target"], row["status"]) == ("theirs", "ok")
    assert row["metrics"]["frechet"]["value"] > 0


def test_the_example_of_the_documents_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parent.parent / "docs" / "own-models.md").read_text()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name, code in re.findall(r"`(\w+\.py)`:\n\n```python\n(.*?)```", text, re.DOTALL):
        (tmp_path / name).write_text(code)
    commands = re.findall(r"^sde-diffusion .*?[^\\]$", text, re.DOTALL | re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        words = shlex.split(command.replace("\\\n", " "))[1:]
        done = CliRunner().invoke(app, [*words, "--samples", "20", "--repeats", "1", "--jobs", "1"])
        assert done.exit_code == 0, done.output
