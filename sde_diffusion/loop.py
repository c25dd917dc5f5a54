"""One network's training loop: AdamW, warm-up and cosine decay, clipping, EMA, and a state that can
be saved.

All randomness of step n comes from a generator seeded by (seed, stage, n), so the state is the
weights, their average, the optimizer's moments and n; a loop that is saved and loaded goes on as if
uninterrupted.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sde_diffusion.errors import require_between, require_count, require_finite

__all__ = ["Loop", "NonFiniteLossError", "StageSettings", "generator_for", "seeded"]

Objective = Callable[[nn.Module, torch.Generator], Tensor]
_WORD = (1 << 64) - 1


class NonFiniteLossError(ArithmeticError):
    """The loss became NaN or infinite; the weights were not updated with it.

    Attributes:
        stage: what was being trained.
        step: the step at which it happened, counted from 0.
    """

    def __init__(self, message: str, stage: str, step: int) -> None:
        super().__init__(message)
        self.stage = stage
        self.step = step


def generator_for(*keys: int) -> torch.Generator:
    """A CPU generator seeded by all `keys` at once (splitmix64 mixing, Steele et al. 2014)."""
    state = 0
    for key in keys:
        state = (state + key + 0x9E3779B97F4A7C15) & _WORD
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD
        state ^= state >> 31
    return torch.Generator().manual_seed(state >> 1)


def seeded(make: Callable[[], nn.Module], *keys: int) -> nn.Module:
    """Build a network whose initial weights depend on `keys` alone, not on the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator_for(*keys).initial_seed())
        return make()


@dataclass(frozen=True)
class StageSettings:
    """How one network is trained.

    Attributes:
        steps: optimizer steps.
        batch_size: samples per step, drawn with replacement.
        learning_rate: peak of AdamW's, reached after the warm-up, then a cosine down to 0.
        warmup: steps of linear warm-up, at most half of all.
        weight_decay: AdamW's decoupled decay.
        ema_decay: of the average of weights, which is what is kept; it warms up as (1 + n) / (10 +
            n).
        clip: largest norm of the gradient; a larger one is scaled down to it.
    """

    steps: int
    batch_size: int = 128
    learning_rate: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    clip: float = 1.0

    def __post_init__(self) -> None:
        require_count("steps", self.steps)
        require_count("batch_size", self.batch_size)
        require_count("warmup", self.warmup, least=0)
        require_finite("learning_rate", self.learning_rate, above=0.0)
        require_between("weight_decay", self.weight_decay, 0.0, 1.0)
        require_between("ema_decay", self.ema_decay, 0.0, 1.0)
        require_finite("clip", self.clip, above=0.0)

    def rate(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0."""
        warmup = min(self.warmup, self.steps // 2)
        if step < warmup:
            return self.learning_rate * (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1, self.steps - warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


class Loop:
    """Trains one network, step by step.

    Args:
        stage: name, for messages.
        net: the network; trained in place.
        objective: ``objective(net, generator)`` -> scalar loss of one batch, drawn with
            `generator`.
        settings: how.
        seed: first part of every step's seed.
        key: second part: a number of this stage's own.
    """

    def __init__(
        self,
        stage: str,
        net: nn.Module,
        objective: Objective,
        settings: StageSettings,
        seed: int,
        key: int,
    ) -> None:
        self.stage = stage
        self.net = net.train()
        self.average = copy.deepcopy(net).eval().requires_grad_(False)
        self.objective = objective
        self.settings = settings
        self.seed = seed
        self.key = key
        self.done = 0
        self.whole = True  # False while an update is under way
        self._weights: list[Tensor] = list(net.parameters())
        self._averages: list[Tensor] = list(self.average.parameters())
        self._optimizer = torch.optim.AdamW(
            self._weights,
            lr=settings.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def step(self) -> float:
        """One optimizer step; returns the loss before it.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite.
        """
        settings = self.settings
        loss = self.objective(self.net, generator_for(self.seed, self.key, self.done))
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NonFiniteLossError(
                f"the loss of the {self.stage} became {value} at step {self.done}; "
                f"lower its learning rate ({settings.learning_rate:g}) "
                f"or its clip ({settings.clip:g})",
                self.stage,
                self.done,
            )
        self.whole = False
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self._weights, settings.clip)
        for group in self._optimizer.param_groups:
            group["lr"] = settings.rate(self.done)
        self._optimizer.step()
        decay = min(settings.ema_decay, (1 + self.done) / (10 + self.done))
        with torch.no_grad():
            torch._foreach_lerp_(self._averages, self._weights, 1 - decay)
        self.done += 1
        self.whole = True
        return value

    def state(self) -> dict[str, Tensor]:
        """Everything but the number of steps done, by name; a copy, contiguous."""
        tensors: dict[str, Tensor] = {}
        for (name, weight), average in zip(
            self.net.named_parameters(), self._averages, strict=True
        ):
            tensors[f"net.{name}"] = weight
            tensors[f"ema.{name}"] = average
            moments = self._optimizer.state.get(weight)
            if moments:
                tensors[f"first.{name}"] = moments["exp_avg"]
                tensors[f"second.{name}"] = moments["exp_avg_sq"]
        return {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}

    def load(self, tensors: dict[str, Tensor], done: int) -> None:
        """Go on from `state` after `done` steps.

        Raises:
            KeyError: a tensor is missing.
            RuntimeError: a tensor has another shape.
        """
        with torch.no_grad():
            for (name, weight), average in zip(
                self.net.named_parameters(), self._averages, strict=True
            ):
                weight.copy_(tensors[f"net.{name}"])
                average.copy_(tensors[f"ema.{name}"])
                if not done:
                    continue
                # In the weight's own memory layout: the fused optimizer walks memory, not indices.
                self._optimizer.state[weight] = {
                    "step": torch.tensor(float(done)),
                    "exp_avg": torch.empty_like(weight).copy_(tensors[f"first.{name}"]),
                    "exp_avg_sq": torch.empty_like(weight).copy_(tensors[f"second.{name}"]),
                }
        self.done = done
