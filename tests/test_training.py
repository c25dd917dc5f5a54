"""Training: it learns, it stops where told, and it goes on as if it had not stopped."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sde_diffusion import EDMSDE, SDE, VESDE, VPSDE, CosineVPSDE, EDMModel, EpsModel, SubVPSDE
from sde_diffusion.checkpoints import CheckpointError, load_model
from sde_diffusion.loop import Batch, Loop, StageSettings, Task, generator_for, seeded
from sde_diffusion.losses import simple_loss
from sde_diffusion.networks import MLP, RandomFeatures, UNet
from sde_diffusion.training import (
    NonFiniteLossError,
    Progress,
    TrainingInterrupted,
    TrainSettings,
    train,
)
from tests.trained import SETTINGS, assert_same, points, run, stop_at, weights


@pytest.mark.parametrize("event", [(2,), (), (1, 8, 8)], ids=str)
@pytest.mark.parametrize(
    "sde, kind",
    [
        (VPSDE(), EpsModel),
        (SubVPSDE(), EpsModel),
        (CosineVPSDE(), EpsModel),
        (VESDE(), EDMModel),
        (EDMSDE(), EDMModel),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_run_makes_a_model_folder(tmp_path: Path, event, sde: SDE, kind: type) -> None:
    settings = SETTINGS.with_steps(2)
    loaded = load_model(run(tmp_path / "m", points(event), sde, settings=settings))
    assert isinstance(loaded.model, kind)
    assert loaded.sde == sde
    assert loaded.classifier is not None
    assert loaded.reference["train"].count == 32
    assert not (tmp_path / "m" / "checkpoints").exists()
    x = torch.zeros(3, *event)
    x0 = loaded.model(x, sde.at(torch.tensor(0.5)), torch.tensor([0, 1, 2])).x0
    assert bool(x0.isfinite().all())


def test_without_labels_the_model_is_unconditional(tmp_path: Path) -> None:
    loaded = load_model(run(tmp_path / "m", points(classes=None)))
    assert loaded.null_label is None
    assert loaded.classifier is None
    assert isinstance(loaded.judge, RandomFeatures)
    assert torch.linalg.eigvalsh(loaded.reference["train"].covariance).max() > 0.01


def test_the_same_seed_gives_the_same_weights_whatever_the_global_state(tmp_path: Path) -> None:
    run(tmp_path / "a", seed=3)
    torch.rand(7)
    before = torch.get_rng_state()
    run(tmp_path / "b", seed=3)
    assert torch.equal(before, torch.get_rng_state())
    assert_same(tmp_path / "a", tmp_path / "b")
    run(tmp_path / "c", seed=4)
    assert not torch.equal(
        weights(tmp_path / "a")["score.inlet.weight"], weights(tmp_path / "c")["score.inlet.weight"]
    )


@pytest.mark.parametrize("event", [(2,), (1, 8, 8)], ids=str)
@pytest.mark.parametrize(
    "stage, step",
    [
        ("score network", 1),
        ("score network", 5),
        ("score network", 8),
        ("classifier", 2),
        ("judge", 4),
    ],
)
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path: Path, event, stage: str, step: int) -> None:
    data = points(event)
    run(tmp_path / "whole", data)
    with pytest.raises(
        TrainingInterrupted, match=f"interrupted in the {stage}, after step {step}"
    ) as caught:
        run(tmp_path / "parts", data, on_step=stop_at(stage, step))
    assert caught.value.checkpoint.parent == tmp_path / "parts" / "checkpoints"
    assert caught.value.checkpoint.exists()
    steps: list[Progress] = []
    run(tmp_path / "parts", data, resume=True, on_step=steps.append)
    lengths = {"score network": 8, "classifier": 6, "judge": 4}
    before = sum(list(lengths.values())[: list(lengths).index(stage)]) + step
    assert len(steps) == sum(lengths.values()) - before
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_resumed_from_a_periodic_checkpoint_after_a_hard_death(tmp_path: Path) -> None:
    """A step that dies without a handler leaves the last periodic checkpoint, three steps apart."""
    run(tmp_path / "whole")

    class Death(BaseException):
        pass

    def die(event: Progress) -> None:
        if event.step == 5:
            raise Death

    with pytest.raises(Death):
        run(tmp_path / "parts", on_step=die)
    steps: list[Progress] = []
    run(tmp_path / "parts", resume=True, on_step=steps.append)
    assert steps[0].step == 4
    assert_same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_step_and_leaves_the_handler_as_it_was(
    tmp_path: Path, sent: signal.Signals
) -> None:
    before = signal.getsignal(sent)
    done: list[int] = []

    def press(event: Progress) -> None:
        done.append(event.step)
        if event.step == 2:
            os.kill(os.getpid(), sent)

    with pytest.raises(TrainingInterrupted, match="after step 2 of 8"):
        run(tmp_path / "m", on_step=press)
    assert done == [1, 2]
    assert signal.getsignal(sent) is before
    run(tmp_path / "m", resume=True)
    run(tmp_path / "whole")
    assert_same(tmp_path / "whole", tmp_path / "m")


def test_resume_wants_the_same_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing to resume"):
        run(tmp_path / "m", resume=True)
    with pytest.raises(TrainingInterrupted):
        run(tmp_path / "m", on_step=stop_at("score network", 2))
    for other, name in (
        ({"seed": 1}, "another seed"),
        ({"sde": VESDE()}, "another sde"),
        ({"data": points(n=60)}, "another data"),
        ({"steps": 5}, "another settings"),
    ):
        with pytest.raises(CheckpointError, match=name):
            run(tmp_path / "m", resume=True, **other)
    with pytest.raises(CheckpointError, match="unfinished training; continue it with resume"):
        run(tmp_path / "m")
    run(tmp_path / "m", resume=True)
    # Finished: nothing to do, unless it was another run.
    assert run(tmp_path / "m", resume=True) == tmp_path / "m"
    with pytest.raises(CheckpointError, match="another seed"):
        run(tmp_path / "m", resume=True, seed=1)


def test_an_output_folder_in_use_or_unusable(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="is not empty"):
        run(tmp_path / "mine")
    with pytest.raises(CheckpointError, match="is a file"):
        run(tmp_path / "mine" / "thesis.txt")
    with pytest.raises(CheckpointError, match="cannot be made"):
        run(tmp_path / "mine" / "thesis.txt" / "m")
    run(tmp_path / "m")
    with pytest.raises(CheckpointError, match="is not empty"):
        run(tmp_path / "m")
    run(tmp_path / "m", overwrite=True, seed=1)
    assert load_model(tmp_path / "m").training["seed"] == 1


def test_labels_and_arguments_that_do_not_fit(tmp_path: Path) -> None:
    data = points()
    assert data.train_y is not None
    with pytest.raises(ValueError, match=r"train_y holds the label 2; labels must lie in 0\.\.1"):
        run(tmp_path / "m", replace(data, train_y=data.train_y + 1))
    with pytest.raises(ValueError, match="must both be given"):
        run(tmp_path / "m", replace(data, train_y=None))
    with pytest.raises(ValueError, match="train_y has shape"):
        run(tmp_path / "m", replace(data, train_y=data.train_y[:5]))
    bad = data.train_x.clone()
    bad[0, 0] = float("nan")
    with pytest.raises(ValueError, match="train_x holds NaN"):
        run(tmp_path / "m", replace(data, train_x=bad))
    for steps in (0, -1):
        with pytest.raises(ValueError, match=f"steps must be at least 1, got {steps}"):
            run(tmp_path / "m", steps=steps)
    with pytest.raises(ValueError, match="seed"):
        run(tmp_path / "m", seed=-1)
    with pytest.raises(ValueError, match="Did you mean 'digits'"):
        train("digts", VPSDE(), tmp_path / "m", progress=False)
    assert not (tmp_path / "m").exists()


def test_a_loss_that_is_nan_stops_at_its_step_and_keeps_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def poisoned(*arguments) -> Tensor:
        nonlocal calls
        calls += 1
        return simple_loss(*arguments) * (float("nan") if calls == 6 else 1.0)

    patience = replace(SETTINGS, score=replace(SETTINGS.score, non_finite_patience=1))
    monkeypatch.setattr("sde_diffusion.objectives.simple_loss", poisoned)
    with pytest.raises(
        NonFiniteLossError, match="score network was not finite at step 5"
    ) as caught:
        run(tmp_path / "m", settings=patience)
    assert (caught.value.stage, caught.value.step) == ("score network", 5)
    assert "checkpoint is kept" in str(caught.value)
    monkeypatch.undo()
    run(tmp_path / "m", settings=patience, resume=True)
    run(tmp_path / "whole", settings=patience)
    assert_same(tmp_path / "whole", tmp_path / "m")


def test_an_update_that_is_not_finite_is_skipped_counted_and_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def poisoned(*arguments) -> Tensor:
        nonlocal calls
        calls += 1
        return simple_loss(*arguments) * (float("inf") if calls in (3, 4, 6) else 1.0)

    monkeypatch.setattr("sde_diffusion.objectives.simple_loss", poisoned)
    seen: list[int] = []

    def note(event: Progress) -> None:
        if event.stage == "score network":
            seen.append(event.skipped)

    patience = replace(SETTINGS, score=replace(SETTINGS.score, non_finite_patience=3))
    out = run(tmp_path / "m", settings=patience, on_step=note)
    assert seen == [0, 0, 1, 2, 2, 3, 3, 3]
    loaded = load_model(out)
    assert loaded.training["skipped"]["score network"] == 3
    assert all(bool(p.isfinite().all()) for p in loaded.model.parameters())


def test_steps_scale_every_stage() -> None:
    settings = TrainSettings()
    half = settings.with_steps(settings.score.steps // 2)
    assert half.classifier.steps == settings.classifier.steps // 2
    assert settings.with_steps(1).judge.steps == 1


def test_the_learning_rate_warms_up_and_decays() -> None:
    settings = StageSettings(steps=100, warmup=10, learning_rate=1.0)
    rates = [settings.rate(step) for step in range(100)]
    assert rates.index(max(rates)) == 10
    assert max(rates) == pytest.approx(1.0)
    assert all(a < b for a, b in pairwise(rates[:11]))
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert rates[-1] < 1e-3


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": 5, "batch_size": 0}, "batch_size"),
        ({"steps": 5, "learning_rate": 0.0}, "learning_rate"),
        ({"steps": 5, "ema_decay": 1.5}, "ema_decay"),
        ({"steps": 5, "clip": float("nan")}, "clip"),
    ],
)
def test_stage_settings_are_checked(bad: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StageSettings(**bad)


def test_training_lowers_the_loss_and_the_average_follows() -> None:
    data = points(n=200)
    sde = VPSDE()
    net = seeded(lambda: MLP((2,), 2, width=32, blocks=2), 0)

    def draw(generator: torch.Generator) -> Batch:
        index = torch.randint(len(data.train_x), (64,), generator=generator)
        t = torch.rand(64, generator=generator) * 0.99 + 0.01
        assert data.train_y is not None
        noise = torch.randn(64, 2, generator=generator)
        return data.train_x[index], data.train_y[index], t, noise

    def loss(network, batch: Batch) -> Tensor:
        x, label, t, noise = batch
        return simple_loss(EpsModel(network, sde), x, label, sde.at(t), noise)

    settings = StageSettings(
        steps=300, batch_size=64, learning_rate=3e-3, warmup=20, ema_decay=0.98
    )
    loop = Loop("net", net, Task(draw, loss), settings, 0, 0)
    losses = [float(loop.step()) for _ in range(300)]
    first, last = sum(losses[:20]) / 20, sum(losses[-50:]) / 50
    assert last < 0.55 * first
    with torch.no_grad():
        averaged = (
            sum(
                float(loss(loop.average, draw(generator_for(9, step))).mean()) for step in range(50)
            )
            / 50
        )
    assert averaged < 0.55 * first


def test_a_saved_loop_keeps_its_memory_layout() -> None:
    """The fused optimizer walks memory: moments must lie as their weights do (channels last)."""
    net = UNet((1, 8, 8), None, channels=(8,), patch_size=2)

    task = Task(
        lambda generator: (torch.randn(4, 1, 8, 8, generator=generator),),
        lambda network, batch: (
            (network(batch[0], torch.ones(4)) - batch[0]).square().mean((1, 2, 3))
        ),
    )
    loop = Loop("net", net, task, StageSettings(steps=5, batch_size=4), 0, 0)
    loop.step()
    state = loop.state()
    other = Loop(
        "net",
        UNet((1, 8, 8), None, channels=(8,), patch_size=2),
        task,
        StageSettings(steps=5, batch_size=4),
        0,
        0,
    )
    other.load(state, 1)
    for one, two in zip(net.parameters(), other.net.parameters(), strict=True):
        moments = other._optimizer.state[two]
        assert one.stride() == two.stride() == moments["exp_avg"].stride()
    assert loop.step() == other.step()
    assert all(
        torch.equal(a, b) for a, b in zip(net.parameters(), other.net.parameters(), strict=True)
    )


def test_the_progress_bar_goes_to_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "m", progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "score network" in err
