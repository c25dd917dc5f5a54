"""What a training run is told, and what it tells."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from sde_diffusion.errors import require_between, require_count, require_finite
from sde_diffusion.loop import StageSettings

__all__ = ["Progress", "TrainSettings", "TrainingInterrupted"]

SCORE_SETTINGS = StageSettings(steps=6000, learning_rate=2e-3)
CLASSIFIER_SETTINGS = StageSettings(steps=1500, learning_rate=2e-3, weight_decay=0.1)
JUDGE_SETTINGS = StageSettings(steps=800, learning_rate=2e-3, weight_decay=0.3)


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C: training stopped between two steps and its checkpoint was written.

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
        loss: of the last batch.
    """

    stage: str
    step: int
    steps: int
    loss: float


@dataclass(frozen=True)
class TrainSettings:
    """Settings of a whole training run; the defaults made the shipped models.

    Attributes:
        score, classifier, judge: how each network is trained.
        p_uncond: probability with which a label is replaced by the null label.
        log_sigma_mean, log_sigma_std: of the log-normal noise levels of EDM-preconditioned
            training, in units of the data's root mean square.
        judge_noise: standard deviation of the noise added to the judge's clean inputs, so that it
            does not learn the training samples by heart.
    """

    score: StageSettings = SCORE_SETTINGS
    classifier: StageSettings = CLASSIFIER_SETTINGS
    judge: StageSettings = JUDGE_SETTINGS
    p_uncond: float = 0.15
    log_sigma_mean: float = -0.5
    log_sigma_std: float = 1.4
    judge_noise: float = 0.3

    def __post_init__(self) -> None:
        require_between("p_uncond", self.p_uncond, 0.0, 1.0)
        require_between("judge_noise", self.judge_noise, 0.0, 10.0)
        require_finite("log_sigma_mean", self.log_sigma_mean)
        require_finite("log_sigma_std", self.log_sigma_std, above=0.0)

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
