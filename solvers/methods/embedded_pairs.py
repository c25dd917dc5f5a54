"""Embedded Runge-Kutta pairs on the probability-flow ODE."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from sde_diffusion.prediction import ScoreFn
from sde_diffusion.sde import SDE, NoiseLevel
from solvers.base import Coefficients, Solver, State, Step, Stepped
from solvers.noise import Noise

_POWER = 0.75  # of sigma / alpha in the variable of integration


class Pair(NamedTuple):
    """An embedded pair whose last row is its weights, so that its last slope is the next step's
    first.

    Attributes:
        order: of the weights, which are what is carried on; the estimate's is one less.
        nodes: after the first.
        rows: that lead to them.
        error: weights less the embedded method's weights.
    """

    order: int
    nodes: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]
    error: tuple[float, ...]


BOGACKI_SHAMPINE = Pair(
    3,
    (1 / 2, 3 / 4, 1.0),
    ((1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    (2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8),
)
DORMAND_PRINCE = Pair(
    5,
    (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    (
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    (
        71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40,
    ),
)  # fmt: skip
TSITOURAS = Pair(
    5,
    (0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0),
    (
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
        (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401,
         -0.028269050394068383),
        (0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081,
         2.324710524099774),
    ),
    (
        -0.00178001105222577714, -0.0008164344596567469, 0.007880878010261995,
        -0.1447110071732629, 0.5823571654525552, -0.45808210592918697, 1 / 66,
    ),
)  # fmt: skip


class _EmbeddedPair(Solver):
    """An explicit pair in ``z = x / sqrt(alpha^2 + sigma^2)`` over ``a = arctan((sigma /
    alpha)^(3/4))``.

    With ``sin = sigma / sqrt(alpha^2 + sigma^2)`` every linear SDE's probability-flow ODE (Karras
    et al. 2022, arXiv:2206.00364, eq. 4) is ``dz/dlambda = -sin (eps - sin z)`` over lambda =
    half_log_snr. While x0 and eps stand still z is a sine wave of ``arctan(sigma / alpha)``, for
    which no step is too long; over lambda the same curve has poles at a distance of pi/2, which
    hold steps to about that. The power spreads the clean end, where the finest detail of the data
    is. ``benchmarks/adaptive.py`` measures what that saves.

    The slope at a step's end is carried over (first same as last): a step costs stages - 1
    evaluations, a run one more; a step tried again costs no more.
    """

    pair: ClassVar[Pair]
    stochastic = False

    @property
    def order(self) -> int:
        return self.pair.order

    @property
    def error_order(self) -> float:
        return self.pair.order

    def retried(self, before: State, after: State) -> State:
        _, first = after
        return first, first

    def displaced(self, state: State) -> State:
        return ()

    def stages(self, sde: SDE, start: NoiseLevel, end: NoiseLevel) -> tuple[NoiseLevel, ...]:
        ends = _angle(start), _angle(end)
        inside = {
            node: sde.at(sde.time(-torch.lerp(*ends, node).tan().log() / _POWER))
            for node in self.pair.nodes
            if node < 1
        }
        return tuple(inside.get(node, end) for node in self.pair.nodes)

    def coefficients(self, step: Step) -> Coefficients:
        """What makes the first slope; for each stage, what multiplies x, then each slope of
        non-zero weight, then what makes its own slope; then the error's."""
        first, last = step.start, step.end
        span = _angle(last) - _angle(first)
        factors = [*_slope_factors(first)]
        for row, level in zip(self.pair.rows, step.stages, strict=True):
            factors.append(_radius(level) / _radius(first))
            factors += [span * _radius(level) * weight for weight in row if weight]
            factors += _slope_factors(level)
        factors += [span * _radius(last) * weight for weight in self.pair.error if weight]
        return tuple(factors)

    def step(self, score_fn: ScoreFn, x: Tensor, step: Step, state: State, noise: Noise) -> Stepped:
        factors = iter(self.coefficients_of(step, x))
        pull, keep = next(factors), next(factors)
        first = state[0] if state else (keep * x).addcmul_(pull, score_fn(x, step.start).eps)
        slopes = [first]
        x_stage = x
        for row, level in zip(self.pair.rows, step.stages, strict=True):
            x_stage = _sum(next(factors) * x, row, slopes, factors)
            pull, keep = next(factors), next(factors)
            slopes.append((keep * x_stage).addcmul_(pull, score_fn(x_stage, level).eps))
        error = _sum(torch.zeros_like(x), self.pair.error, slopes, factors)
        return Stepped(x_stage, (slopes[-1], first), error)


@dataclass(frozen=True)
class BogackiShampine(_EmbeddedPair):
    """Order 3 with an error estimate of order 2 (Bogacki & Shampine 1989, Appl. Math. Lett. 2(4)),
    3 evaluations a step."""

    pair = BOGACKI_SHAMPINE


@dataclass(frozen=True)
class DormandPrince(_EmbeddedPair):
    """Order 5 with an error estimate of order 4 (Dormand & Prince 1980, J. Comp. Appl. Math. 6(1)),
    6 evaluations a step."""

    pair = DORMAND_PRINCE


@dataclass(frozen=True)
class Tsitouras(_EmbeddedPair):
    """Order 5 with an error estimate of order 4 (Tsitouras 2011, Comput. Math. Appl. 62(2)), 6
    evaluations a step."""

    pair = TSITOURAS


def _radius(level: NoiseLevel) -> Tensor:
    return torch.sqrt(level.alpha**2 + level.sigma**2)


def _angle(level: NoiseLevel) -> Tensor:
    return torch.atan(torch.exp(-_POWER * level.half_log_snr))


def _slope_factors(level: NoiseLevel) -> tuple[Tensor, Tensor]:
    """What multiplies eps and x in ``dz/da``."""
    radius = _radius(level)
    sine = level.sigma / radius
    # -dlambda/da = (1 + r^2) / (_POWER r) with r = (sigma / alpha)^_POWER
    rate = 2 / _POWER * torch.cosh(_POWER * level.half_log_snr)
    return rate * sine, -rate * sine**2 / radius


def _sum(
    total: Tensor, row: tuple[float, ...], slopes: list[Tensor], factors: Iterator[Tensor]
) -> Tensor:
    for weight, slope in zip(row, slopes, strict=True):
        if weight:
            total.addcmul_(next(factors), slope)
    return total
