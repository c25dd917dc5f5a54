"""The equations that solvers are given: forward, reverse, and either in another coordinate.

All are written in the SDE's own time, ``dx = b dt + G dw``. A solver that runs from ``t_max`` down
takes ``dt < 0`` and a motion of variance ``|dt|``, so that the sign of the reverse drift is written
once, here, and never flipped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sde_diffusion.broadcast import expand
from sde_diffusion.errors import require_finite
from sde_diffusion.ito.fields import Kind, Score, covariance_times, variances
from sde_diffusion.ito.laws import Prior
from sde_diffusion.ito.sde import ItoSDE


class Equation(ABC):
    """``dx = drift dt + diffusion dw`` from ``start`` to ``end``, in which ``t`` may fall."""

    @property
    @abstractmethod
    def sde(self) -> ItoSDE:
        """The SDE it was made from."""

    @property
    @abstractmethod
    def start(self) -> float:
        """The time it starts from."""

    @property
    @abstractmethod
    def end(self) -> float:
        """The time it ends at."""

    @property
    @abstractmethod
    def kind(self) -> Kind:
        """How ``diffusion`` acts."""

    @property
    def stochastic(self) -> bool:
        """Whether there is noise."""
        return True

    @property
    def prior(self) -> Prior | None:
        """The law at ``start``, where it is known."""
        return None

    @property
    def score(self) -> Score | None:
        """The score it evaluates, if any: what is counted."""
        return None

    @property
    def state_dependent(self) -> bool:
        """Whether ``diffusion`` depends on x."""
        return self.sde.state_dependent

    @property
    def backward(self) -> bool:
        """Whether time falls."""
        return self.end < self.start

    @abstractmethod
    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        """The drift, in dt; of ``x``'s shape."""

    @abstractmethod
    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        """The diffusion, of the shape that ``kind`` says."""

    @abstractmethod
    def with_score(self, score: Score) -> Equation:
        """The same equation on another score: a counted one."""

    @abstractmethod
    def select(self, indices: Tensor) -> Equation:
        """The equation of a part of the batch, where the score holds something per sample."""


@dataclass(frozen=True)
class Forward(Equation):
    """An SDE as it stands, from 0 to ``t_max``."""

    of: ItoSDE

    @property
    def sde(self) -> ItoSDE:
        return self.of

    @property
    def start(self) -> float:
        return 0.0

    @property
    def end(self) -> float:
        return float(self.of.t_max)

    @property
    def kind(self) -> Kind:
        return self.of.kind

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return self.of.drift(x, t)

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return self.of.diffusion(x, t)

    def with_score(self, score: Score) -> Forward:
        return self

    def select(self, indices: Tensor) -> Forward:
        return self


@dataclass(frozen=True)
class Reverse(Equation):
    """``dx = {f - (1 + eta^2)/2 (div[G G^T] + G G^T s)} dt + eta G dw``, backward in time.

    With ``eta = 1`` it is Anderson's reverse SDE ``{f - div[G G^T] - G G^T s} dt + G dw`` (Anderson
    1982, Stoch. Proc. Appl. 12; Song et al. 2021, arXiv:2011.13456, eq. 15 and appendix A), with
    ``eta = 0`` the probability-flow ODE ``f - div[G G^T]/2 - G G^T s/2`` (eq. 37); every eta has
    the SDE's marginals if s is the score. ``s = score + scale * guidance``, where a guidance is
    ``grad_x log p_t(y | x)`` (eq. 47).

    Args:
        of: the SDE.
        evaluated: the score, ``(x, t) -> (B, *event)``.
        guidance: ``grad_x log p_t(y | x)``, ``(x, t) -> (B, *event)``; ``gradient_of`` makes one.
        scale: of the guidance; a number, 0-d, or ``(B,)``.
        eta: at least 0.
    """

    of: ItoSDE
    evaluated: Score
    guidance: Score | None = None
    scale: float | Tensor = 1.0
    eta: float = 1.0

    def __post_init__(self) -> None:
        if not callable(self.evaluated):
            raise TypeError(f"score must be callable, (x, t) -> Tensor, got {self.evaluated!r}")
        if self.guidance is not None and not callable(self.guidance):
            raise TypeError(f"guidance must be callable, (x, t) -> Tensor, got {self.guidance!r}")
        if not isinstance(self.scale, Tensor):
            require_finite("scale", self.scale)
        require_finite("eta", self.eta)
        if self.eta < 0:
            raise ValueError(f"eta must be at least 0, got {self.eta!r}")

    @property
    def sde(self) -> ItoSDE:
        return self.of

    @property
    def start(self) -> float:
        return float(self.of.t_max)

    @property
    def end(self) -> float:
        return float(self.of.t_min)

    @property
    def kind(self) -> Kind:
        return self.of.kind

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    @property
    def prior(self) -> Prior | None:
        return self.of.prior

    @property
    def score(self) -> Score:
        return self.evaluated

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        sde = self.of
        total = self.evaluated(x, t)
        if self.guidance is not None:
            scale = self.scale
            if isinstance(scale, Tensor):
                scale = expand(scale.to(x), x)
            total = total + scale * self.guidance(x, t)
        pull = covariance_times(sde.kind, sde.diffusion(x, t), total)
        divergence = sde.covariance_divergence(x, t)
        if divergence is not None:
            pull = pull + divergence
        return sde.drift(x, t) - 0.5 * (1 + self.eta**2) * pull

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return self.eta * self.of.diffusion(x, t)

    def with_score(self, score: Score) -> Reverse:
        return replace(self, evaluated=score)

    def select(self, indices: Tensor) -> Reverse:
        scale = self.scale
        if isinstance(scale, Tensor) and scale.ndim:
            scale = scale[indices.to(scale.device)]
        guidance = None if self.guidance is None else narrowed(self.guidance, indices)
        return replace(
            self, evaluated=narrowed(self.evaluated, indices), guidance=guidance, scale=scale
        )


class Chart(NamedTuple):
    """A coordinate ``y = phi(x)`` of a positive x.

    Attributes:
        of: phi.
        back: x as a function of y; not negative for any y.
        slope, bend: the first and second derivative of phi at x, as functions of y.
    """

    of: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    bend: Callable[[Tensor], Tensor]


CHARTS = {
    "log": Chart(torch.log, torch.exp, lambda y: torch.exp(-y), lambda y: -torch.exp(-2 * y)),
    # In these two a y below 0 is the mirror image of one above: x is reflected at 0.
    "reflected": Chart(
        lambda x: x, torch.abs, lambda y: 1 - 2 * (y < 0).to(y.dtype), torch.zeros_like
    ),
    "sqrt": Chart(torch.sqrt, torch.square, lambda y: 0.5 / y, lambda y: -0.25 / y**3),
}


@dataclass(frozen=True)
class Charted(Equation):
    """An equation for a positive state, in ``y = log x``, ``sqrt(x)`` or x itself reflected at 0:
    whatever y does, x does not become negative.

    By Ito's formula ``dy = (phi' b +- phi'' v / 2) dt + phi' G dw``, with v the diagonal of ``G
    G^T``; plus where time runs forward, minus where it runs backward, for there the motion's square
    is ``-dt``. Without noise the second term is absent.
    """

    inner: Equation
    chart: Chart

    @property
    def sde(self) -> ItoSDE:
        return self.inner.sde

    @property
    def start(self) -> float:
        return self.inner.start

    @property
    def end(self) -> float:
        return self.inner.end

    @property
    def kind(self) -> Kind:
        return "diagonal" if self.inner.kind == "isotropic" else self.inner.kind

    @property
    def stochastic(self) -> bool:
        return self.inner.stochastic

    @property
    def score(self) -> Score | None:
        return self.inner.score

    @property
    def state_dependent(self) -> bool:
        return True

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        value, slope = self.chart.back(x), self.chart.slope(x)
        drift = slope * self.inner.drift(value, t)
        if not self.stochastic:
            return drift
        spread = variances(self.inner.kind, self.inner.diffusion(value, t), value)
        return drift + (-0.5 if self.backward else 0.5) * self.chart.bend(x) * spread

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        value, slope = self.chart.back(x), self.chart.slope(x)
        g = self.inner.diffusion(value, t)
        if self.kind == "general":
            return slope.reshape(len(x), -1, 1) * g
        return slope * (expand(g, value) if self.inner.kind == "isotropic" else g)

    def with_score(self, score: Score) -> Charted:
        return replace(self, inner=self.inner.with_score(score))

    def select(self, indices: Tensor) -> Charted:
        return replace(self, inner=self.inner.select(indices))


def narrowed(score: Any, indices: Tensor) -> Score:
    """The score of a part of the batch, for one that holds something per sample and has
    ``select(indices)``."""
    narrow = getattr(score, "select", None)
    chosen: Score = score if narrow is None else narrow(indices)
    return chosen
