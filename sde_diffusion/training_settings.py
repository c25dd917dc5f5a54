"""What a training run is told, and what it tells."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sde_diffusion.accelerated import PRECISIONS
from sde_diffusion.errors import (
    require_between,
    require_count,
    require_finite,
    unknown_name,
)
from sde_diffusion.parametrization import ParametrizedModel
from sde_diffusion.stage_settings import StageSettings

__all__ = ["Progress", "RunOptions", "SampleSheet", "TrainSettings", "TrainingInterrupted"]

SCORE_SETTINGS = StageSettings(steps=6000, learning_rate=2e-3)
CLASSIFIER_SETTINGS = StageSettings(steps=1500, learning_rate=2e-3, weight_decay=0.1)
JUDGE_SETTINGS = StageSettings(steps=800, learning_rate=2e-3, weight_decay=0.3)

# Draws samples of the model (average of weights) and writes them to the path, without suffix.
SampleSheet = Callable[[ParametrizedModel, Path], None]


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: training stopped between two steps and its checkpoint was written.

    Attributes:
        checkpoint: the file from which ``resume=True`` goes on.
    """

    def __init__(self, message: str, checkpoint: Path) -> None:
        super().__init__(message)
        self.checkpoint = checkpoint


@dataclass(frozen=True)
class Progress:
    """Where training stands: passed to `on_step` after every step.

    Attributes:
        stage: "score network", "classifier" or "judge".
        step: steps done in this stage.
        steps: steps of this stage.
        loss: of the last batch; on a GPU of the last that was looked at, up to 20 steps ago.
        skipped: updates of this stage that were skipped, their loss being NaN or infinite.
    """

    stage: str
    step: int
    steps: int
    loss: float
    skipped: int = 0


@dataclass(frozen=True)
class TrainSettings:
    """All that the trained weights depend on, beside data, SDE and seed; the defaults made the
    shipped models.

    Attributes:
        score, classifier, judge: how each network is trained.
        p_uncond: probability with which a label is replaced by the null label.
        log_sigma_mean, log_sigma_std: of the log-normal noise levels of EDM-preconditioned
            training, in units of the data's root mean square.
        judge_noise: standard deviation of the noise added to the judge's clean inputs, so that it
            does not learn the training samples by heart.
        conditional: whether the score network sees labels; None: where the data has them.
        with_classifier: whether a classifier of noised inputs is trained; None: where there are
            labels.
        network, classifier_network, judge_network: ``{"kind": ..., settings}`` for `build_network`,
            without event_shape and num_classes, which are the data's; None is the default.
        parametrization: what the score network's output is read as: eps, x0, v, score, edm or
            ncsnv2; None is eps where the SDE scales the signal down, else edm.
        sigma_data: of the EDM parametrization; None is the data's root mean square.
        time_label: what the network is told of the time: continuous_time, edm_noise_label or
            table_index (the integer step of a discrete chain); None is the parametrization's own.
        objective: a name of `sde_diffusion.objectives.OBJECTIVES`; None is edm for edm, else
            discrete_simple on a discrete chain, else simple.
        objective_settings: of that objective.
        mixed_precision: "no", "bf16" or "fp16".
        accumulate: parts in which each batch goes through the network, to save memory.
    """

    score: StageSettings = SCORE_SETTINGS
    classifier: StageSettings = CLASSIFIER_SETTINGS
    judge: StageSettings = JUDGE_SETTINGS
    p_uncond: float = 0.15
    log_sigma_mean: float = -0.5
    log_sigma_std: float = 1.4
    judge_noise: float = 0.3
    conditional: bool | None = None
    with_classifier: bool | None = None
    network: Mapping[str, Any] | None = None
    classifier_network: Mapping[str, Any] | None = None
    judge_network: Mapping[str, Any] | None = None
    parametrization: str | None = None
    sigma_data: float | None = None
    time_label: str | None = None
    objective: str | None = None
    objective_settings: Mapping[str, Any] = field(default_factory=dict)
    mixed_precision: str = "no"
    accumulate: int = 1

    def __post_init__(self) -> None:
        require_between("p_uncond", self.p_uncond, 0.0, 1.0)
        require_between("judge_noise", self.judge_noise, 0.0, 10.0)
        require_finite("log_sigma_mean", self.log_sigma_mean)
        require_finite("log_sigma_std", self.log_sigma_std, above=0.0)
        if self.sigma_data is not None:
            require_finite("sigma_data", self.sigma_data, above=0.0)
        if self.mixed_precision not in PRECISIONS:
            raise unknown_name("mixed_precision", self.mixed_precision, PRECISIONS)
        require_count("accumulate", self.accumulate)

    def with_steps(self, steps: int) -> TrainSettings:
        """The same with `steps` for the score network and the others in proportion."""
        require_count("steps", steps)
        share = steps / self.score.steps

        def scaled(stage: StageSettings) -> StageSettings:
            return replace(stage, steps=max(1, round(stage.steps * share)))

        return replace(
            self,
            score=replace(self.score, steps=steps),
            classifier=scaled(self.classifier),
            judge=scaled(self.judge),
        )


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out and watched; none of this changes the trained weights on one device.

    Attributes:
        checkpoint_every: steps between checkpoints.
        keep_last: checkpoints kept.
        validate_every: steps between validations: the denoising loss of the average of weights on
            the held-out part, by time bucket; 0 for the end of training only.
        validation_buckets: parts of the time interval, equal in log-SNR, that are told apart.
        validation_samples: of the held-out part, at most.
        samples_every: steps between sample sheets; 0 for none.
        log_every: steps between two lines for the trackers.
        trackers: names that accelerate knows, such as tensorboard; they write to ``logs/``.
        device: "cpu", or "cuda" for this process's own GPU.
        compile: compile the networks with torch.compile; rounds differently.
        config: the training config, as TOML, to be stored with the model.
    """

    checkpoint_every: int = 500
    keep_last: int = 2
    validate_every: int = 0
    validation_buckets: int = 8
    validation_samples: int = 1024
    samples_every: int = 0
    log_every: int = 50
    trackers: tuple[str, ...] = ()
    device: str = "cpu"
    compile: bool = False
    config: str | None = None

    def __post_init__(self) -> None:
        for name in (
            "checkpoint_every",
            "keep_last",
            "validation_buckets",
            "validation_samples",
            "log_every",
        ):
            require_count(name, getattr(self, name))
        for name in ("validate_every", "samples_every"):
            require_count(name, getattr(self, name), least=0)
