"""Stochastic Adams methods: x0 extrapolated from earlier steps, corrected by its own next value.

``solvers.exponential`` has the equation. A predictor of k terms puts for x0 the polynomial through
its last k values; a corrector of k terms puts the one through the value at the step's end, which
the next step evaluates anyway, and the k - 1 before it. So at the start of a step the state that
the last one left is evaluated, then corrected with that value, then carried on: one evaluation a
step. The last step's result stays predicted.

Orders, measured. Without noise: k of a predictor of k terms, and ``min(k, p + 1)`` of a corrector
of k terms upon p. The first step knows one value only, which would hold every run at order 2, so
from three terms on it is corrected with two terms even where there is no corrector; this caps the
order at 3. With noise the weak order is 2 at most, whatever the number of terms: values at the
grid's own times see each step's noise in a lump, and cannot see the part of its integral over the
step (a twelfth of h^3 in the variance, per step) that is independent of the lump. More terms
still make the mean converge faster.

A run with fewer steps than terms uses the values there are: a one-step run is of order 1.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sde_diffusion.broadcast import expand
from sde_diffusion.prediction import ScoreFn
from sde_diffusion.sde import NoiseLevel
from solvers.base import Coefficients, Solver, State, Step, Stepped
from solvers.exponential import Function, interpolation_weights
from solvers.noise import Noise


class History(NamedTuple):
    """What a run remembers.

    Attributes:
        values: x0 at the last states, newest first.
        levels: where they were evaluated.
        base: the last step's result without its integral: the state carried on, and its noise.
    """

    values: tuple[Tensor, ...]
    levels: tuple[NoiseLevel, ...]
    base: Tensor | None


class StochasticAdams(Solver):
    """A subclass names its stochasticity, and how many terms to use."""

    @property
    @abstractmethod
    def predictor_terms(self) -> int:
        """Values that the predictor interpolates."""

    @property
    @abstractmethod
    def corrector_terms(self) -> int:
        """Values that the corrector interpolates, the new one included; 0 for none."""

    @abstractmethod
    def stochasticity(self, start: NoiseLevel, end: NoiseLevel) -> Tensor:
        """``T = int tau^2`` over a step."""

    @abstractmethod
    def kernel(self, start: NoiseLevel, end: NoiseLevel) -> Function:
        """``k`` as a function of ``half_log_snr`` within a step."""

    def variable(self, half_log_snr: Tensor) -> Tensor:
        """What x0 is interpolated in."""
        return half_log_snr

    @property
    def order(self) -> int:
        k, p = self.corrector_terms, self.predictor_terms
        return min(min(k, p + 1) if k else p, 2 if self.stochastic else 3)

    def init(self, x: Tensor) -> State:
        return History((), (), None)

    def coefficients(self, step: Step) -> Coefficients:
        """``(propagators, predictor weights, corrector weights of the step before)``, for the
        consecutive steps of a run."""
        start, end = step.start, step.end
        count = start.t.numel()
        v = start.half_log_snr
        predictor = torch.zeros(self.predictor_terms, count).to(v)
        for terms, rows in _histories(self.predictor_terms, count):
            nodes = [v[rows.start - j : rows.stop - j] for j in range(terms)]
            predictor[:terms, rows] = self._weights(nodes, _part(start, rows), _part(end, rows))
        corrector = torch.zeros(self._corrector_reach, count).to(v)
        for terms, rows in _histories(self._corrector_reach, count, first=1):
            nodes = [v[rows.start - j : rows.stop - j] for j in range(terms)]
            before = slice(rows.start - 1, rows.stop - 1)
            corrector[:terms, rows] = self._weights(nodes, _part(start, before), _part(end, before))
        return self._propagators(start, end), tuple(predictor), tuple(corrector)

    def step(self, score_fn: ScoreFn, x: Tensor, step: Step, state: State, noise: Noise) -> Stepped:
        propagators, predictor, corrector = step.coefficients or self._by_hand(step, state, x)
        values = (score_fn(x, step.start).x0, *state.values)
        if state.base is not None:
            x = _weighted(state.base, corrector, values)
        base = propagators[0] * x
        if len(propagators) > 1:
            z = noise(x, step)
            base.addcmul_(propagators[1], z)
        corrects = self.corrector_terms > 0 or (len(values) == 1 and self.predictor_terms > 2)
        history = History(
            values[: self._memory],
            (step.start, *state.levels)[: self._memory],
            base if corrects else None,
        )
        return Stepped(_weighted(base, predictor, values), history)

    @property
    def _corrector_reach(self) -> int:
        """Values that a correction uses at most; two in that of a first step without corrector."""
        return self.corrector_terms or 2

    @property
    def _memory(self) -> int:
        reach = max(self.corrector_terms, 2) if self.corrector_terms else 1
        return max(self.predictor_terms, reach) - 1

    def _by_hand(self, step: Step, state: History, x: Tensor) -> Coefficients:
        """The coefficients of a step that no run prepared, from the levels remembered."""
        start, end = step.start, step.end
        nodes = [level.half_log_snr for level in (start, *state.levels)]
        parts = [
            self._propagators(start, end),
            tuple(self._weights(nodes[: self.predictor_terms], start, end)),
        ]
        if state.base is not None:
            reach = nodes[: self._corrector_reach]
            parts.append(tuple(self._weights(reach, state.levels[0], start)))
        else:
            parts.append(())
        return tuple(tuple(expand(c, x).to(x.dtype) for c in part) for part in parts)

    def _propagators(self, start: NoiseLevel, end: NoiseLevel) -> tuple[Tensor, ...]:
        passed = self.stochasticity(start, end)
        keep = end.sigma / start.sigma * torch.exp(-passed)
        if not self.stochastic:
            return (keep,)
        return keep, end.sigma * torch.sqrt(-torch.expm1(-2 * passed))

    def _weights(self, nodes: Sequence[Tensor], start: NoiseLevel, end: NoiseLevel) -> Tensor:
        weights = interpolation_weights(
            nodes,
            start.half_log_snr,
            end.half_log_snr,
            self.kernel(start, end),
            self.variable,
        )
        return end.alpha * torch.stack(weights)


def _histories(terms: int, count: int, first: int = 0) -> list[tuple[int, slice]]:
    """``(values known, steps that know as many)`` from step ``first`` of a run of ``count``."""
    most = min(terms, count)
    return [
        (known, slice(max(known - 1, first), known if known < most else count))
        for known in range(min(first + 1, most), most + 1)
    ]


def _part(level: NoiseLevel, rows: slice) -> NoiseLevel:
    return level.map(lambda field: field[rows])


def _weighted(base: Tensor, weights: Coefficients, values: tuple[Tensor, ...]) -> Tensor:
    """``base + sum of weights * values`` over the values there are."""
    total = base.clone()
    for weight, value in zip(weights, values, strict=False):
        total.addcmul_(weight, value)
    return total
