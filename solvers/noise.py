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

from sde_diffusion.broadcast import expand
from sde_diffusion.errors import require_count
from sde_diffusion.sde import SDE
from solvers.base import Step

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_SLOT = 0xD1342543DE82EF95  # an odd multiplier that keeps slots apart from step indices
_PRIOR_INDEX = -1
AREA = -1  # the slot of a step's space-time area
_LOW_32 = 0xFFFFFFFF
_LOOK_AHEAD_ELEMENTS = 1 << 17
_LOOK_AHEAD_STEPS = 64
_SLACK = 1e-6  # of half_log_snr: what a float32 time is off by


class Noise(ABC):
    """A source of noise, called ``noise(x, step, slot)``.

    Slot 0 is the increment of the driving motion over the step, slot ``AREA`` its space-time area
    ``1/h int_0^h B dt - B_h / 2``, over its standard deviation ``sqrt(h / 12)``: independent of the
    increment (Foster, Lyons & Oberhauser 2020, arXiv:1904.01861, def. 3.5).
    """

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

    def normal_at(self, x: Tensor, places: Tensor, slot: int) -> Tensor:
        """Standard normals ``(n, *x.shape)`` at places ``(n, B)``, long: each sample's own."""
        return self._at(x, places, slot)

    def _draw(self, x: Tensor, index: int, ahead: int, slot: int) -> Tensor:
        """``(ahead, B, *event)`` normals for steps ``index ..``."""
        return self._at(x, torch.arange(index, index + ahead, device=x.device)[:, None], slot)

    def _at(self, x: Tensor, place: Tensor, slot: int) -> Tensor:
        """``(n, B, *event)`` normals for places ``(n, 1)``, or ``(n, B)``: one per sample."""
        if x.dtype.itemsize < 4:  # 32-bit uniforms overflow a half-precision type
            return self._at(x.float(), place, slot).to(x.dtype)
        ahead = len(place)
        samples, event = len(x), math.prod(x.shape[1:])
        pairs = (event + 1) // 2
        place = place * _signed(_GOLDEN) + _signed(slot * _SLOT + _MIX_1)
        keys = _mix(_mix(place) + self._sample_keys(x))
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
    ``(sigma / alpha)^2``. A step gets that motion's increment over the step, normalised, or
    its space-time area. The path is a virtual Brownian tree (Li et al. 2020, arXiv:2001.01328, sec.
    4) over ``half_log_snr``, of increments and areas (Jelincic, Foster & Kidger 2024,
    arXiv:2405.06464): bridged at dyadic points down to ``depth`` halvings, a parabola in the clock
    below. Slots from 1 on are independent of it. Levels may be 0-d or ``(B,)``.

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
        self._last: tuple[Step, Tensor, Tensor] | None = None
        self._range = tuple(sde.at(float(t)).half_log_snr.item() for t in (sde.t_max, sde.t_min))

    def __call__(self, x: Tensor, step: Step, slot: int = 0) -> Tensor:
        if slot not in (0, AREA):
            return self._counter(x, step, slot)
        last = self._last
        if last is None or last[0] is not step or last[1].shape != x.shape:
            last = self._last = (step, *self._increment_and_area(x, step))
        return (last[1] if slot == 0 else last[2]).to(x.dtype)

    def _increment_and_area(self, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Both normalised, seen from ``step.start``: time runs towards the cleaner end."""
        wide = x.double()
        start, end = (
            level.half_log_snr.to(wide).expand(len(x)) for level in (step.start, step.end)
        )
        low, high = self._range
        if bool(((start < low - _SLACK) | (end > high + _SLACK)).any()):
            raise ValueError(
                f"noise is a path from t_max={self.sde.t_max:g} to t_min={self.sde.t_min:g}; "
                f"step {step.index} leaves it, from t={float(step.start.t.max()):g} to "
                f"{float(step.end.t.min()):g}"
            )
        (value, value_end), (integral, integral_end) = self._values(wide, torch.stack([start, end]))
        width = expand(torch.exp(-2 * start) - torch.exp(-2 * end), wide)
        increment = value - value_end
        area = 0.5 * increment - ((integral - integral_end) / width - value_end)
        return increment / width.sqrt(), area / (width / 12).sqrt()

    def prior(self, x: Tensor) -> Tensor:
        return self._counter.prior(x)

    def select(self, indices: Tensor) -> BrownianPath:
        return BrownianPath(
            self.sde, self._counter.seed, self._counter.select(indices).sample_ids, self.depth
        )

    def _values(self, wide: Tensor, half_log_snr: Tensor) -> tuple[Tensor, Tensor]:
        """The path at levels ``(n, B)``, above its value at ``t_min``, and its integral over the
        clock from there, ``(n, B, *event)``; float64, for differences of near points.

        One walk down the tree for all ``n``: where levels share a branch nothing is saved but the
        calls, which are what small events cost.
        """
        event = (1,) * (wide.ndim - 1)

        def spread(field: Tensor) -> Tensor:
            return field.reshape(field.shape + event)

        low, high = (torch.full_like(half_log_snr, end) for end in self._range)
        node = torch.ones_like(half_log_snr, dtype=torch.long)
        left, right = torch.exp(-2 * high), torch.exp(-2 * low)  # of the clock
        width = spread(right - left)
        increment = width.sqrt() * self._counter.normal_at(wide, node, 0)
        area = (width / 12).sqrt() * self._counter.normal_at(wide, node, AREA)
        value, integral = torch.zeros_like(area), torch.zeros_like(area)  # at the left end
        for _ in range(self.depth):
            middle = 0.5 * (low + high)
            clock = torch.exp(-2 * middle)
            a, b = spread(clock - left), spread(right - clock)
            node = 2 * node
            first = self._bridged(wide, node, a, b, increment, area)
            upper = half_log_snr < middle
            goes = spread(upper)
            rest = increment - first[0]
            # The integral over the whole is that over both parts.
            whole = (a + b) * area - a * first[1] + 0.5 * (a * increment - (a + b) * first[0])
            new_integral = integral + a * (value + first[1] + 0.5 * first[0])
            integral = torch.where(goes, new_integral, integral)
            value = torch.where(goes, value + first[0], value)
            increment = torch.where(goes, rest, first[0])
            area = torch.where(goes, whole / b, first[1])
            left, right = torch.where(upper, clock, left), torch.where(upper, right, clock)
            low, high = torch.where(upper, low, middle), torch.where(upper, middle, high)
            node = node + ~upper
        place = torch.exp(-2 * half_log_snr).clamp(left, right)
        a, b = spread(place - left), spread(right - place)
        share = a / (a + b)
        part = share * increment + 6 * share * (1 - share) * area
        integral = integral + a * (value + share**2 * area + 0.5 * part)
        return value + part, integral

    def _bridged(
        self, wide: Tensor, node: Tensor, a: Tensor, b: Tensor, increment: Tensor, area: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Increment and area over the first ``a`` of ``a + b``, given those over the whole.

        Their means are ``a/h W + 6 a b/h^2 H`` and ``(a/h)^2 H``; their covariance is ``[[a b (a^3
        + b^3)/h^4, -a^3 b/(2 h^3)], [., a/12 (1 - a^3/h^3)]]``.
        """
        h = a + b
        p, q = a / h, b / h
        cubes = p**3 + q**3
        z, other = (self._counter.normal_at(wide, node, slot) for slot in (0, AREA))
        spread = (h * p * q * cubes).sqrt()
        first = p * increment + 6 * p * q * area + spread * z
        slope = -0.5 * h * p**3 * q / spread
        left_over = h * (p / 12 * (1 - p**3) - 0.25 * p**5 * q / cubes)
        return first, p**2 * area + slope * z + left_over.clamp_min(0).sqrt() * other


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
