"""What one training run does: its stages, its checkpoint file, and the model folder it ends in."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sde_diffusion.checkpoints import MODEL_FILE, FeatureStatistics, save_model
from sde_diffusion.data import Dataset
from sde_diffusion.errors import require_count
from sde_diffusion.loop import Loop, NonFiniteLossError, generator_for, seeded
from sde_diffusion.losses import (
    classifier_loss,
    drop_labels,
    edm_loss,
    log_normal_times,
    simple_loss,
    uniform_log_snr_times,
    uniform_times,
)
from sde_diffusion.networks import (
    ClassifierNet,
    JudgeNet,
    NoisedClassifier,
    RandomFeatures,
    build_network,
    default_score_config,
)
from sde_diffusion.parametrization import EDMModel, EpsModel, ParametrizedModel
from sde_diffusion.samples import chunks
from sde_diffusion.sde import SDE
from sde_diffusion.storage import (
    CheckpointError,
    fit_tensors,
    read_json,
    read_tensors,
    write_tensors,
)
from sde_diffusion.training_settings import Progress, TrainingInterrupted, TrainSettings

__all__ = ["Run"]

Net = TypeVar("Net", bound=nn.Module)
CHECKPOINT = "checkpoint.safetensors"
VERSION = 1
SCORE, CLASSIFIER, JUDGE, FEATURES = 1, 2, 3, 4


class Run:
    """One training run: its stages, its checkpoint, and the folder it ends in."""

    def __init__(
        self,
        data: Dataset,
        sde: SDE,
        out: Path,
        settings: TrainSettings,
        seed: int,
        checkpoint_every: int,
    ) -> None:
        self.data = data
        self.sde = sde
        self.out = out
        self.settings = settings
        self.seed = require_count("seed", seed, least=0)
        self.every = checkpoint_every
        self.finished: dict[str, nn.Module] = {}
        self.pending: tuple[dict[str, Tensor], int] | None = None
        self.seconds = 0.0
        self.cpu_seconds = 0.0
        stages = {"score network": settings.score}
        if data.num_classes is not None:
            stages |= {"classifier": settings.classifier, "judge": settings.judge}
        self.stages = stages
        self.lengths = {name: stage.steps for name, stage in stages.items()}
        self.identity: dict[str, Any] = {
            "data": data.digest(),
            "sde": sde.config(),
            "seed": seed,
            "settings": asdict(settings),
        }

    @property
    def checkpoint(self) -> Path:
        return self.out / CHECKPOINT

    def prepare(self, resume: bool, overwrite: bool) -> bool:
        """Make sense of the output folder; False if there is nothing left to do."""
        where = str(self.out)
        if resume:
            if self.checkpoint.exists():
                self._read_checkpoint()
                return True
            if (self.out / MODEL_FILE).exists():
                training = read_json(self.out / MODEL_FILE).get("training", {})
                self._require_same(training, f"the finished model in {where!r}")
                return False
            raise CheckpointError(
                f"nothing to resume in {where!r}: no {CHECKPOINT}; leave resume out"
            )
        if self.out.exists() and not self.out.is_dir():
            raise CheckpointError(f"out={where!r} is a file; give a folder")
        if self.out.is_dir() and any(self.out.iterdir()) and not overwrite:
            if self.checkpoint.exists():
                raise CheckpointError(
                    f"out={where!r} holds unfinished training; continue it with resume (--resume), "
                    "or give another folder"
                )
            raise CheckpointError(
                f"out={where!r} is not empty; give another folder, or remove it first"
            )
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"out={where!r} cannot be made ({error.strerror or error}); give another folder"
            ) from error
        # A folder that cannot be written is found out now, not after minutes of training.
        self._write_checkpoint(None)
        return True

    def train_stage(self, stage: str, report: Callable[[Progress], None]) -> None:
        """Train one network, from the checkpoint if it was under way."""
        if stage in self.finished:
            return
        loop = self._loop(stage)
        if self.pending is not None:
            loop.load(*self.pending)
            self.pending = None
        started, before = time.monotonic(), self.seconds
        cpu_started, cpu_before = time.process_time(), self.cpu_seconds
        try:
            while loop.done < loop.settings.steps:
                loss = loop.step()
                self.seconds = before + time.monotonic() - started
                self.cpu_seconds = cpu_before + time.process_time() - cpu_started
                if loop.done % self.every == 0:
                    self._write_checkpoint(loop)
                report(Progress(stage, loop.done, loop.settings.steps, loss))
        except KeyboardInterrupt as error:
            if loop.whole:  # else a second Ctrl-C fell into an update: the last checkpoint stands
                self._write_checkpoint(loop)
            raise TrainingInterrupted(
                f"interrupted in the {stage}, after step {loop.done} of {loop.settings.steps}; "
                f"continue with resume (--resume): {self.checkpoint}",
                self.checkpoint,
            ) from error
        except NonFiniteLossError as error:
            raise NonFiniteLossError(
                f"{error}. The last checkpoint is kept: {self.checkpoint}", error.stage, error.step
            ) from None
        self.finished[stage] = loop.average
        self._write_checkpoint(None)

    def finish(self) -> Path:
        """Write the model folder and remove the checkpoint."""
        data = self.data
        judge: JudgeNet | RandomFeatures
        classifier: NoisedClassifier | None = None
        figures: dict[str, Any] = {
            "seconds": round(self.seconds, 1),
            "cpu_seconds": round(self.cpu_seconds, 1),
            "threads": torch.get_num_threads(),
        }
        if data.test_y is not None:
            classifier = self._wrapped(self.finished["classifier"])
            judge = _typed(JudgeNet, self.finished["judge"])
            with torch.no_grad():
                found = torch.cat([judge(part).argmax(1) for part in chunks(data.test_x)])
                correct: Tensor = found.eq(data.test_y)
            figures["judge_accuracy"] = round(correct.float().mean().item(), 4)
        else:
            judge = RandomFeatures(data.event_shape)
            judge.fit(data.train_x, generator_for(self.seed, FEATURES))
        path = save_model(
            self.out,
            self._model(self.finished["score network"]),
            data=data.describe(),
            judge=judge,
            reference={
                "train": FeatureStatistics.of(judge, data.train_x),
                "test": FeatureStatistics.of(judge, data.test_x),
            },
            classifier=classifier,
            training={**self.identity, **figures},
        )
        self.checkpoint.unlink(missing_ok=True)
        return path

    def _network(self, stage: str) -> tuple[nn.Module, int]:
        shape, classes = self.data.event_shape, self.data.num_classes
        if stage == "score network":
            config, key = default_score_config(shape, classes), SCORE
        elif stage == "classifier":
            config, key = (
                {"kind": "classifier", "event_shape": shape, "num_classes": classes},
                CLASSIFIER,
            )
        else:
            config, key = {"kind": "judge", "event_shape": shape, "num_classes": classes}, JUDGE
        return seeded(lambda: build_network(config), self.seed, key), key

    def _loop(self, stage: str) -> Loop:
        net, key = self._network(stage)
        objective = {
            "score network": self._score_objective,
            "classifier": self._classifier_objective,
            "judge": self._judge_objective,
        }[stage](net)
        return Loop(stage, net, objective, self.stages[stage], self.seed, key)

    @property
    def _scales_down(self) -> bool:
        """Whether the signal is scaled down (VP and its kin) or the noise up (VE, EDM)."""
        return float(self.sde.at(self.sde.t_max).alpha) < 0.5

    def _model(self, net: nn.Module) -> ParametrizedModel:
        if self._scales_down:
            return EpsModel(net, self.sde)
        return EDMModel(net, self.sde, sigma_data=self.data.root_mean_square)

    def _wrapped(self, net: nn.Module) -> NoisedClassifier:
        return NoisedClassifier(_typed(ClassifierNet, net))

    def _batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        index = torch.randint(len(self.data.train_x), (size,), generator=generator)
        return self.data.batch(index, generator)

    def _score_objective(self, net: nn.Module) -> Callable[[nn.Module, torch.Generator], Tensor]:
        model, settings, sde = self._model(net), self.settings, self.sde
        preconditioned = isinstance(model, EDMModel)
        loss = edm_loss if preconditioned else simple_loss
        scale = torch.log(torch.tensor(self.data.root_mean_square)).item()

        def objective(_: nn.Module, generator: torch.Generator) -> Tensor:
            x0, label = self._batch(settings.score.batch_size, generator)
            if label is not None and self.data.num_classes is not None:
                label = drop_labels(label, self.data.num_classes, settings.p_uncond, generator)
            if preconditioned:
                mean, std = settings.log_sigma_mean + scale, settings.log_sigma_std
                t = log_normal_times(len(x0), sde, generator, mean=mean, std=std)
            else:
                t = uniform_times(len(x0), sde, generator)
            noise = torch.randn(x0.shape, generator=generator)
            return loss(model, x0, label, sde.at(t), noise).mean()

        return objective

    def _classifier_objective(
        self, net: nn.Module
    ) -> Callable[[nn.Module, torch.Generator], Tensor]:
        classifier, sde = self._wrapped(net), self.sde
        times = uniform_times if self._scales_down else uniform_log_snr_times

        def objective(_: nn.Module, generator: torch.Generator) -> Tensor:
            x0, label = self._labelled(self.settings.classifier.batch_size, generator)
            t = times(len(x0), sde, generator)
            noise = torch.randn(x0.shape, generator=generator)
            return classifier_loss(classifier, x0, label, sde.at(t), noise).mean()

        return objective

    def _judge_objective(self, net: nn.Module) -> Callable[[nn.Module, torch.Generator], Tensor]:
        def objective(_: nn.Module, generator: torch.Generator) -> Tensor:
            x0, label = self._labelled(self.settings.judge.batch_size, generator)
            x = x0 + self.settings.judge_noise * torch.randn(x0.shape, generator=generator)
            return nn.functional.cross_entropy(net(x), label)

        return objective

    def _labelled(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x0, label = self._batch(size, generator)
        if label is None:
            raise ValueError("this network needs labels, and the data has none")
        return x0, label

    def _write_checkpoint(self, loop: Loop | None) -> None:
        tensors = {
            f"{stage}/{name}": tensor
            for stage, net in self.finished.items()
            for name, tensor in net.state_dict().items()
        }
        current, done = "", 0
        if loop is not None:
            current, done = loop.stage, loop.done
            tensors |= {f"current/{name}": tensor for name, tensor in loop.state().items()}
        info = {
            "version": VERSION,
            **self.identity,
            "finished": list(self.finished),
            "current": current,
            "done": done,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
        }
        write_tensors(self.checkpoint, tensors, {"training": json.dumps(info)})

    def _read_checkpoint(self) -> None:
        remedy = "start again without resume, in another folder"
        tensors, metadata = read_tensors(self.checkpoint, remedy=remedy)
        where = str(self.checkpoint)
        try:
            info = json.loads(metadata["training"])
            version, finished = info["version"], list(info["finished"])
            done, self.seconds = int(info["done"]), float(info["seconds"])
            self.cpu_seconds = float(info["cpu_seconds"])
            current = info["current"]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{where!r} is not a training checkpoint ({error}); {remedy}"
            ) from error
        if version != VERSION:
            raise CheckpointError(
                f"{where!r} is of version {version!r}; this program reads {VERSION}; {remedy}"
            )
        self._require_same(info, f"{where!r}")
        for stage in finished:
            net = self._network(stage)[0]
            prefix = f"{stage}/"
            own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            net.load_state_dict(fit_tensors(self.checkpoint, net.state_dict(), own))
            self.finished[stage] = net.eval().requires_grad_(False)
        if current:
            own = {
                k.removeprefix("current/"): v
                for k, v in tensors.items()
                if k.startswith("current/")
            }
            self._fit_current(current, own, done)

    def _fit_current(self, stage: str, tensors: dict[str, Tensor], done: int) -> None:
        weights = dict(self._network(stage)[0].named_parameters())
        kinds = ("net", "ema", "first", "second") if done else ("net", "ema")
        expected = {f"{kind}.{name}": w.detach() for kind in kinds for name, w in weights.items()}
        self.pending = fit_tensors(self.checkpoint, expected, tensors), done

    def _require_same(self, info: dict[str, Any], what: str) -> None:
        wanted = json.loads(json.dumps(self.identity))
        other = [key for key in wanted if info.get(key) != wanted[key]]
        if other:
            raise CheckpointError(
                f"{what} was started with another {' and '.join(other)}; "
                "give the same arguments, or another folder without resume"
            )


def _typed(kind: type[Net], net: nn.Module) -> Net:
    if not isinstance(net, kind):
        raise TypeError(f"expected a {kind.__name__}, got {type(net).__name__}")
    return net
