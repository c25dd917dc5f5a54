"""torchsde's methods on the reverse SDE."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sde_diffusion.errors import unknown_name
from sde_diffusion.prediction import ScoreFn
from sde_diffusion.sde import SDE
from solvers.adapters.scaled import counting, evaluated_eps
from solvers.base import Integrator, Step, unbound
from solvers.noise import Noise
from solvers.solution import Solution

_ORDERS = {"euler": 1, "milstein": 1, "srk": 2}
_SRK_NODE = 0.75  # where the second of SRK's two evaluations lies in a step


@dataclass(frozen=True)
class TorchsdeSDE(Integrator):
    """torchsde's additive-noise SRK, Euler or Milstein on Anderson's reverse SDE, on the grid.

    In ``y = x / alpha`` and the clock ``tau = (sigma / alpha)^2``, which runs down, every linear
    SDE's reverse (Song et al. 2021, arXiv:2011.13456, eq. 6) is ``dy = eps / sqrt(tau) dtau + dw``
    with one standard Brownian motion: no linear drift, and additive noise of unit size. torchsde
    integrates it forward in ``u`` from 0 to N, where ``tau`` is linear from grid entry to grid
    entry: step k is the grid's step k, and its increment the one every other sampler draws from the
    same noise.

    ``srk`` is Roessler's SRA1 (2010, SIAM J. Numer. Anal. 48, sec. 6), strong order 1.5, with the
    step's space-time Levy area from the noise's slot 1; two evaluations a step (torchsde asks for
    three, of which one twice over: it gets the first answer again). ``euler`` takes one, and so
    does ``milstein``, which equals it where the noise is additive; their step has ancestral
    sampling's mean, and on VE it is ``Ancestral(variance="large")``.

    The order declared is the weak one, measured on a Gaussian's exact mean and variance: euler 1,
    srk 2 on VP, sub-VP, VE and EDM (the mean is exact at any step size). Measured strong orders
    on a Gaussian and on a mixture of two overlapping modes, at 16 to 256 steps: euler 1.0, srk 2.0,
    above the 1.5 that theory grants a curved drift. Where paths change mode (``ring``) both have
    about 0.5.

    Args:
        method: srk, euler or milstein.
    """

    method: str = "srk"
    stochastic = True
    adaptive = False

    def __post_init__(self) -> None:
        if self.method not in _ORDERS:
            raise unknown_name("method", self.method, _ORDERS)

    @property
    def order(self) -> int:
        return _ORDERS[self.method]

    def solve(
        self, score_fn: ScoreFn, sde: SDE, x: Tensor, times: Tensor, noise: Noise
    ) -> Solution:
        from torchsde import sdeint

        counted = counting(score_fn)
        nfe_before, passes_before = counted.nfe, counted.network_passes
        reverse = _ReverseSDE(counted, sde, x, times)
        steps = len(times) - 1
        y = (x / reverse.start.alpha.to(x.dtype)).reshape(-1, 1)
        # sdeint tries out the shapes with torch.randn, which is none of the caller's business.
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            states = sdeint(
                reverse,
                y,
                torch.tensor([0.0, steps], dtype=torch.float64),
                bm=_Increments(reverse, noise),
                method=self.method,
                dt=1.0,
            )
        return Solution(
            (reverse.end.alpha.to(x.dtype) * states[-1]).view(x.shape),
            counted.nfe - nfe_before,
            counted.network_passes - passes_before,
            times,
            stats={"accepted": steps, "rejected": 0},
        )


class _ReverseSDE:
    """The reverse SDE as torchsde takes it: every element a row of its own, driven by one motion.

    With rows of dimension 1 the additive noise needs no ``(B, D, D)`` matrix, and the diffusion is
    1: the size of the motion is in ``_Increments``.
    """

    noise_type = "additive"
    sde_type = "ito"

    def __init__(self, score_fn: ScoreFn, sde: SDE, x: Tensor, times: Tensor) -> None:
        half_log_snr = sde.at(times).half_log_snr
        tau = torch.exp(-2 * half_log_snr)
        #: What the clock loses in each step.
        self.spans = (-tau.diff()).tolist()
        inside = sde.time(-0.5 * torch.log(torch.lerp(tau[:-1], tau[1:], _SRK_NODE)))
        levels = unbound(sde.at(torch.cat([times, inside])), x.device)
        self._grid, self._inside = levels[: len(times)], levels[len(times) :]
        self.start, self.end = levels[0], levels[len(times) - 1]
        self.steps = [Step(k, self._grid[k], self._grid[k + 1]) for k in range(len(times) - 1)]
        self.x = x
        self._score_fn = score_fn
        self._known: tuple[Tensor, Tensor] | None = None

    def f(self, u: Tensor, y: Tensor) -> Tensor:
        # At a step's start sdeint asks once more for what it has: srk in every step, and all
        # methods at u = 0, where the shape is tried out first.
        if self._known is not None and self._known[0] is y:
            return self._known[1]
        k = int(u)
        at_start = float(u) == k
        level = self._grid[k] if at_start else self._inside[k]
        eps = evaluated_eps(self._score_fn, (level.alpha * y).view(self.x.shape), level, k)
        drift = eps.reshape(-1, 1) * (-self.spans[k] / level.host_ratio)
        if at_start:
            self._known = (y, drift)
        return drift

    def g_prod(self, u: Tensor, y: Tensor, increment: Tensor) -> Tensor:
        return increment


class _Increments:
    """The driving motion, with the interface that torchsde's solvers ask of a Brownian motion.

    Over a step of the clock's length h the increment is ``W = sqrt(h) z_0`` and the space-time Levy
    area ``H = sqrt(h / 12) z_1``, independent of it, with ``z_slot`` from the noise; the integral
    of the motion over the step, whose length in ``u`` is 1, is ``U = W / 2 + H`` (Foster, Lyons &
    Oberhauser 2020, "An optimal polynomial approximation of Brownian motion", SIAM J. Numer. Anal.
    58).
    """

    levy_area_approximation = "space-time"

    def __init__(self, reverse: _ReverseSDE, noise: Noise) -> None:
        self.shape = (reverse.x.numel(), 1)
        self._reverse = reverse
        self._noise = noise

    def __call__(
        self, start: Tensor, end: Tensor, return_U: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        k = int(start)
        increment = self._draw(k, 0, self._reverse.spans[k])
        if not return_U:
            return increment
        area = self._draw(k, 1, self._reverse.spans[k] / 12)
        return increment, 0.5 * increment + area

    def _draw(self, k: int, slot: int, variance: float) -> Tensor:
        draw = self._noise(self._reverse.x, self._reverse.steps[k], slot)
        return math.sqrt(variance) * draw.reshape(-1, 1)
