"""Explicit Runge-Kutta methods on the probability-flow ODE."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sde_diffusion.errors import unknown_name
from sde_diffusion.prediction import ScoreFn
from sde_diffusion.sde import SDE, NoiseLevel
from solvers.base import Coefficients, Solver, State, Step, Stepped
from solvers.noise import Noise


class Tableau(NamedTuple):
    """A Butcher tableau: nodes after the first, the rows that lead to them, the weights."""

    order: int
    nodes: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


TABLEAUS = {
    "euler": Tableau(1, (), (), (1.0,)),
    "midpoint": Tableau(2, (0.5,), ((0.5,),), (0.0, 1.0)),
    "heun": Tableau(2, (1.0,), ((1.0,),), (0.5, 0.5)),
    "rk4": Tableau(
        4,
        (0.5, 0.5, 1.0),
        ((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
        (1 / 6, 1 / 3, 1 / 3, 1 / 6),
    ),
}


@dataclass(frozen=True)
class ProbabilityFlow(Solver):
    """Fixed-step Runge-Kutta (euler, midpoint, heun, rk4) on the probability-flow ODE.

    In the scaled coordinates ``y = x / alpha``, ``s = sigma / alpha`` every linear SDE's ODE is
    ``dy/ds = eps`` (Karras et al. 2022, arXiv:2206.00364, eq. 4; Song et al. 2021, eq. 13), without
    the stiff linear part; that is what is solved. ``euler`` is DDIM, ``heun`` is EDM's
    deterministic sampler.

    Args:
        method: one of the above.
    """

    method: str = "heun"
    stochastic = False

    def __post_init__(self) -> None:
        if self.method not in TABLEAUS:
            raise unknown_name("method", self.method, TABLEAUS)

    @property
    def order(self) -> int:
        return TABLEAUS[self.method].order

    def stages(self, sde: SDE, start: NoiseLevel, end: NoiseLevel) -> tuple[NoiseLevel, ...]:
        ratios = start.sigma_over_alpha, end.sigma_over_alpha
        inside = {
            node: sde.at(sde.time(-torch.log(torch.lerp(*ratios, node))))
            for node in TABLEAUS[self.method].nodes
            if node < 1
        }
        return tuple(inside.get(node, end) for node in TABLEAUS[self.method].nodes)

    def coefficients(self, step: Step) -> Coefficients:
        """For each stage and the end: what multiplies x, then what multiplies each non-zero
        slope."""
        tableau = TABLEAUS[self.method]
        span = step.end.sigma_over_alpha - step.start.sigma_over_alpha
        factors = []
        for row, level in zip(
            (*tableau.rows, tableau.weights), (*step.stages, step.end), strict=True
        ):
            factors.append(level.alpha / step.start.alpha)
            factors += [level.alpha * span * weight for weight in row if weight]
        return tuple(factors)

    def step(self, score_fn: ScoreFn, x: Tensor, step: Step, state: State, noise: Noise) -> Stepped:
        tableau = TABLEAUS[self.method]
        factors = iter(self.coefficients_of(step, x))
        slopes = [score_fn(x, step.start).eps]
        for row, level in zip(tableau.rows, step.stages, strict=True):
            slopes.append(score_fn(_combine(x, row, slopes, factors), level).eps)
        return Stepped(_combine(x, tableau.weights, slopes, factors), state)


def _combine(
    x: Tensor, row: tuple[float, ...], slopes: list[Tensor], factors: Iterator[Tensor]
) -> Tensor:
    total = next(factors) * x
    for weight, slope in zip(row, slopes, strict=True):
        if weight:
            total.addcmul_(next(factors), slope)
    return total
