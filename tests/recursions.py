"""Recursions of mean and variance under the linear samplers, on one Gaussian.

They are written from the formulas in the papers, for one scalar direction at a time, and share no
code with the solvers beyond ``sde.at``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch

from sde_diffusion import SDE, NoiseLevel


class Affine(NamedTuple):
    """``x -> a x + b`` plus the sum of ``gain z`` over independent normals."""

    a: float
    b: float = 0.0
    gains: tuple[float, ...] = ()


class Level(NamedTuple):
    t: float
    alpha: float
    sigma: float
    f: float
    g2: float
    mean: float  # of x_t along the direction
    variance: float

    @property
    def score(self) -> Affine:
        return Affine(-1 / self.variance, self.mean / self.variance)


Recursion = Callable[["Line", Level, Level], list[Affine]]


class Line(NamedTuple):
    """One direction of Gaussian data, ``N(mean, variance)``, under an SDE."""

    sde: SDE
    mean: float
    variance: float

    def at(self, t: float) -> Level:
        level: NoiseLevel = self.sde.at(t)
        alpha, sigma = float(level.alpha), float(level.sigma)
        return Level(
            t,
            alpha,
            sigma,
            float(level.f),
            float(level.g2),
            alpha * self.mean,
            alpha**2 * self.variance + sigma**2,
        )

    def propagate(
        self, recursion: Recursion, times: list[float], mean: float, variance: float
    ) -> tuple[float, float]:
        """Mean and variance at the end of a run."""
        for t, u in pairwise(times):
            for update in recursion(self, self.at(t), self.at(u)):
                mean = update.a * mean + update.b
                variance = update.a**2 * variance + sum(g**2 for g in update.gains)
        return mean, variance


def linear(x: float, score: float, at: Level, *gains: float) -> Affine:
    """``x_next = x x + score s(x) + gains z`` with the exact score at a level."""
    return Affine(x + score * at.score.a, score * at.score.b, gains)


def forward_step(start: Level, end: Level) -> tuple[float, float]:
    """``alpha_{t|u}`` and ``sigma^2_{t|u}`` of the noising from u = ``end`` to t = ``start``."""
    ratio = start.alpha / end.alpha
    return ratio, start.sigma**2 - ratio**2 * end.sigma**2


def ancestral(eta: float, variance: str) -> Recursion:
    """Song, Meng & Ermon 2021, eq. 12 and 16: x0 and eps by Tweedie, then put together anew."""

    def recursion(line: Line, t: Level, u: Level) -> list[Affine]:
        _, noised = forward_step(t, u)
        posterior = noised * u.sigma**2 / t.sigma**2
        along = math.sqrt(u.sigma**2 - eta**2 * posterior)
        z = eta * math.sqrt(posterior if variance == "small" else noised)
        # x0 = (x + sigma^2 s) / alpha, eps = -sigma s
        score = u.alpha * t.sigma**2 / t.alpha - along * t.sigma
        return [linear(u.alpha / t.alpha, score, t, z)]

    return recursion


def posterior(line: Line, t: Level, u: Level) -> list[Affine]:
    """Ho et al. 2020, eq. 6 and 7, for any linear SDE: the Gaussian x_u given x_t and x0."""
    ratio, noised = forward_step(t, u)
    of_x, of_x0 = ratio * u.sigma**2 / t.sigma**2, u.alpha * noised / t.sigma**2
    score = of_x0 * t.sigma**2 / t.alpha
    spread = math.sqrt(noised * u.sigma**2 / t.sigma**2)
    return [linear(of_x + of_x0 / t.alpha, score, t, spread)]


def euler_maruyama(eta: float) -> Recursion:
    """Song et al. 2021, eq. 6 with the score's weight (1 + eta^2) / 2, explicit Euler in t."""

    def recursion(line: Line, t: Level, u: Level) -> list[Affine]:
        h = t.t - u.t
        return [
            linear(1 - t.f * h, 0.5 * (1 + eta**2) * t.g2 * h, t, eta * math.sqrt(t.g2) * h**0.5)
        ]

    return recursion


def reverse_diffusion(line: Line, t: Level, u: Level) -> list[Affine]:
    """Song et al. 2021, app. E: ``x - f(x) + G^2 s + G z`` with the forward step's f and G."""
    ratio, noised = forward_step(t, u)
    return [linear(2 - ratio, noised, t, math.sqrt(noised))]


def runge_kutta(nodes: list[float], rows: list[list[float]], weights: list[float]) -> Recursion:
    """A Butcher tableau on dy/ds = eps, written for one affine right-hand side."""

    def slope(line: Line, s: float, y: Affine) -> Affine:
        """eps at ``s = sigma/alpha`` as an affine function of the step's first y."""
        alpha = float(line.sde.at(line.sde.time(torch.tensor(-math.log(s)).double())).alpha)
        sigma = alpha * s
        variance = alpha**2 * line.variance + sigma**2
        factor = sigma / variance  # eps = -sigma score
        return Affine(factor * alpha * y.a, factor * alpha * (y.b - line.mean))

    def recursion(line: Line, t: Level, u: Level) -> list[Affine]:
        s, span = t.sigma / t.alpha, u.sigma / u.alpha - t.sigma / t.alpha
        slopes = [slope(line, s, Affine(1.0))]
        for node, row in zip(nodes, rows, strict=True):
            y = Affine(
                1 + span * sum(w * k.a for w, k in zip(row, slopes, strict=True)),
                span * sum(w * k.b for w, k in zip(row, slopes, strict=True)),
            )
            slopes.append(slope(line, s + node * span, y))
        a = 1 + span * sum(w * k.a for w, k in zip(weights, slopes, strict=True))
        b = span * sum(w * k.b for w, k in zip(weights, slopes, strict=True))
        return [Affine(u.alpha * a / t.alpha, u.alpha * b)]

    return recursion


def langevin(d: float, at: Level, count: int) -> list[Affine]:
    """``x + d score + sqrt(2 d) z``, ``count`` times."""
    return [linear(1.0, d, at, math.sqrt(2 * d))] * count


def song_langevin(snr: float, count: int, at_end: bool) -> Recursion:
    """Song et al. 2021, alg. 4 and 5: ``d = 2 a (r |z| / |score|)^2``, with the root mean squares
    ``sqrt(D)`` and ``sqrt(D) / sigma`` for the norms and the chain's ``1 - beta`` for a."""

    def recursion(line: Line, t: Level, u: Level) -> list[Affine]:
        at = u if at_end else t
        ratio, _ = forward_step(t, u)
        return langevin(2 * ratio**2 * (snr * at.sigma) ** 2, at, count)

    return recursion


def song_ermon_langevin(step_size: float, count: int, at_end: bool) -> Recursion:
    """Song & Ermon 2020, alg. 1: ``d_i = epsilon sigma_i^2 / sigma_L^2``."""

    def recursion(line: Line, t: Level, u: Level) -> list[Affine]:
        at = u if at_end else t
        return langevin(step_size * at.sigma**2, at, count)

    return recursion


def hold(line: Line, t: Level, u: Level) -> list[Affine]:
    return [Affine(u.alpha / t.alpha)]


def chained(*recursions: Recursion) -> Recursion:
    return lambda line, t, u: [update for part in recursions for update in part(line, t, u)]


RK: dict[str, Recursion] = {
    "euler": runge_kutta([], [], [1.0]),
    "midpoint": runge_kutta([0.5], [[0.5]], [0.0, 1.0]),
    "heun": runge_kutta([1.0], [[1.0]], [0.5, 0.5]),
    "rk4": runge_kutta(
        [0.5, 0.5, 1.0],
        [[0.5], [0.0, 0.5], [0.0, 0.0, 1.0]],
        [1 / 6, 1 / 3, 1 / 3, 1 / 6],
    ),
}
