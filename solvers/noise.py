"""Where solvers get their noise: a pure function of seed, sample and place in the run.

``CounterNoise`` hashes (seed, sample id, step index, slot, element) with the mixing function of
splitmix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators") and turns
pairs of 32-bit uniforms into normals by Box & Muller 1958. No state, so a sample's noise depends on
nothing but its own id.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sde_diffusion.errors import require_count
from sde_diffusion.sde import SDE
from solvers.base import Step

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_SLOT = 0xD1342543DE82EF95  # an odd multiplier that keeps slots apart from step indices
_PRIOR_INDEX = -1
_LOW_32 = 0xFFFFFFFF
_LOOK_AHEAD_ELEMENTS = 1 << 14
_LOOK_AHEAD_STEPS = 64
_SLACK = 1e-6  # of half_log_snr: what a float32 time is off by


class Noise(ABC):
    """A source of noise, called ``noise(x, step, slot)``."""

    @abstractmethod
    def __call__(self, x: Tensor, step: Step, slot: int = 0) -> Tensor:
        """Standard normal of ``x``'s shape, dtype and device for this step; do not write into
        it."""

    @abstractmethod
    def prior(self, x: Tensor) -> Tensor:
        """Standard normal of ``x``'s shape for the initial state."""

    @abstractmethod
    def select(self, indices: Tensor) -> Noise:
        """The noise of a part of the batch."""


class CounterNoise(Noise):
    """Noise by counting, the same for a sample in whatever batch, order or process it is drawn.

    CPU and GPU, float32 and float64 agree to rounding.

    Args:
        seed: any whole number from 0.
        sample_ids: ``(B,)`` whole numbers, one per sample; ``0..B-1`` by default.
    """

    def __init__(self, seed: int, sample_ids: Tensor | None = None) -> None:
        self.seed = require_count("seed", seed, least=0)
        self.sample_ids = sample_ids
        self._keys: Tensor | None = None
        self._blocks: dict[int, _Block] = {}

    def __call__(self, x: Tensor, step: Step, slot: int = 0) -> Tensor:
        return self.normal(x, step.index, slot)

    def prior(self, x: Tensor) -> Tensor:
        return self._draw(x, _PRIOR_INDEX, 1, 0)[0]

    def select(self, indices: Tensor) -> CounterNoise:
        ids = (
            indices.cpu()
            if self.sample_ids is None
            else self.sample_ids[indices.to(self.sample_ids.device)]
        )
        return CounterNoise(self.seed, ids)

    def normal(self, x: Tensor, index: int, slot: int) -> Tensor:
        """Standard normal like ``x`` for a step's index and slot."""
        block = self._blocks.get(slot)
        if block is None or not block.serves(x, index):
            # Small events are drawn for several steps at once: the hash then costs no more calls
            # than the update.
            ahead = max(1, min(_LOOK_AHEAD_STEPS, _LOOK_AHEAD_ELEMENTS // max(1, x.numel())))
            block = _Block(index, self._draw(x, index, ahead, slot))
            self._blocks[slot] = block
        return block.values[index - block.first]

    def _draw(self, x: Tensor, index: int, ahead: int, slot: int) -> Tensor:
        """``(ahead, B, *event)`` normals for steps ``index ..``."""
        if x.dtype.itemsize < 4:  # 32-bit uniforms overflow a half-precision type
            return self._draw(x.float(), index, ahead, slot).to(x.dtype)
        samples, event = len(x), math.prod(x.shape[1:])
        pairs = (event + 1) // 2
        place = torch.arange(index, index + ahead, device=x.device)
        place = place.mul_(_signed(_GOLDEN)).add_(_signed(slot * _SLOT + _MIX_1))
        keys = _mix(_mix(place)[:, None] + self._sample_keys(x))
        counter = torch.arange(1, pairs + 1, device=x.device).mul_(_signed(_GOLDEN))
        bits = _mix_rounds(keys[:, :, None] + counter)
        # The two halves of splitmix64's output; the upper one, read with its sign, is the angle.
        angle = (bits >> 32).to(x.dtype).mul_(math.pi * 2.0**-31)
        lower = (bits >> 31).bitwise_xor_(bits).bitwise_and_(_LOW_32)
        radius = lower.to(x.dtype).mul_(2.0**-32).add_(2.0**-33).log_().mul_(-2).sqrt_()
        normals = torch.empty(ahead, samples, 2, pairs, dtype=x.dtype, device=x.device)
        torch.mul(radius, angle.cos(), out=normals[:, :, 0])
        torch.mul(radius, angle.sin_(), out=normals[:, :, 1])
        normals = normals.view(ahead, samples, 2 * pairs)[:, :, :event]
        return normals.reshape(ahead, *x.shape)

    def _sample_keys(self, x: Tensor) -> Tensor:
        """One key per sample, ``(B,)``."""
        if self._keys is None or self._keys.device != x.device or len(self._keys) != len(x):
            ids = self.sample_ids
            ids = torch.arange(len(x), device=x.device) if ids is None else ids.to(x.device)
            if len(ids) != len(x):
                raise ValueError(
                    f"sample_ids must have one entry per sample, {len(x)}, got {len(ids)}"
                )
            seed_key = _mix(torch.full((1,), _signed(self.seed), device=x.device))
            self._keys = _mix(seed_key + ids * _signed(_GOLDEN))
        return self._keys


class _Block(NamedTuple):
    """Normals drawn ahead for consecutive steps."""

    first: int
    values: Tensor

    def serves(self, x: Tensor, index: int) -> bool:
        values = self.values
        return (
            0 <= index - self.first < len(values)
            and values.shape[1:] == x.shape
            and values.dtype == x.dtype
            and values.device == x.device
        )


def _signed(value: int) -> int:
    """A 64-bit pattern as the int64 that has it."""
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >> 63 else value


def _mix(bits: Tensor) -> Tensor:
    """The output function of splitmix64, in wrapping int64 arithmetic; overwrites its argument."""
    bits = _mix_rounds(bits)
    return bits.bitwise_xor_((bits >> 31).bitwise_and_((1 << 33) - 1))


def _mix_rounds(bits: Tensor) -> Tensor:
    """``_mix`` without its last exclusive or."""
    bits = bits.bitwise_xor_((bits >> 30).bitwise_and_((1 << 34) - 1)).mul_(_signed(_MIX_1))
    return bits.bitwise_xor_((bits >> 27).bitwise_and_((1 << 37) - 1)).mul_(_signed(_MIX_2))


class BrownianPath(Noise):
    """Increments of one Brownian path per sample, the same path whatever grid it is asked on.

    In ``y = x / alpha`` every linear SDE is driven by one Brownian motion whose clock is
    ``(sigma / alpha)^2``. A step gets that motion's increment over the step, normalised. The path
    is a virtual Brownian tree (Li et al. 2020, arXiv:2001.01328, sec. 4) over ``half_log_snr``:
    bridged at dyadic points down to ``depth`` halvings, linear in the clock below. Slots other than
    0 are independent of it.

    For measuring strong order, and wherever steps are refined; it waits for the device at each
    step.

    Args:
        sde: gives the path's range, ``t_max`` to ``t_min``.
        depth: halvings of that range; 30 resolves a billionth of it.
    """

    def __init__(
        self, sde: SDE, seed: int, sample_ids: Tensor | None = None, depth: int = 30
    ) -> None:
        self.sde = sde
        self.depth = require_count("depth", depth)
        self._counter = CounterNoise(seed, sample_ids)
        self._range = tuple(sde.at(float(t)).half_log_snr.item() for t in (sde.t_max, sde.t_min))

    def __call__(self, x: Tensor, step: Step, slot: int = 0) -> Tensor:
        if slot != 0:
            return self._counter(x, step, slot)
        start, end = (float(level.half_log_snr) for level in (step.start, step.end))
        low, high = self._range
        if start < low - _SLACK or end > high + _SLACK:
            raise ValueError(
                f"noise is a path from t_max={self.sde.t_max:g} to t_min={self.sde.t_min:g}; "
                f"step {step.index} leaves it, from t={float(step.start.t):g} to "
                f"{float(step.end.t):g}"
            )
        increment = self._value(x, start) - self._value(x, end)
        return (increment / math.sqrt(math.exp(-2 * start) - math.exp(-2 * end))).to(x.dtype)

    def prior(self, x: Tensor) -> Tensor:
        return self._counter.prior(x)

    def select(self, indices: Tensor) -> BrownianPath:
        return BrownianPath(
            self.sde, self._counter.seed, self._counter.select(indices).sample_ids, self.depth
        )

    def _value(self, x: Tensor, half_log_snr: float) -> Tensor:
        """The path at a level, above its value at ``t_min``; float64 inside, for differences of
        near points."""
        wide = x.double()
        low, high = self._range
        clock_low, clock_high = math.exp(-2 * low), math.exp(-2 * high)
        # Node numbers of the binary tree serve as step indices; slot 0 of the counter is the tree's
        # alone.
        at_low = math.sqrt(clock_low - clock_high) * self._counter.normal(wide, 1, 0)
        at_high = torch.zeros_like(wide)
        node = 1
        for _ in range(self.depth):
            if half_log_snr <= low:
                return at_low
            if half_log_snr >= high:
                return at_high
            middle = 0.5 * (low + high)
            clock_middle = math.exp(-2 * middle)
            weight = (clock_middle - clock_high) / (clock_low - clock_high)
            spread = math.sqrt((clock_low - clock_middle) * weight)
            node *= 2
            at_middle = torch.lerp(at_high, at_low, weight) + spread * self._bridge(wide, node)
            if half_log_snr < middle:
                high, clock_high, at_high = middle, clock_middle, at_middle
            else:
                low, clock_low, at_low = middle, clock_middle, at_middle
                node += 1
        weight = (math.exp(-2 * half_log_snr) - clock_high) / (clock_low - clock_high)
        return torch.lerp(at_high, at_low, min(1.0, max(0.0, weight)))

    def _bridge(self, wide: Tensor, node: int) -> Tensor:
        return self._counter.normal(wide, node, 0)


class RecordedNoise(Noise):
    """Noise given beforehand: to replay another library's draws, or a run of one's own.

    Args:
        draws: normals by ``(step index, slot)``, or a sequence of them, one per step in slot 0.
        initial: the normals of the initial state.
    """

    def __init__(
        self,
        draws: Mapping[tuple[int, int], Tensor] | Sequence[Tensor],
        initial: Tensor | None = None,
    ) -> None:
        if not isinstance(draws, Mapping):
            draws = {(index, 0): draw for index, draw in enumerate(draws)}
        self.draws = dict(draws)
        self.initial = initial

    def __call__(self, x: Tensor, step: Step, slot: int = 0) -> Tensor:
        if (step.index, slot) not in self.draws:
            raise ValueError(
                f"noise holds no draw for step {step.index}, slot {slot} "
                f"(it has {len(self.draws)} draws)"
            )
        return self.draws[step.index, slot].to(x)

    def prior(self, x: Tensor) -> Tensor:
        if self.initial is None:
            raise ValueError("noise holds no initial draw: give initial=, or start from x=")
        return self.initial.to(x)

    def select(self, indices: Tensor) -> RecordedNoise:
        draws = {place: draw[indices] for place, draw in self.draws.items()}
        return RecordedNoise(draws, None if self.initial is None else self.initial[indices])
