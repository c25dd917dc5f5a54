"""One network's training loop, on accelerate: AdamW, clipping, average of weights, and a state that
can be saved.

All randomness of step n comes from a generator seeded by (seed, stage, n), on the CPU, so the state
is the weights, their average, the optimizer's moments and n; a loop that is saved and loaded goes
on as if uninterrupted. Every process draws the whole batch of a step and takes its own share of it,
so the batch is the same whatever the number of processes.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from sde_diffusion.accelerated import make_accelerator
from sde_diffusion.seeding import generator_for, seeded
from sde_diffusion.stage_settings import StageSettings

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = [
    "Batch",
    "Loop",
    "NonFiniteLossError",
    "StageSettings",
    "Standing",
    "Task",
    "generator_for",
    "seeded",
]

Batch = tuple[Tensor | None, ...]
LOOK_EVERY = 20  # steps between two looks at a GPU's loss: each one waits for the GPU
COUNTS = ("watch", "updates", "scaler")  # of a loop's state: those that are no weight's
_DROPOUT = 0x0D  # keeps the layers' own randomness apart from the batch's


class NonFiniteLossError(ArithmeticError):
    """The loss or the gradient was NaN or infinite too often; no weight was updated with it.

    Attributes:
        stage: what was being trained.
        step: the last of the steps at which it happened, counted from 0.
    """

    def __init__(self, message: str, stage: str, step: int) -> None:
        super().__init__(message)
        self.stage = stage
        self.step = step


class Task(NamedTuple):
    """What one network learns.

    Attributes:
        draw: ``draw(generator)`` -> the tensors of one batch, first dimension B, on the CPU, with
            all of its randomness; None for what the data does not have.
        loss: ``loss(net, batch)`` -> (B,) for a part of such a batch on the network's device.
    """

    draw: Callable[[torch.Generator], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Standing:
    """What a look at the loop tells.

    Attributes:
        loss: of the last batch, over all processes.
        skipped: updates that were skipped so far, their loss or gradient being NaN or infinite.
        stopped: whether another process was asked to stop.
    """

    loss: float
    skipped: int
    stopped: bool


class Loop:
    """Trains one network, step by step.

    Args:
        stage: name, for messages.
        net: the network; trained in place.
        task: the batches and their loss.
        settings: how.
        seed: first part of every step's seed.
        key: second part: a number of this stage's own.
        accelerator: device, precision and processes; one process on the CPU by default.
        accumulate: parts in which a batch goes through the network, one after the other, before
            the weights are updated: less memory, the same gradient.
        compile: compile the network with torch.compile.

    Raises:
        ValueError: the batch is smaller than the number of parts it is shared out in.
    """

    def __init__(
        self,
        stage: str,
        net: nn.Module,
        task: Task,
        settings: StageSettings,
        seed: int,
        key: int,
        *,
        accelerator: Accelerator | None = None,
        accumulate: int = 1,
        compile: bool = False,
    ) -> None:
        self.stage = stage
        self.average = copy.deepcopy(net).eval().requires_grad_(False)
        self.task = task
        self.settings = settings
        self.seed = seed
        self.key = key
        self.accelerator = accelerator or make_accelerator()
        self.accumulate = accumulate
        self.done = 0
        self.whole = True  # False while an update is under way
        self.stop = False  # to be told to all processes
        device = self.accelerator.device
        self._parts = accumulate * self.accelerator.num_processes
        if settings.batch_size < self._parts:
            raise ValueError(
                f"batch_size={settings.batch_size} of the {stage} cannot be shared by "
                f"{self.accelerator.num_processes} process(es) in {accumulate} part(s) each; "
                "raise it"
            )
        self._raw = net.to(device).train()
        self.average.to(device)
        if compile:
            self._raw.compile()
        self._weights: list[Tensor] = list(net.parameters())
        self._averages: list[Tensor] = list(self.average.parameters())
        self._optimizer = torch.optim.AdamW(
            self._weights,
            lr=settings.learning_rate,
            betas=(settings.beta_1, settings.beta_2),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.net, self._stepper = self.accelerator.prepare(self._raw, self._optimizer)
        self._random_layers = any(isinstance(m, _DropoutNd) and m.p > 0 for m in net.modules())
        # Skipped updates, how many of them in a row by now, and the step at which the patience
        # ended. On the device: reading them every step would make the GPU wait for the host.
        self._watch = torch.tensor([0, 0, -1], device=device)
        self._report = torch.zeros(3, device=device)
        self._ahead = _Ahead(self._draw) if device.type != "cpu" else None

    @property
    def look_every(self) -> int:
        """Steps between two looks: 1 on the CPU, where a look costs nothing."""
        return LOOK_EVERY if self._ahead is not None else 1

    def step(self) -> Tensor:
        """One optimizer step; returns the loss before it, 0-d, over all processes."""
        settings = self.settings
        batch = self._draw(self.done) if self._ahead is None else self._ahead.take(self.done)
        self.whole = False
        self._optimizer.zero_grad(set_to_none=True)
        with self._layers_seeded():
            loss = self._backward(batch)
        norm = self.accelerator.clip_grad_norm_(self._weights, settings.clip)
        self._report = torch.stack([loss, (~loss.isfinite()).float(), loss.new_tensor(self.stop)])
        if self.accelerator.num_processes > 1:
            self._report = self.accelerator.reduce(self._report, "sum")
        bad = self._report[1] > 0
        if self.accelerator.scaler is None:
            # The fused optimizer reads this on the device and leaves the weights as they are.
            bad = bad | ~norm.isfinite()
            self._optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        for group in self._optimizer.param_groups:
            group["lr"] = settings.rate(self.done)
        self._stepper.step()
        with torch.no_grad():
            torch._foreach_lerp_(self._averages, self._weights, 1 - settings.decay(self.done))
        self._count(bad)
        self.done += 1
        self.whole = True
        return self._report[0]

    def _backward(self, batch: Batch) -> Tensor:
        """Gradients of this process's share of the batch; its share of the mean loss."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        total = torch.zeros((), device=self.accelerator.device)
        for part in range(self.accumulate):
            last = part == self.accumulate - 1
            own = _share(batch, part * world + rank, self._parts, self.accelerator.device)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.net):
                losses = self.task.loss(self.net, own)
                loss = losses.mean()
                share = len(losses) / self.settings.batch_size
                if self._parts > 1:
                    # Gradients are averaged over the processes, and the shares may differ by one.
                    total = total + share * loss.detach()
                    loss = share * world * loss
                self.accelerator.backward(loss)
        return total if self._parts > 1 else loss.detach()

    def _count(self, bad: Tensor) -> None:
        skipped, streak, ended = self._watch.unbind()
        streak = (streak + 1) * bad
        over = (streak >= self.settings.non_finite_patience) & (ended < 0)
        self._watch = torch.stack(
            [skipped + bad, streak, torch.where(over, torch.full_like(ended, self.done), ended)]
        )

    def look(self) -> Standing:
        """How the loop stands; on a GPU this waits for it.

        Raises:
            NonFiniteLossError: `non_finite_patience` updates in a row were skipped.
        """
        skipped, _, ended = self._watch.tolist()
        loss, _, stopped = self._report.tolist()
        if ended >= 0:
            patience = self.settings.non_finite_patience
            times = f"{patience} steps in a row, the last one" if patience > 1 else "step"
            raise NonFiniteLossError(
                f"the loss or gradient of the {self.stage} was not finite at {times} {ended} "
                f"(the loss is {loss:g}); lower its learning_rate "
                f"({self.settings.learning_rate:g}) or its clip ({self.settings.clip:g})",
                self.stage,
                ended,
            )
        return Standing(loss, skipped, stopped > 0)

    def _draw(self, step: int) -> Batch:
        return self.task.draw(generator_for(self.seed, self.key, step))

    @contextlib.contextmanager
    def _layers_seeded(self) -> Iterator[None]:
        """Dropout draws from the global generator: lend it a seed of this step's own."""
        if not self._random_layers:
            yield
            return
        device, rank = self.accelerator.device, self.accelerator.process_index
        with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
            seed = generator_for(self.seed, self.key, self.done, _DROPOUT, rank).initial_seed()
            torch.manual_seed(seed)
            yield

    def state(self) -> dict[str, Tensor]:
        """Everything but the number of steps done, by name; a copy, contiguous."""
        tensors: dict[str, Tensor] = {"watch": self._watch}
        for (name, weight), average in zip(
            self._raw.named_parameters(), self._averages, strict=True
        ):
            tensors[f"net.{name}"] = weight
            tensors[f"ema.{name}"] = average
            moments = self._optimizer.state.get(weight)
            if moments:
                tensors["updates"] = moments["step"]
                tensors[f"first.{name}"] = moments["exp_avg"]
                tensors[f"second.{name}"] = moments["exp_avg_sq"]
        if self.accelerator.scaler is not None:
            scaler = self.accelerator.scaler.state_dict()
            tensors["scaler"] = torch.tensor(
                [scaler["scale"], scaler["_growth_tracker"]], dtype=torch.float64
            )
        return {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}

    def load(self, tensors: dict[str, Tensor], done: int) -> None:
        """Go on from `state` after `done` steps.

        Raises:
            KeyError: a tensor is missing.
            RuntimeError: a tensor has another shape.
        """
        with torch.no_grad():
            for (name, weight), average in zip(
                self._raw.named_parameters(), self._averages, strict=True
            ):
                weight.copy_(tensors[f"net.{name}"])
                average.copy_(tensors[f"ema.{name}"])
                if f"first.{name}" not in tensors:  # no gradient has reached it yet
                    continue
                # In the weight's own memory layout: the fused optimizer walks memory, not indices.
                self._optimizer.state[weight] = {
                    "step": tensors["updates"].to(weight.device, torch.float32, copy=True),
                    "exp_avg": torch.empty_like(weight).copy_(tensors[f"first.{name}"]),
                    "exp_avg_sq": torch.empty_like(weight).copy_(tensors[f"second.{name}"]),
                }
        self._watch = tensors["watch"].to(self._watch.device)
        scaler = self.accelerator.scaler
        if scaler is not None and "scaler" in tensors:
            scale, tracker = tensors["scaler"].tolist()
            scaler.load_state_dict(
                {**scaler.state_dict(), "scale": scale, "_growth_tracker": int(tracker)}
            )
        self.done = done

    def close(self) -> None:
        """Let go of what accelerate and the drawing thread hold."""
        if self._ahead is not None:
            self._ahead.close()
        self.accelerator.free_memory()


def _share(batch: Batch, part: int, parts: int, device: torch.device) -> Batch:
    """Every `parts`-th sample from `part` on, so that sorted times are shared out evenly."""
    if parts > 1:
        batch = tuple(None if x is None else x[part::parts] for x in batch)
    if device.type == "cpu":
        return batch
    return tuple(None if x is None else x.to(device, non_blocking=True) for x in batch)


class _Ahead:
    """Draws the next step's batch, in a thread and into pinned memory, while the GPU works."""

    def __init__(self, draw: Callable[[int], Batch]) -> None:
        self._make = draw
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: tuple[int, Future[Batch]] | None = None

    def take(self, step: int) -> Batch:
        ready = self._next is not None and self._next[0] == step
        batch = self._next[1].result() if ready and self._next else self._pinned(step)
        self._next = step + 1, self._thread.submit(self._pinned, step + 1)
        return batch

    def _pinned(self, step: int) -> Batch:
        return tuple(None if x is None else x.pin_memory() for x in self._make(step))

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
