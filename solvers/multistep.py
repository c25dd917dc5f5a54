"""Linear multistep methods on ``x(c_u) = ratio x(c_t) + integral of K(c) q(c) dc + noise``.

Every linear SDE's reverse equation has this form exactly, for a quantity q (x0 or eps), a
coordinate c (``half_log_snr`` or ``sigma / alpha``) and a kernel K that the method chooses. A
method of order k puts for q the polynomial through its last k values; the weights are the integrals
of K times the Lagrange polynomials, by Gauss-Legendre quadrature in float64: variable steps need no
special case, nothing cancels where steps are small, and no factor can be forgotten.

The first steps have fewer values, hence a lower order, and their error would rule the whole run of
a method of order 3 and above. They are therefore repaired without new evaluations: when the second
(for order 4 also the third) value is known, the state is integrated again from the start with all
values so far. Order 4 evaluates once more, at the second state so repaired.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sde_diffusion.prediction import Prediction, ScoreFn
from sde_diffusion.sde import NoiseLevel
from solvers.base import Coefficients, Solver, State, Step, Stepped, expanded
from solvers.noise import Noise

_QUADRATURE_NODES = 24  # exact to rounding for exponentials over the longest step there is


class History(NamedTuple):
    """What a run remembers.

    Attributes:
        values: the quantity at the last states, most recent first, at most ``memory`` of them.
        free: the state as it would be with q = 0: the initial one and the noise, carried on. Kept
            while the start may still be repaired.
    """

    values: tuple[Tensor, ...]
    free: Any  # a tensor, or None


class Multistep(Solver):
    """A linear multistep method; a subclass names its integral."""

    @abstractmethod
    def coordinate(self, level: NoiseLevel) -> Tensor:
        """The variable c, monotone in time."""

    @abstractmethod
    def quantity(self, prediction: Prediction) -> Tensor:
        """What is interpolated: q."""

    @abstractmethod
    def kernel(self, end: NoiseLevel, c: Tensor) -> Tensor:
        """K at ``c`` for a step that ends at ``end``, whose fields broadcast with ``c``."""

    @abstractmethod
    def ratio(self, start: NoiseLevel, end: NoiseLevel) -> Tensor:
        """What multiplies the state."""

    def spread(self, start: NoiseLevel, end: NoiseLevel) -> Tensor | None:
        """Standard deviation of the step's noise; ``None`` without."""
        return None

    def init(self, x: Tensor) -> State:
        return History((), x)

    def displaced(self, state: State) -> State:
        return History(state.values, None)

    def coefficients(self, step: Step) -> Coefficients:
        """``(ratio, spread, weights, repair weights)``, for the consecutive steps of a run."""
        start, end = step.start, step.end
        count, available = start.t.numel(), min(self.order, start.t.numel())
        c = self.coordinate(start)
        weights = torch.zeros(self.order, count, dtype=torch.float64)
        for known in range(1, available + 1):
            # The first step that has this many values, and, of the longest history, all later ones.
            rows = slice(known - 1, known if known < available else count)
            nodes = [c[rows.start - j : rows.stop - j] for j in range(known)]
            level = end.map(lambda field, rows=rows: field[rows])  # type: ignore[misc]
            weights[:known, rows] = self._integrals(nodes, c[rows], self.coordinate(level), level)
        repair = torch.zeros(self.order, count, dtype=torch.float64)
        for i in range(1, min(self.order - 1, count)):
            nodes = [c[i - j : i - j + 1] for j in range(i + 1)]
            level = start.map(lambda field, i=i: field[i : i + 1])  # type: ignore[misc]
            repair[: i + 1, i : i + 1] = self._integrals(nodes, c[:1], c[i : i + 1], level)
        return self._propagators(step), tuple(weights), tuple(repair)

    def coefficients_of(self, step: Step, x: Tensor) -> Coefficients:
        """A step made by hand knows no earlier levels: it is taken at order 1."""
        if step.coefficients:
            return step.coefficients
        c, c_end = self.coordinate(step.start), self.coordinate(step.end)
        first = self._integrals([c], c, c_end, step.end)[0]
        none = torch.zeros_like(first)
        rest = (none,) * (self.order - 1)
        return expanded((self._propagators(step), (first, *rest), (none, *rest)), x)

    def step(self, score_fn: ScoreFn, x: Tensor, step: Step, state: State, noise: Noise) -> Stepped:
        propagators, weights, repair = self.coefficients_of(step, x)
        q = self.quantity(score_fn(x, step.start))
        if step.coefficients and self.starting(state):
            x, q = self.repaired(score_fn, step, q, state, repair)
        carried, history = self.carried(x, q, step, state, noise, propagators)
        return Stepped(weighted_sum(carried, weights, (q, *state.values)), history)

    def starting(self, history: History) -> bool:
        """Whether the state at the start of a step is to be repaired."""
        return history.free is not None and 0 < len(history.values) < self.order - 1

    def repaired(
        self, score_fn: ScoreFn, step: Step, q: Tensor, history: History, repair: Coefficients
    ) -> tuple[Tensor, Tensor]:
        """The state at ``step.start`` integrated from the very start, and the quantity there."""
        x = weighted_sum(history.free, repair, (q, *history.values))
        if self.order > 3 and len(history.values) == 1:
            q = self.quantity(score_fn(x, step.start))
        return x, q

    def carried(
        self,
        x: Tensor,
        q: Tensor,
        step: Step,
        history: History,
        noise: Noise,
        propagators: Coefficients,
    ) -> tuple[Tensor, History]:
        """The state at ``step.end`` but for the integral, and the history with ``q``."""
        values = (q, *history.values)[: self.memory]
        free = history.free if len(history.values) + 1 < self.order - 1 else None
        if self.stochastic:
            ratio, spread = propagators
            z = noise(x, step)
            free = None if free is None else (ratio * free).addcmul_(spread, z)
            return (ratio * x).addcmul_(spread, z), History(values, free)
        (ratio,) = propagators
        return ratio * x, History(values, None if free is None else ratio * free)

    @property
    def memory(self) -> int:
        """Values that a step needs beside its own."""
        return self.order - 1

    def _propagators(self, step: Step) -> tuple[Tensor, ...]:
        ratio, spread = self.ratio(step.start, step.end), self.spread(step.start, step.end)
        return (ratio,) if spread is None else (ratio, spread)

    def _integrals(
        self, nodes: list[Tensor], lower: Tensor, upper: Tensor, end: NoiseLevel
    ) -> Tensor:
        """Integrals of K times each Lagrange polynomial of the nodes: ``(len(nodes), *shape)``."""
        points, weights = _gauss_legendre()
        shape = (-1,) + (1,) * lower.ndim
        points, weights = points.reshape(shape).to(lower), weights.reshape(shape).to(lower)
        c = lower + (upper - lower) * points
        kernel = self.kernel(end, c) * weights * (upper - lower)
        integrals = []
        for j, node in enumerate(nodes):
            basis = torch.ones_like(c)
            for other in (*nodes[:j], *nodes[j + 1 :]):
                basis = basis * (c - other) / (node - other)
            integrals.append((kernel * basis).sum(0))
        return torch.stack(integrals)


class DataPrediction(Multistep):
    """The reverse family in x0 and half_log_snr (Lu et al. 2022, arXiv:2211.01095, for any eta).

    With ``h = l_u - l_t``, l = half_log_snr and ``a = 1 + eta^2``, ``x_u = sigma_u/sigma_t
    e^(-eta^2 h) x_t + alpha_u a int e^(-a (l_u - l)) x0(l) dl + sigma_u sqrt(1 - e^(-2 eta^2 h))
    z``.
    """

    eta: float

    def coordinate(self, level: NoiseLevel) -> Tensor:
        return level.half_log_snr

    def quantity(self, prediction: Prediction) -> Tensor:
        return prediction.x0

    def kernel(self, end: NoiseLevel, c: Tensor) -> Tensor:
        rate = 1 + self.eta**2
        return end.alpha * rate * torch.exp(rate * (c - end.half_log_snr))

    def ratio(self, start: NoiseLevel, end: NoiseLevel) -> Tensor:
        h = end.half_log_snr - start.half_log_snr
        return end.sigma / start.sigma * torch.exp(-(self.eta**2) * h)

    def spread(self, start: NoiseLevel, end: NoiseLevel) -> Tensor | None:
        if self.eta == 0:
            return None
        h = end.half_log_snr - start.half_log_snr
        return end.sigma * torch.sqrt(-torch.expm1(-2 * self.eta**2 * h))


@cache
def _gauss_legendre() -> tuple[Tensor, Tensor]:
    """Nodes and weights on the unit interval."""
    points, weights = np.polynomial.legendre.leggauss(_QUADRATURE_NODES)
    return torch.from_numpy(0.5 * (points + 1)), torch.from_numpy(0.5 * weights)


def weighted_sum(start: Tensor, weights: Coefficients, values: tuple[Tensor, ...]) -> Tensor:
    """``start + sum of weights * values``, over the values there are."""
    total = torch.addcmul(start, weights[0], values[0])
    for weight, value in zip(weights[1:], values[1:], strict=False):
        total.addcmul_(weight, value)
    return total
