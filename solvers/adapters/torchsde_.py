"""torchsde's methods on the reverse SDE."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sde_diffusion.errors import unknown_name
from sde_diffusion.prediction import ScoreFn
from sde_diffusion.sde import SDE
from solvers.adapters.adjoint import Watched, probe
from solvers.adapters.scaled import counting, evaluated_eps
from solvers.base import Integrator, Step, unbound
from solvers.counting import CountedScoreFn
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

    ``sample``'s ``gradients=True`` records every evaluation; ``"adjoint"`` records none and
    integrates the adjoint equation back on the same path (Li et al. 2020, arXiv:2001.01328, sec. 3;
    torchsde's sdeint_adjoint), by Euler's method from grid entry to grid entry, where the states
    are kept: one evaluation a step, and a gradient of order 1.

    Args:
        method: srk, euler or milstein.
    """

    method: str = "srk"
    stochastic = True
    adaptive = False
    differentiable = (True, "adjoint")

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

        def carried(reverse: _ReverseSDE, y: Tensor) -> Tensor:
            span = torch.tensor([0.0, len(reverse.steps)], dtype=torch.float64)
            increments = _Increments(reverse, noise)
            states: Tensor = sdeint(reverse, y, span, bm=increments, method=self.method, dt=1.0)
            return states[-1]

        return _solved(counting(score_fn), sde, x, times, carried)

    def solve_with_adjoint(
        self, score_fn: ScoreFn, sde: SDE, x: Tensor, times: Tensor, noise: Noise
    ) -> Solution:
        from torchsde import sdeint_adjoint

        counted = counting(score_fn)
        probed = probe(counted, sde, x, times)

        def carried(reverse: _ReverseSDE, y: Tensor) -> Tensor:
            span = torch.tensor([0.0, 1.0], dtype=torch.float64)
            for k in range(len(reverse.steps)):
                y = sdeint_adjoint(
                    _OneStep(reverse, k),
                    y,
                    span,
                    bm=_Increments(reverse, noise, first=k),
                    method=self.method,
                    adjoint_method="euler",
                    dt=1.0,
                    adjoint_params=probed.parameters,
                )[-1]
            return y

        watched = Watched(counted, probed.parameters)
        return probed.added_to(_solved(counted, sde, x, times, carried, watched))


def _solved(
    counted: CountedScoreFn,
    sde: SDE,
    x: Tensor,
    times: Tensor,
    carried: Callable[[_ReverseSDE, Tensor], Tensor],
    score_fn: ScoreFn | None = None,
) -> Solution:
    """The solution of ``y`` as ``carried`` carries it from the first level to the last."""
    nfe_before, passes_before = counted.nfe, counted.network_passes
    reverse = _ReverseSDE(score_fn or counted, sde, x, times)
    y = (x / reverse.start.alpha.to(x.dtype)).reshape(-1, 1)
    # sdeint tries out the shapes with torch.randn, which is none of the caller's business.
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        y = carried(reverse, y)
    return Solution(
        (reverse.end.alpha.to(x.dtype) * y).view(x.shape),
        counted.nfe - nfe_before,
        counted.network_passes - passes_before,
        times,
        stats={"accepted": len(reverse.steps), "rejected": 0},
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
        drift = self.drift(k, 0.0 if at_start else _SRK_NODE, y)
        if at_start:
            self._known = (y, drift)
        return drift

    def drift(self, k: int, place: float, y: Tensor) -> Tensor:
        """In step k, at its start (0), SRK's node, or its end (1)."""
        level = self._inside[k] if 0 < place < 1 else self._grid[k + int(place)]
        eps = evaluated_eps(self._score_fn, (level.alpha * y).view(self.x.shape), level, k)
        span = self.spans[k]
        if place == 1:
            # Where Euler's method starts back, in the clock 1/tau: in which its step is exact for
            # pure noise. In tau it would take the steep end of a long step for the whole of it.
            span *= (level.host_ratio / self._grid[k].host_ratio) ** 2
        return eps.reshape(-1, 1) * (-span / level.host_ratio)

    def g_prod(self, u: Tensor, y: Tensor, increment: Tensor) -> Tensor:
        return increment


class _OneStep:
    """Step k of a reverse SDE, from ``u`` = 0 to 1. Within a step the drift has no jump, so that
    the adjoint equation may be integrated from its end."""

    noise_type = "additive"
    sde_type = "ito"

    def __init__(self, reverse: _ReverseSDE, k: int) -> None:
        self._reverse = reverse
        self._k = k
        self._known: tuple[Tensor, Tensor] | None = None

    def f(self, u: Tensor, y: Tensor) -> Tensor:
        # What sdeint_adjoint tries out before it starts, it asks for again, of a detached y.
        known, place = self._known, float(u)
        if known is not None and place == 0 and known[0].data_ptr() == y.data_ptr():
            return known[1]
        drift = self._reverse.drift(self._k, place, y)
        if place == 0:
            self._known = (y.detach(), drift.detach())
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

    def __init__(self, reverse: _ReverseSDE, noise: Noise, first: int = 0) -> None:
        self.shape = (reverse.x.numel(), 1)
        self._first = first  # the step that starts at u = 0
        self._reverse = reverse
        self._noise = noise

    def __call__(
        self, start: Tensor, end: Tensor, return_U: bool = False, return_A: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        k = self._first + int(start)
        increment = self._draw(k, 0, self._reverse.spans[k])
        if not return_U:
            return increment
        area = self._draw(k, 1, self._reverse.spans[k] / 12)
        return increment, 0.5 * increment + area

    def _draw(self, k: int, slot: int, variance: float) -> Tensor:
        draw = self._noise(self._reverse.x, self._reverse.steps[k], slot)
        return math.sqrt(variance) * draw.reshape(-1, 1)
