"""torchsde's methods on a general equation: diagonal, scalar and general noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sde_diffusion.broadcast import expand
from sde_diffusion.errors import unknown_name
from sde_diffusion.ito.calculus import ito_correction
from sde_diffusion.ito.equations import Equation
from sde_diffusion.ito.fields import noise_like
from solvers.base import Step
from solvers.ito.base import Carried, ItoIntegrator
from solvers.noise import AREA, Noise

_ITO = ("euler", "milstein", "srk")
_STRATONOVICH = ("midpoint", "heun")
_METHODS = (*_ITO, *_STRATONOVICH)


@dataclass(frozen=True)
class Torchsde(ItoIntegrator):
    """torchsde's methods on the grid, driven by this library's noise.

    ``euler`` (all noise), ``milstein`` and ``srk`` (Roessler's SRID2, strong order 1.5 at four
    evaluations a step; both for diagonal or scalar noise) solve in the sense of Ito. ``midpoint``
    and ``heun`` (all noise) converge to Stratonovich's solution: they are given the drift ``b - 1/2
    sum_k (G_k . grad) G_k``, whose Stratonovich solution is the Ito one wanted (Kloeden & Platen
    1992, eq. 4.9.11).

    torchsde runs forward, in u from 0 to N with step k from k to k + 1: there ``dx = h_k b du +
    sqrt(|h_k|) G dw``, in which a falling time's h is negative, and any grid has equal steps.

    Args:
        method: euler, milstein, srk, midpoint or heun.
    """

    method: str = "srk"
    stochastic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.method not in _METHODS:
            raise unknown_name("method", self.method, _METHODS)

    def check(self, equation: Equation, x: Tensor) -> None:
        super().check(equation, x)
        noise_type = _noise_type(equation)
        if self.method in ("srk", "milstein") and noise_type == "general":
            raise ValueError(
                f"torchsde's {self.method!r} takes diagonal or scalar noise, and this equation's "
                f"is {equation.kind!r}: use Torchsde('euler') or Torchsde('heun')"
            )

    def carry(self, equation: Equation, x: Tensor, steps: Sequence[Step], noise: Noise) -> Carried:
        from torchsde import sdeint

        field = _Field(equation, x, steps, "ito" if self.method in _ITO else "stratonovich")
        # With scalar noise torchsde's derivative takes the transposed Jacobian of G, which is
        # another number unless that is symmetric; its derivative-free form is right.
        options = {"grad_free": True} if self.method == "milstein" else {}
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # sdeint may try out shapes with torch.randn
            states = sdeint(
                field,
                x.reshape(len(x), -1),
                torch.tensor([0.0, len(steps)], dtype=torch.float64, device=x.device),
                bm=_Motion(field, noise),
                method=self.method,
                dt=1.0,
                options=options,
            )
        return Carried(states[-1].reshape(x.shape).to(x.dtype), None, 0, len(steps), 0)


def _noise_type(equation: Equation) -> str:
    if equation.kind == "isotropic":
        return "general" if equation.state_dependent else "diagonal"
    return equation.kind


class _Field:
    """Drift and diffusion as torchsde takes them; ``current`` is the step it is in."""

    def __init__(self, equation: Equation, x: Tensor, steps: Sequence[Step], sde_type: str) -> None:
        self.sde_type = sde_type
        self.noise_type = _noise_type(equation)
        self.equation = equation
        self.shape = x.shape
        self.steps = steps
        self.current = 0
        self.like = noise_like(equation.kind, self._g(x, steps[0].start.t), x)
        self._known: list[tuple[float, Tensor, Tensor]] = []

    def enter(self, k: int) -> None:
        """Note that torchsde has begun step ``k``."""
        if k != self.current:
            self._known.clear()
        self.current = k

    def f(self, u: Tensor, y: Tensor) -> Tensor:
        # srk asks for the same stage several times, with the same tensor: one evaluation.
        place = float(u)
        for at, state, value in self._known:
            if state is y and at == place:
                return value
        x, t = y.reshape(self.shape), self._time(u)
        drift = self.equation.drift(x, t) * self._span.to(y.dtype)
        if self.sde_type == "stratonovich" and self.equation.state_dependent:
            shift = ito_correction(self.equation.diffusion, self.equation.kind, x, t)
            drift = drift - 0.5 * self._span.abs().to(y.dtype) * shift
        value = drift.reshape(y.shape)
        self._known.append((place, y, value))
        return value

    def g(self, u: Tensor, y: Tensor) -> Tensor:
        x, t = y.reshape(self.shape), self._time(u)
        g = self._g(x, t) * self._span.abs().sqrt().to(y.dtype)
        if self.noise_type == "general":
            if self.equation.kind == "isotropic":
                return torch.diag_embed(expand(g, y).expand_as(y))
            return g.expand(len(y), y.shape[1], g.shape[-1])
        if self.equation.kind == "isotropic":
            return expand(g, y).expand_as(y)
        g = g.expand(self.shape).reshape(y.shape)
        return g[:, :, None] if self.noise_type == "scalar" else g

    def _g(self, x: Tensor, t: Tensor) -> Tensor:
        return self.equation.diffusion(x, t)

    @property
    def _span(self) -> Tensor:
        step = self.steps[self.current]
        return step.end.t - step.start.t

    def _time(self, u: Tensor) -> Tensor:
        return self.steps[self.current].start.t + (u - self.current) * self._span


class _Motion:
    """The driving motion of unit variance per step, as torchsde asks for it; see
    ``solvers.adapters.torchsde_``."""

    levy_area_approximation = "space-time"

    def __init__(self, field: _Field, noise: Noise) -> None:
        self.shape = (len(field.like), field.like[:1].numel())
        self._field = field
        self._noise = noise

    def __call__(self, start: Tensor, end: Tensor, return_U: bool = False) -> Any:
        k = int(start)
        self._field.enter(k)
        increment = self._draw(k, 0)
        if not return_U:
            return increment
        return increment, 0.5 * increment + self._draw(k, AREA) / 12**0.5

    def _draw(self, k: int, slot: int) -> Tensor:
        field = self._field
        return self._noise(field.like, field.steps[k], slot).reshape(self.shape)
