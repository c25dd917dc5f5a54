"""What is looked at while a run goes on: validation, sample sheets, trackers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sde_diffusion.loop import Loop, Standing
from sde_diffusion.losses import simple_loss
from sde_diffusion.networks import NoisedClassifier
from sde_diffusion.parametrization import ParametrizedModel
from sde_diffusion.training_settings import RunOptions, SampleSheet
from sde_diffusion.training_tasks import SCORE, Tasks
from sde_diffusion.validation import accuracy_by_time, loss_by_time

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["SAMPLES", "Watch"]

SAMPLES = "samples"


class Watch:
    """Looks at a run from outside: nothing here changes what is trained.

    Attributes:
        history: of the validations so far: step, loss and by_time.
    """

    def __init__(
        self,
        tasks: Tasks,
        out: Path,
        options: RunOptions,
        accelerator: Accelerator,
        sheet: SampleSheet | None,
    ) -> None:
        self.tasks = tasks
        self.out = out
        self.options = options
        self.accelerator = accelerator
        self.sheet = sheet
        self.history: list[dict[str, Any]] = []
        self._step = 0  # of all stages: trackers want it to grow
        self._tracking = False

    def begin(self, stage: str, loop: Loop) -> None:
        """A stage starts or goes on."""
        if self.options.trackers and not self._tracking:
            self.accelerator.init_trackers("training")
            self._tracking = True

    def after_step(self, stage: str, loop: Loop, standing: Standing) -> None:
        """After every step: whatever is due."""
        if self._tracking and loop.done % self.options.log_every == 0:
            values = {
                f"{stage}/loss": standing.loss,
                f"{stage}/learning_rate": loop.settings.rate(loop.done - 1),
                f"{stage}/skipped": standing.skipped,
            }
            self.accelerator.log(values, step=loop.done)
        if stage != SCORE or not self.accelerator.is_main_process:
            return
        if _due(loop.done, self.options.validate_every):
            self.validate(self.tasks.model(loop.average), loop.done)
        if self.sheet is not None and _due(loop.done, self.options.samples_every):
            folder = self.out / SAMPLES
            folder.mkdir(exist_ok=True)
            self.sheet(self.tasks.model(loop.average), folder / f"{loop.done:07d}")

    def validate(self, model: ParametrizedModel, step: int) -> None:
        """The simple loss on the held-out part, by time bucket, into `history`; once a step.

        The same for every objective, so that runs can be compared.
        """
        if any(entry["step"] == step for entry in self.history):
            return
        x, y = self._held_out(next(model.parameters()).device)
        label = y if self.tasks.classes is not None else None
        buckets, seed = self.options.validation_buckets, self.tasks.seed
        found = loss_by_time(
            model, simple_loss, x, label, self.tasks.sde, buckets=buckets, seed=seed
        )
        mean = sum(bucket.mean for bucket in found) / len(found)
        self.history.append(
            {"step": step, "loss": mean, "by_time": [bucket.config() for bucket in found]}
        )
        if self._tracking:
            self.accelerator.log({"validation/loss": mean}, step=step)

    def accuracy(self, classifier: NoisedClassifier) -> list[dict[str, Any]]:
        """The classifier's accuracy on the held-out part, by time bucket."""
        x, y = self._held_out(next(classifier.parameters()).device)
        if y is None:
            return []
        buckets, seed = self.options.validation_buckets, self.tasks.seed
        found = accuracy_by_time(classifier, x, y, self.tasks.sde, buckets=buckets, seed=seed)
        return [bucket.config() for bucket in found]

    def _held_out(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """The held-out part, or as much of it as is looked at, evenly spread over its order."""
        data, most = self.tasks.data, self.options.validation_samples
        count = min(most, len(data.test_x))
        index = torch.linspace(0, len(data.test_x) - 1, count).round().long()
        y = None if data.test_y is None else data.test_y[index].to(device)
        return data.test_x[index].to(device), y

    def close(self) -> None:
        """End the trackers."""
        if self._tracking:
            self.accelerator.end_training()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
