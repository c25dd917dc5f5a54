"""What one training run does: its stages, its checkpoints, and the model folder it ends in."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sde_diffusion.accelerated import make_accelerator
from sde_diffusion.checkpoints import MODEL_FILE, FeatureStatistics, save_model
from sde_diffusion.dataset import Dataset
from sde_diffusion.errors import require_count
from sde_diffusion.loop import COUNTS, Loop, NonFiniteLossError
from sde_diffusion.networks import JudgeNet, NoisedClassifier, RandomFeatures
from sde_diffusion.samples import chunks
from sde_diffusion.sde import SDE
from sde_diffusion.seeding import generator_for
from sde_diffusion.storage import CheckpointError, fit_tensors, read_json, write_bytes
from sde_diffusion.training_checkpoints import CHECKPOINTS, CheckpointStore, holds_checkpoints
from sde_diffusion.training_settings import (
    Progress,
    RunOptions,
    SampleSheet,
    TrainingInterrupted,
    TrainSettings,
)
from sde_diffusion.training_tasks import CLASSIFIER, JUDGE, KEYS, SCORE, Tasks, typed
from sde_diffusion.training_watch import Watch

__all__ = ["CONFIG_FILE", "Run"]

CONFIG_FILE = "config.toml"
LOGS = "logs"
_FEATURES = 4  # of the seeds of RandomFeatures


class Run:
    """One training run: its stages, its checkpoints, and the folder it ends in."""

    def __init__(
        self,
        data: Dataset,
        sde: SDE,
        out: Path,
        settings: TrainSettings,
        seed: int,
        options: RunOptions,
        sheet: SampleSheet | None = None,
    ) -> None:
        self.data = data
        self.sde = sde
        self.out = out
        self.settings = settings
        self.seed = require_count("seed", seed, least=0)
        self.options = options
        self.tasks = Tasks(data, sde, settings, seed)
        self.finished: dict[str, nn.Module] = {}
        self.skipped: dict[str, int] = {}
        self.pending: tuple[dict[str, Tensor], int] | None = None
        self.seconds = 0.0
        self.cpu_seconds = 0.0
        stages = {SCORE: settings.score}
        if data.num_classes is not None:
            if settings.with_classifier is not False:
                stages[CLASSIFIER] = settings.classifier
            stages[JUDGE] = settings.judge
        self.stages = stages
        self.lengths = {name: stage.steps for name, stage in stages.items()}
        self.store = CheckpointStore(out, options.keep_last)
        self.identity: dict[str, Any] = {
            "data": data.digest(),
            "sde": sde.config(),
            "seed": seed,
            "settings": asdict(settings),
        }
        self.accelerator = make_accelerator(
            options.device, settings.mixed_precision, options.trackers, out / LOGS
        )
        self.main = self.accelerator.is_main_process
        self.watch = Watch(self.tasks, out, options, self.accelerator, sheet)

    def prepare(self, resume: bool, overwrite: bool) -> bool:
        """Make sense of the output folder; False if there is nothing left to do."""
        where = str(self.out)
        if resume:
            if holds_checkpoints(self.out):
                self._read_checkpoint()
                self._write_config()
                return True
            if (self.out / MODEL_FILE).exists():
                training = read_json(self.out / MODEL_FILE).get("training", {})
                self._require_same(training, f"the finished model in {where!r}")
                return False
            if not (self.out / CHECKPOINTS).is_dir():  # else it died before the first one
                raise CheckpointError(
                    f"nothing to resume in {where!r}: no {CHECKPOINTS}; leave resume out"
                )
        if self.main:
            self._start(overwrite)
        self.accelerator.wait_for_everyone()
        return True

    def _start(self, overwrite: bool) -> None:
        where = str(self.out)
        if self.out.exists() and not self.out.is_dir():
            raise CheckpointError(f"out={where!r} is a file; give a folder")
        unfinished = holds_checkpoints(self.out)
        used = self.out.is_dir() and any(f.name != CHECKPOINTS for f in self.out.iterdir())
        if unfinished and not overwrite:
            raise CheckpointError(
                f"out={where!r} holds unfinished training; continue it with resume (--resume), "
                "or give another folder"
            )
        if used and not overwrite:
            raise CheckpointError(
                f"out={where!r} is not empty; give another folder, or remove it first"
            )
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"out={where!r} cannot be made ({error.strerror or error}); give another folder"
            ) from error
        self.store.clear()
        # A folder that cannot be written is found out now, not after minutes of training.
        self._write_checkpoint(None)
        self._write_config()

    def _write_config(self) -> None:
        if self.main and self.options.config is not None:
            write_bytes(self.out / CONFIG_FILE, self.options.config.encode())

    def train_stage(self, stage: str, report: Callable[[Progress], bool]) -> None:
        """Train one network, from the checkpoint if it was under way.

        `report` is called after every step and says whether to stop.
        """
        if stage in self.finished:
            return
        net = self.tasks.network(stage)
        loop = Loop(
            stage,
            net,
            self.tasks.task(stage, net),
            self.stages[stage],
            self.seed,
            KEYS[stage],
            accelerator=self.accelerator,
            accumulate=self.settings.accumulate,
            compile=self.options.compile,
        )
        if self.pending is not None:
            loop.load(*self.pending)
            self.pending = None
        try:
            with self._timed() as tick:
                self._steps(stage, loop, report, tick)
        except KeyboardInterrupt as error:
            if loop.whole:  # else a second Ctrl-C fell into an update: the last checkpoint stands
                self._write_checkpoint(loop)
            raise TrainingInterrupted(
                f"interrupted in the {stage}, after step {loop.done} of {loop.settings.steps}; "
                f"continue with resume (--resume): {self.store.newest or self.store.folder}",
                self.store.newest or self.store.folder,
            ) from error
        except NonFiniteLossError as error:
            raise NonFiniteLossError(
                f"{error}. The last checkpoint is kept: {self.store.newest}",
                error.stage,
                error.step,
            ) from None
        finally:
            loop.close()
        self.finished[stage] = loop.average
        self._write_checkpoint(None)

    def _steps(
        self,
        stage: str,
        loop: Loop,
        report: Callable[[Progress], bool],
        tick: Callable[[], None],
    ) -> None:
        total, standing = loop.settings.steps, loop.look()
        self.watch.begin(stage, loop)
        while loop.done < total:
            loop.step()
            tick()
            looked = loop.done % loop.look_every == 0 or loop.done == total
            if looked:
                standing = loop.look()
                self.skipped[stage] = standing.skipped
            self.watch.after_step(stage, loop, standing)
            if loop.done % self.options.checkpoint_every == 0:
                loop.look()  # a run that is to stop leaves the checkpoint before it as it was
                self._write_checkpoint(loop)
            asked = report(
                Progress(stage, loop.done, total, standing.loss, self.skipped.get(stage, 0))
            )
            if self.accelerator.num_processes == 1:
                if asked:
                    raise KeyboardInterrupt
            else:
                # All of them stop after the same step, or those that go on would wait for ever.
                loop.stop = loop.stop or asked
                if looked and standing.stopped:
                    raise KeyboardInterrupt

    @contextlib.contextmanager
    def _timed(self) -> Iterator[Callable[[], None]]:
        before, cpu_before = self.seconds, self.cpu_seconds
        started, cpu_started = time.monotonic(), time.process_time()

        def tick() -> None:
            self.seconds = before + time.monotonic() - started
            self.cpu_seconds = cpu_before + time.process_time() - cpu_started

        yield tick

    def finish(self) -> Path:
        """Write the model folder and remove the checkpoints."""
        if self.main:
            self._write_model()
            self.store.clear()
        self.watch.close()
        self.accelerator.wait_for_everyone()
        return self.out

    def _write_model(self) -> None:
        data = self.data
        judge: JudgeNet | RandomFeatures
        classifier: NoisedClassifier | None = None
        figures: dict[str, Any] = {
            "seconds": round(self.seconds, 1),
            "cpu_seconds": round(self.cpu_seconds, 1),
            "threads": torch.get_num_threads(),
            "processes": self.accelerator.num_processes,
            "skipped": self.skipped,
        }
        networks = {stage: net.cpu() for stage, net in self.finished.items()}
        model = self.tasks.model(networks[SCORE])
        if CLASSIFIER in networks:
            classifier = self.tasks.classifier(networks[CLASSIFIER])
            figures["classifier_accuracy"] = self.watch.accuracy(classifier)
        if data.test_y is not None:
            judge = typed(JudgeNet, networks[JUDGE])
            with torch.no_grad():
                found = torch.cat([judge(part).argmax(1) for part in chunks(data.test_x)])
                correct: Tensor = found.eq(data.test_y)
            figures["judge_accuracy"] = round(correct.float().mean().item(), 4)
        else:
            judge = RandomFeatures(data.event_shape)
            judge.fit(data.train_x, generator_for(self.seed, _FEATURES))
        self.watch.validate(model, self.lengths[SCORE])
        figures["validation"] = self.watch.history
        if self.options.config is not None:
            figures["config"] = self.options.config
        save_model(
            self.out,
            model,
            data=data.describe(),
            judge=judge,
            reference={
                "train": FeatureStatistics.of(judge, data.train_x),
                "test": FeatureStatistics.of(judge, data.test_x),
            },
            classifier=classifier,
            training={**self.identity, **figures},
        )

    def _write_checkpoint(self, loop: Loop | None) -> None:
        if not self.main:
            return
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
            **self.identity,
            "finished": list(self.finished),
            "current": current,
            "done": done,
            "skipped": self.skipped,
            "validation": self.watch.history,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
        }
        self.store.write(tensors, info)

    def _read_checkpoint(self) -> None:
        file, tensors, info = self.store.read()
        try:
            finished, done, current = list(info["finished"]), int(info["done"]), info["current"]
            self.seconds, self.cpu_seconds = float(info["seconds"]), float(info["cpu_seconds"])
            self.skipped = dict(info["skipped"])
            self.watch.history = list(info["validation"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{str(file)!r} is not a training checkpoint ({error}); "
                "start again without resume, in another folder"
            ) from error
        self._require_same(info, repr(str(file)))
        for stage in finished:
            net = self.tasks.network(stage)
            net.load_state_dict(fit_tensors(file, net.state_dict(), _part(tensors, f"{stage}/")))
            self.finished[stage] = net.eval().requires_grad_(False)
        if current:
            self.pending = self._fitted(file, current, _part(tensors, "current/")), done

    def _fitted(self, file: Path, stage: str, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state of a loop, its tensors held against the network that is configured."""
        weights = dict(self.tasks.network(stage).named_parameters())
        expected = {
            f"{kind}.{name}": w.detach() for kind in ("net", "ema") for name, w in weights.items()
        }
        # A weight that no gradient has reached has no moments.
        moments = {
            f"{kind}.{name}": w.detach()
            for kind in ("first", "second")
            for name, w in weights.items()
        }
        expected |= {name: w for name, w in moments.items() if name in found}
        fitted = fit_tensors(file, expected, {n: t for n, t in found.items() if n not in COUNTS})
        return fitted | {name: found[name] for name in COUNTS if name in found}

    def _require_same(self, info: dict[str, Any], what: str) -> None:
        wanted = json.loads(json.dumps(self.identity))
        other = [key for key in wanted if info.get(key) != wanted[key]]
        if other:
            named = " and ".join(key + _difference(info.get(key), wanted[key]) for key in other)
            raise CheckpointError(
                f"{what} was started with another {named}; "
                "give the same arguments, or another folder without resume"
            )


def _difference(before: Any, now: Any, path: str = "") -> str:
    """The first setting that differs, for a message."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in now:
            if before.get(key) != now[key]:
                return _difference(before.get(key), now[key], f"{path}.{key}" if path else key)
    return f" ({path} was {before!r}, is {now!r})" if path else ""


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
