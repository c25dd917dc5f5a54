"""Every native solver's update as a plain inline loop: what ``overhead`` measures against.

Coefficients are Python floats worked out beforehand, the network is called directly, nothing is
counted, checked or kept. ``draw(i, x)`` gives the noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sde_diffusion import SDE
from solvers import grids

Net = Callable[[Tensor, float], Tensor]
Draw = Callable[[int, Tensor], Tensor]
Loop = Callable[[Tensor], Tensor]


def _levels(sde: SDE, steps: int) -> tuple[list[float], ...]:
    level = sde.at(grids.time(sde, steps))
    return tuple(
        field.tolist() for field in (level.t, level.alpha, level.sigma, level.half_log_snr)
    )


def ancestral(sde: SDE, steps: int, net: Net, draw: Draw) -> Loop:
    t, alpha, sigma, lam = _levels(sde, steps)
    rows = []
    for i in range(steps):
        lost = math.expm1(-2 * (lam[i + 1] - lam[i]))
        ratio = alpha[i + 1] / alpha[i]
        direction = sigma[i + 1] * math.sqrt(1 + lost) - sigma[i] * ratio
        rows.append((t[i], ratio, direction, sigma[i + 1] * math.sqrt(-lost)))

    def loop(x: Tensor) -> Tensor:
        for i, (time, a, b, c) in enumerate(rows):
            x = a * x + b * net(x, time) + c * draw(i, x)
        return x

    return loop


def ddim(sde: SDE, steps: int, net: Net, draw: Draw) -> Loop:
    t, alpha, sigma, _ = _levels(sde, steps)
    rows = [
        (t[i], alpha[i + 1] / alpha[i], sigma[i + 1] - sigma[i] * alpha[i + 1] / alpha[i])
        for i in range(steps)
    ]

    def loop(x: Tensor) -> Tensor:
        for time, a, b in rows:
            x = a * x + b * net(x, time)
        return x

    return loop


def euler_maruyama(sde: SDE, steps: int, net: Net, draw: Draw) -> Loop:
    level = sde.at(grids.time(sde, steps))
    h = -level.t.diff()
    f, g2, sigma = level.f[:-1], level.g2[:-1], level.sigma[:-1]
    columns = (level.t[:-1], 1 - f * h, -g2 * h / sigma, torch.sqrt(g2 * h))
    rows = list(zip(*(column.tolist() for column in columns), strict=True))

    def loop(x: Tensor) -> Tensor:
        for i, (time, a, b, c) in enumerate(rows):
            x = a * x + b * net(x, time) + c * draw(i, x)
        return x

    return loop


def reverse_diffusion(sde: SDE, steps: int, net: Net, draw: Draw) -> Loop:
    rows = _reverse_diffusion_rows(sde, steps)

    def loop(x: Tensor) -> Tensor:
        for i, (time, a, b, c) in enumerate(rows):
            x = a * x + b * net(x, time) + c * draw(i, x)
        return x

    return loop


def predictor_corrector(sde: SDE, steps: int, net: Net, draw: Draw, snr: float = 0.16) -> Loop:
    t, alpha, sigma, _ = _levels(sde, steps)
    rows = []
    for i, row in enumerate(_reverse_diffusion_rows(sde, steps)):
        root = snr * sigma[i + 1] * alpha[i] / alpha[i + 1]
        rows.append((*row, t[i + 1], -2 * root**2 / sigma[i + 1], 2 * root))

    def loop(x: Tensor) -> Tensor:
        for i, (time, a, b, c, end, pull, spread) in enumerate(rows):
            x = a * x + b * net(x, time) + c * draw(2 * i, x)
            x = x + pull * net(x, end) + spread * draw(2 * i + 1, x)
        return x

    return loop


def _reverse_diffusion_rows(sde: SDE, steps: int) -> list[tuple[float, ...]]:
    t, alpha, sigma, lam = _levels(sde, steps)
    rows = []
    for i in range(steps):
        variance = -(sigma[i] ** 2) * math.expm1(2 * (lam[i] - lam[i + 1]))
        rows.append((t[i], 2 - alpha[i] / alpha[i + 1], -variance / sigma[i], math.sqrt(variance)))
    return rows


def heun(sde: SDE, steps: int, net: Net, draw: Draw) -> Loop:
    t, alpha, sigma, _ = _levels(sde, steps)
    rows = []
    for i in range(steps):
        ratio = alpha[i + 1] / alpha[i]
        rows.append((t[i], t[i + 1], ratio, sigma[i + 1] - sigma[i] * ratio))

    def loop(x: Tensor) -> Tensor:
        for time, end, a, b in rows:
            first = net(x, time)
            moved = a * x
            x = moved + (0.5 * b) * (first + net(moved + b * first, end))
        return x

    return loop


LOOPS: dict[str, Callable[[SDE, int, Net, Draw], Loop]] = {
    "ancestral": ancestral,
    "ddim": ddim,
    "euler_maruyama": euler_maruyama,
    "predictor_corrector": predictor_corrector,
    "probability_flow": heun,
    "reverse_diffusion": reverse_diffusion,
}
