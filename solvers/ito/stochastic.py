"""Euler-Maruyama and Milstein on a general equation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sde_diffusion.ito.calculus import commutes, ito_correction, noise_derivative
from sde_diffusion.ito.equations import Equation
from sde_diffusion.ito.fields import applied, noise_like
from sde_diffusion.ito.sde import time_tensor
from solvers.base import Step
from solvers.ito.base import ItoSolver, spread_over, squared_length
from solvers.noise import Noise


@dataclass(frozen=True)
class EulerMaruyama(ItoSolver):
    """``x + b dt + G dw`` (Maruyama 1955), for noise of every kind.

    Strong order 1/2, 1 where G does not depend on x; weak order 1.
    """

    stochastic: ClassVar[bool] = True

    def step(self, equation: Equation, x: Tensor, step: Step, noise: Noise) -> Tensor:
        return advanced(equation, x, step, noise)[0]


@dataclass(frozen=True)
class Milstein(ItoSolver):
    """Euler-Maruyama with the noise's own first-order term, for commutative noise.

    ``1/2 sum_jk (G_j . grad) G_k (dw_j dw_k - delta_jk |dt|)`` (Milstein 1974; Kloeden & Platen
    1992, eq. 10.3.16), by forward-mode autograd. Strong order 1, weak order 1. Noise is commutative
    where it is diagonal, drives by one motion, or has ``(G_j . grad) G_k = (G_k . grad) G_j``;
    other noise would need Levy areas and is refused.
    """

    stochastic: ClassVar[bool] = True

    def check(self, equation: Equation, x: Tensor) -> None:
        super().check(equation, x)
        if not (equation.state_dependent and len(x)) or equation.kind == "diagonal":
            return
        for share in (0.1, 0.5, 0.9):
            t = time_tensor(equation.start + share * (equation.end - equation.start), x)
            if not commutes(equation.diffusion, equation.kind, x, t):
                raise ValueError(
                    f"Milstein needs commutative noise, and this {equation.kind!r} diffusion's is "
                    f"not, at t = {float(t):.6g}: use EulerMaruyama(), or Torchsde('heun')"
                )

    def step(self, equation: Equation, x: Tensor, step: Step, noise: Noise) -> Tensor:
        euler, motion = advanced(equation, x, step, noise)
        if not equation.state_dependent:
            return euler
        t, kind = step.start.t, equation.kind
        span = spread_over((step.end.t - step.start.t).abs(), x)
        squared = noise_derivative(equation.diffusion, kind, x, t, motion, motion)
        return euler + 0.5 * (squared - span * ito_correction(equation.diffusion, kind, x, t))


def advanced(equation: Equation, x: Tensor, step: Step, noise: Noise) -> tuple[Tensor, Tensor]:
    """Euler's step, and the motion that drove it."""
    t = step.start.t
    span, deviation = squared_length(step)
    g = equation.diffusion(x, t)
    like = noise_like(equation.kind, g, x)
    motion = spread_over(deviation, like) * noise(like, step)
    drifted = x + spread_over(span, x) * equation.drift(x, t)
    return drifted + applied(equation.kind, g, motion, x), motion
