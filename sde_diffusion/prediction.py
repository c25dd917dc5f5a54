"""One estimate of the clean sample, read in any of its four forms."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from sde_diffusion.broadcast import expand
from sde_diffusion.sde import NoiseLevel


class Prediction:
    """What a score function says at ``(x, level)``: one estimate, read as x0, eps, score or v.

    Tweedie's formula and the definition of the perturbation kernel tie the four together:
    ``x = alpha x0 + sigma eps``, ``score = -eps / sigma``, ``v = alpha eps - sigma x0``
    (Salimans & Ho 2022, arXiv:2202.00512, app. D, for v). For SDEs that do not preserve variance, v
    keeps this definition, and ``x0 = (alpha x - sigma v) / (alpha^2 + sigma^2)``.

    A form is computed when first read and kept. All have the shape of ``x``, ``(B, *event)``.
    """

    __slots__ = ("_eps", "_score", "_v", "_x0", "level", "x")

    def __init__(
        self,
        x: Tensor,
        level: NoiseLevel,
        x0: Tensor | None = None,
        eps: Tensor | None = None,
        score: Tensor | None = None,
        v: Tensor | None = None,
    ) -> None:
        """For the ``from_`` methods below, which each give one of the four forms."""
        if eps is None and x0 is None and score is None and v is None:
            raise TypeError("a Prediction is made by from_x0, from_eps, from_score or from_v")
        self.x = x
        self.level = level
        self._x0 = x0
        self._eps = eps
        self._score = score
        self._v = v

    @classmethod
    def from_x0(cls, x: Tensor, level: NoiseLevel, x0: Tensor) -> Prediction:
        return cls(x, level, x0)

    @classmethod
    def from_eps(cls, x: Tensor, level: NoiseLevel, eps: Tensor) -> Prediction:
        return cls(x, level, None, eps)

    @classmethod
    def from_score(cls, x: Tensor, level: NoiseLevel, score: Tensor) -> Prediction:
        return cls(x, level, None, None, score)

    @classmethod
    def from_v(cls, x: Tensor, level: NoiseLevel, v: Tensor) -> Prediction:
        return cls(x, level, None, None, None, v)

    def misfit(self) -> torch.Size | None:
        """The shape of a form given that is not ``x``'s, which arithmetic would broadcast; else
        ``None``."""
        for form in (self._x0, self._eps, self._score, self._v):
            if form is not None and form.shape != self.x.shape:
                return form.shape
        return None

    @property
    def eps(self) -> Tensor:
        """The noise: ``E[eps | x]``."""
        if self._eps is None:
            x = self.x
            alpha, sigma = expand(self.level.alpha, x), expand(self.level.sigma, x)
            if self._score is not None:
                self._eps = -sigma * self._score
            elif self._v is not None:
                self._eps = (sigma * x + alpha * self._v) / (alpha**2 + sigma**2)
            else:
                self._eps = (x - alpha * self.x0) / sigma
        return self._eps

    @property
    def x0(self) -> Tensor:
        """The clean sample: ``E[x_0 | x]``."""
        if self._x0 is None:
            x = self.x
            alpha, sigma = expand(self.level.alpha, x), expand(self.level.sigma, x)
            if self._v is not None:
                self._x0 = (alpha * x - sigma * self._v) / (alpha**2 + sigma**2)
            elif self._score is not None:
                self._x0 = (x + sigma**2 * self._score) / alpha
            else:
                self._x0 = (x - sigma * self.eps) / alpha
        return self._x0

    @property
    def score(self) -> Tensor:
        """The gradient of the log-density of x_t."""
        if self._score is None:
            self._score = -self.eps / expand(self.level.sigma, self.x)
        return self._score

    @property
    def v(self) -> Tensor:
        """The velocity ``alpha eps - sigma x0``."""
        if self._v is None:
            x = self.x
            self._v = expand(self.level.alpha, x) * self.eps - expand(self.level.sigma, x) * self.x0
        return self._v


class ScoreFn(Protocol):
    """A network, a guided one, an exact target: a solver cannot tell which.

    Called with the state ``(B, *event)`` and its noise level. Optional attributes, read where
    present:

    * ``cost``: network passes per call (1 when absent), or ``cost_at(level)`` where it changes;
    * ``select(indices)``: the score function of those samples of the batch, for those that hold
      something per sample (labels); one without it is taken to treat every sample alike.
    """

    def __call__(self, x: Tensor, level: NoiseLevel, /) -> Prediction: ...


def cost_of(score_fn: ScoreFn, level: NoiseLevel) -> int:
    """Network passes that one call at ``level`` takes."""
    cost_at = getattr(score_fn, "cost_at", None)
    return int(cost_at(level) if cost_at is not None else getattr(score_fn, "cost", 1))


def select(score_fn: ScoreFn, indices: Tensor) -> ScoreFn:
    """The score function of a part of the batch, given by its ``indices`` (long, 1-d)."""
    narrow = getattr(score_fn, "select", None)
    chosen: ScoreFn = narrow(indices) if narrow is not None else score_fn
    return chosen
