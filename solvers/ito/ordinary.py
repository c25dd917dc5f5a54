"""Runge-Kutta on a general probability-flow ODE: on the grid, or torchdiffeq's with its own
steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sde_diffusion.errors import require_count, require_finite, unknown_name
from sde_diffusion.ito.equations import Equation
from solvers.base import Step
from solvers.ito.base import Carried, CountedScore, ItoIntegrator, ItoSolver, spread_over
from solvers.methods.probability_flow import TABLEAUS
from solvers.noise import Noise

_ADAPTIVE = {"adaptive_heun": 2, "bosh3": 3, "dopri5": 5, "dopri8": 8}


@dataclass(frozen=True)
class RungeKutta(ItoSolver):
    """Fixed-step Runge-Kutta (euler, midpoint, heun, rk4) in the equation's own time.

    Args:
        method: one of the above.
    """

    method: str = "rk4"
    stochastic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.method not in TABLEAUS:
            raise unknown_name("method", self.method, TABLEAUS)

    @property
    def order(self) -> int:
        """Declared order."""
        return TABLEAUS[self.method].order

    def step(self, equation: Equation, x: Tensor, step: Step, noise: Noise) -> Tensor:
        tableau = TABLEAUS[self.method]
        start, span = step.start.t, step.end.t - step.start.t
        slopes = [equation.drift(x, start)]
        for node, row in zip(tableau.nodes, tableau.rows, strict=True):
            slopes.append(
                equation.drift(x + spread_over(span, x) * _mixed(row, slopes), start + node * span)
            )
        return x + spread_over(span, x) * _mixed(tableau.weights, slopes)


def _mixed(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(slopes[0])
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            total = total + weight * slope
    return total


@dataclass(frozen=True)
class Torchdiffeq(ItoIntegrator):
    """torchdiffeq's adaptive Runge-Kutta methods, each sample with steps of its own.

    A sample's value does not depend on its batch; the samples are solved one after another. Of the
    grid it takes the two ends.

    Args:
        method: adaptive_heun, bosh3, dopri5 or dopri8.
        rtol, atol: tolerances on the state.
        max_nfe: evaluations after which a sample's solve stops with an error.
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    max_nfe: int = 100_000
    stochastic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.method not in _ADAPTIVE:
            raise unknown_name("method", self.method, _ADAPTIVE)
        require_finite("rtol", self.rtol, above=0.0)
        require_finite("atol", self.atol, above=0.0)
        require_count("max_nfe", self.max_nfe)

    @property
    def adaptive(self) -> bool:
        return True

    def carry(self, equation: Equation, x: Tensor, steps: Sequence[Step], noise: Noise) -> Carried:
        results = torch.empty_like(x)
        nfe = torch.zeros(len(x), dtype=torch.long)
        passes = accepted = rejected = 0
        ends = torch.stack([steps[0].start.t, steps[-1].end.t])
        for i in range(len(x)):
            alone = equation.select(torch.tensor([i]))
            if isinstance(alone.score, CountedScore):
                alone.score.limit = self.max_nfe
            slope = _Slope(alone)
            results[i : i + 1] = self._solved(slope, x[i : i + 1], ends, i)
            nfe[i], spent = slope.cost
            passes += spent
            accepted += slope.accepted
            rejected += slope.rejected
        share = max(1, len(x))
        return Carried(results, nfe, passes / share, accepted / share, rejected / share)

    def _solved(self, slope: _Slope, x: Tensor, ends: Tensor, index: int) -> Tensor:
        from torchdiffeq import odeint

        try:
            states = odeint(
                slope,
                x.to(ends.dtype),
                ends,
                rtol=self.rtol,
                atol=self.atol,
                method=self.method,
                options={"dtype": ends.dtype, "step_t": ends[1:]},
            )
        except (AssertionError, RuntimeError) as error:
            raise RuntimeError(
                f"torchdiffeq's {self.method} failed on sample {index} at t = {slope.at:.6g}: "
                f"{error}; loosen rtol and atol, or use RungeKutta() with more steps"
            ) from error
        return states[-1].to(x.dtype)


class _Slope:
    """The drift as torchdiffeq calls it, with what it tells of its attempts."""

    def __init__(self, equation: Equation) -> None:
        self.equation = equation
        self.at = equation.start
        self.accepted = 0
        self.rejected = 0

    @property
    def cost(self) -> tuple[int, int]:
        """Evaluations and network passes so far."""
        score = self.equation.score
        return (score.nfe, score.network_passes) if isinstance(score, CountedScore) else (0, 0)

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        self.at = t.item()
        return self.equation.drift(x, t)

    def callback_accept_step(self, t: Tensor, x: Tensor, step: Tensor) -> None:
        self.accepted += 1

    def callback_reject_step(self, t: Tensor, x: Tensor, step: Tensor) -> None:
        self.rejected += 1
