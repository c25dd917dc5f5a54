"""Restart sampling: go back up with fresh noise and down again, on parts of the way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from sde_diffusion.errors import require_count, require_finite
from sde_diffusion.prediction import ScoreFn
from sde_diffusion.sde import SDE
from solvers.base import Solver, State, Step, Stepped, make_steps, unbound
from solvers.grids import karras_between
from solvers.noise import Noise
from solvers.plans import Plan, Run, walk
from solvers.solution import Solution

_SLOT = 1  # of the noise that goes up: also of a BrownianPath independent of the way down
_SLACK = 1e-6  # of half_log_snr: what rounding may take an interval's end beyond the grid's


class RestartInterval(NamedTuple):
    """A part of the way that is gone several times.

    Attributes:
        low, high: ``sigma / alpha`` at its ends (the paper's sigma, t_min and t_max; for VE and
            EDM sigma itself), ``0 < low < high``.
        repeats: how often the state goes up and down again, K; 0 for never.
        steps: of each way down; by default as many as the grid has in the interval, at least 1.
    """

    low: float
    high: float
    repeats: int = 1
    steps: int | None = None


@dataclass(frozen=True)
class Restart(Plan):
    """The ODE down the grid, and at each interval's clean end back up and down again, K times.

    Xu et al. 2023, arXiv:2306.14878, alg. 1. Going up is the forward process itself, exactly: from
    low to high, ``x <- r x + sqrt(sigma_high^2 - r^2 sigma_low^2) z`` with ``r = alpha_high /
    alpha_low``; errors made so far shrink with what the fresh noise covers. The way down is the
    solver's, on times uniform in ``(sigma / alpha)^(1 / rho)`` (the paper's sec. 4.1); a multistep
    solver starts there without history.

    An interval goes up from the grid's time nearest to ``low`` in log-SNR, so that the run keeps
    its grid; ``high`` is met exactly. The noise of the k-th way up is ``noise(x, step, 1)`` with
    ``step.index = k``, whatever the grid. A trajectory shows all states in the order of the run,
    those after going up included; ``stats["accepted"]`` counts them, less the first.

    Args:
        intervals: ``RestartInterval``s, or tuples ``(low, high[, repeats[, steps]])``, in any
            order; they may touch, and not overlap.
        rho: of the ways down.
    """

    intervals: Sequence[RestartInterval | tuple[float, ...]]
    rho: float = 7.0

    def __post_init__(self) -> None:
        require_finite("rho", self.rho, above=0.0)
        if isinstance(self.intervals, str) or not isinstance(self.intervals, Sequence):
            raise TypeError(
                f"intervals must be a sequence of (low, high, repeats, steps), got "
                f"{self.intervals!r}"
            )
        for below, above in pairwise(sorted(self._intervals, key=_ends)):
            if above.low < below.high:
                raise ValueError(
                    f"intervals must not overlap, but ({above.low:g}, {above.high:g}) begins "
                    f"within ({below.low:g}, {below.high:g}): raise repeats, or let them touch"
                )

    @property
    def _intervals(self) -> tuple[RestartInterval, ...]:
        return tuple(_interval(f"intervals[{i}]", given) for i, given in enumerate(self.intervals))

    def check(self, solver: Solver, trajectory: bool, compile: bool, gradients: bool) -> None:
        if solver.stochastic:
            raise ValueError(
                f"plan=Restart goes down by an ODE, and {solver!r} draws noise of its own: take an "
                "ODE solver, or eta=0 where it has one"
            )

    def run(self, run: Run) -> Solution:
        legs = list(self._legs(run.sde, run.times))
        path = make_steps(run.sde, run.solver, legs[0], run.x)
        for number, (before, leg) in enumerate(pairwise(legs)):
            path.append(_lift(number, run.sde, before[-1], leg[0], run.x))
            taken = len(path)
            for step in make_steps(run.sde, run.solver, leg, run.x):
                path.append(step._replace(index=taken + step.index))
        return walk(run, _WithLifts(run.solver), path, torch.cat(legs))

    def _legs(self, sde: SDE, times: Tensor) -> Iterator[Tensor]:
        """The ways down, decreasing times, each from where the state goes up to from the last."""
        begun, done = times[:1], 0
        for place, interval in self._placed(sde, times):
            yield torch.cat([begun, times[done + 1 : place + 1]])
            half_log_snr = torch.tensor(-math.log(interval.high), dtype=torch.float64)
            high = min(float(sde.time(half_log_snr)), float(times[0]))
            inside = int((times[:place] < high).sum()) + 1
            down = karras_between(
                sde, high, float(times[place]), interval.steps or inside, self.rho
            )
            for _ in range(interval.repeats - 1):
                yield down
            begun, done = down, place
        yield torch.cat([begun, times[done + 1 :]])

    def _placed(self, sde: SDE, times: Tensor) -> list[tuple[int, RestartInterval]]:
        """The intervals in the order of the run, each with the place on the grid where it goes
        up."""
        logs = -sde.at(times).half_log_snr
        largest, smallest = float(logs[0]), float(logs[-1])
        placed = []
        for interval in sorted(self._intervals, key=_ends, reverse=True):
            low, high = math.log(interval.low), math.log(interval.high)
            if low < smallest - _SLACK or high > largest + _SLACK:
                raise ValueError(
                    f"intervals hold ({interval.low:g}, {interval.high:g}) in sigma / alpha, and "
                    f"the grid reaches from {math.exp(largest):g} to {math.exp(smallest):g}: keep "
                    "within it"
                )
            if interval.repeats:
                distance = torch.where(logs < high - _SLACK, (logs - low).abs(), math.inf)
                placed.append((int(distance.argmin()), interval))
        return placed


class _Lift(Step):
    """The way up, from the cleaner level; its coefficients multiply state and noise."""

    __slots__ = ()


def _lift(number: int, sde: SDE, low: Tensor, high: Tensor, x: Tensor) -> _Lift:
    levels = sde.at(torch.stack([low, high]))
    (alpha_low, alpha_high), (r_low, r_high) = levels.alpha, levels.sigma_over_alpha
    spread = alpha_high * torch.sqrt((r_high - r_low) * (r_high + r_low))
    ratio = alpha_high / alpha_low
    factors = tuple(f.to(device=x.device, dtype=x.dtype) for f in (ratio, spread))
    lower, upper = unbound(levels, x.device)
    return _Lift(number, lower, upper, (), factors)


class _WithLifts(Solver):
    """A solver that goes up where a step is a ``_Lift``, and begins anew from there."""

    def __init__(self, solver: Solver) -> None:
        self._solver = solver

    @property
    def order(self) -> int:
        return self._solver.order

    stochastic = True

    def init(self, x: Tensor) -> State:
        return self._solver.init(x)

    def step(self, score_fn: ScoreFn, x: Tensor, step: Step, state: State, noise: Noise) -> Stepped:
        if not isinstance(step, _Lift):
            return self._solver.step(score_fn, x, step, state, noise)
        ratio, spread = step.coefficients
        x = ratio * x + spread * noise(x, step, _SLOT)
        return Stepped(x, self._solver.init(x))


def _interval(name: str, given: object) -> RestartInterval:
    if isinstance(given, str) or not isinstance(given, Sequence) or not 2 <= len(given) <= 4:
        raise TypeError(f"{name} must be (low, high[, repeats[, steps]]), got {given!r}")
    interval = RestartInterval(*given)
    require_finite(f"{name}.low", interval.low, above=0.0)
    require_finite(f"{name}.high", interval.high, above=interval.low)
    require_count(f"{name}.repeats", interval.repeats, least=0)
    if interval.steps is not None:
        require_count(f"{name}.steps", interval.steps)
    return interval


def _ends(interval: RestartInterval) -> tuple[float, float]:
    return interval.low, interval.high
