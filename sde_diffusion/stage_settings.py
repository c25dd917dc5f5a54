"""How one network is trained: steps, batch, learning rate, average of weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sde_diffusion.errors import require_between, require_count, require_finite, unknown_name

__all__ = ["EMA_WARMUPS", "SCHEDULES", "StageSettings"]

SCHEDULES = ("cosine", "linear", "constant", "inverse_sqrt")
EMA_WARMUPS = ("ratio", "power", "half_life", "none")
HALF_LIFE_SHARE = 0.05  # of the steps done: EDM's ramp-up ratio (Karras et al. 2022, appendix F)


@dataclass(frozen=True)
class StageSettings:
    """How one network is trained.

    Attributes:
        steps: optimizer steps.
        batch_size: samples per optimizer step, drawn with replacement; the same number whatever the
            number of processes and of accumulated parts, which share it.
        learning_rate: peak of AdamW's, reached after the warm-up.
        schedule: of the learning rate after the warm-up: "cosine" or "linear" down to 0,
            "constant", or "inverse_sqrt" (with the steps done).
        warmup: steps of linear warm-up, at most half of all.
        weight_decay: AdamW's decoupled decay.
        beta_1, beta_2: decays of AdamW's two moments.
        ema_decay: of the average of weights, which is what is kept; its limit where it warms up.
        ema_warmup: how the decay after n steps rises to `ema_decay`: "ratio", (1 + n) / (10 + n);
            "power", 1 - (1 + n / ema_scale)^-ema_power; "half_life", the average's half-life is at
            most 5 % of the steps done (EDM); "none", constant.
        ema_power, ema_scale: of the "power" warm-up.
        clip: largest norm of the gradient; a larger one is scaled down to it.
        non_finite_patience: updates in a row with a NaN or infinite loss or gradient, each of which
            is skipped and counted, after which training stops.
    """

    steps: int
    batch_size: int = 128
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup: int = 200
    weight_decay: float = 0.01
    beta_1: float = 0.9
    beta_2: float = 0.99
    ema_decay: float = 0.999
    ema_warmup: str = "ratio"
    ema_power: float = 2 / 3
    ema_scale: float = 1.0
    clip: float = 1.0
    non_finite_patience: int = 10

    def __post_init__(self) -> None:
        require_count("steps", self.steps)
        require_count("batch_size", self.batch_size)
        require_count("warmup", self.warmup, least=0)
        require_count("non_finite_patience", self.non_finite_patience)
        require_finite("learning_rate", self.learning_rate, above=0.0)
        require_between("weight_decay", self.weight_decay, 0.0, 1.0)
        for name in ("beta_1", "beta_2"):
            require_between(name, getattr(self, name), 0.0, 1.0 - 1e-9)
        require_between("ema_decay", self.ema_decay, 0.0, 1.0)
        require_finite("ema_power", self.ema_power, above=0.0)
        require_finite("ema_scale", self.ema_scale, above=0.0)
        require_finite("clip", self.clip, above=0.0)
        if self.schedule not in SCHEDULES:
            raise unknown_name("schedule", self.schedule, SCHEDULES)
        if self.ema_warmup not in EMA_WARMUPS:
            raise unknown_name("ema_warmup", self.ema_warmup, EMA_WARMUPS)

    def rate(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0."""
        warmup = min(self.warmup, self.steps // 2)
        if step < warmup:
            return self.learning_rate * (step + 1) / (warmup + 1)
        if self.schedule == "constant":
            return self.learning_rate
        if self.schedule == "inverse_sqrt":
            return self.learning_rate * math.sqrt((warmup + 1) / (step + 1))
        done = (step - warmup) / max(1, self.steps - warmup)
        if self.schedule == "linear":
            return self.learning_rate * (1 - done)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))

    def decay(self, step: int) -> float:
        """Decay of the average of weights in step `step`, counted from 0."""
        if self.ema_warmup == "none" or self.ema_decay in (0.0, 1.0):
            return self.ema_decay
        if self.ema_warmup == "ratio":
            warm = (1 + step) / (10 + step)
        elif self.ema_warmup == "power":
            warm = 1 - (1 + step / self.ema_scale) ** -self.ema_power
        else:
            warm = 0.5 ** (1 / max(HALF_LIFE_SHARE * step, 1e-8))
        return min(self.ema_decay, warm)
