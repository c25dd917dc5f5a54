"""From a number of score evaluations to a number of steps, by measuring."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor

from sde_diffusion import SDE, VPSDE, Prediction
from sde_diffusion.broadcast import expand
from sde_diffusion.errors import require_count
from sde_diffusion.sde import NoiseLevel
from solvers import Integrator, Solver, sample

_SDE = VPSDE()
_measured: dict[Hashable, float] = {}


class BudgetError(ValueError):
    """A solver that no number of evaluations can be given."""


def measured_nfe(
    solver: Solver | Integrator,
    steps: int,
    *,
    sde: SDE | None = None,
    denoise: bool = False,
    event_shape: tuple[int, ...] = (1,),
) -> float:
    """Score evaluations of one run of ``steps`` steps, counted on a standard Gaussian.

    Args:
        solver: a solver or an adapter.
        steps: number of steps of its default grid.
        sde: which SDE to run; a fixed-step solver's count does not depend on it.
        denoise: whether the run ends with a denoise.
        event_shape: of the one sample; a user's sampler may know one shape only.
    """
    sde = _SDE if sde is None else sde
    key = (_identity(solver), denoise, steps, _identity(sde), event_shape)
    if key not in _measured:
        shape = (1, *event_shape)
        run = sample(_gaussian, sde, solver, shape=shape, steps=steps, denoise=denoise)
        _measured[key] = float(run.nfe)
    return _measured[key]


def steps_for_budget(
    solver: Solver | Integrator,
    nfe: int,
    *,
    sde: SDE | None = None,
    denoise: bool = False,
    event_shape: tuple[int, ...] = (1,),
) -> int:
    """The most steps whose measured evaluations stay within a budget of ``nfe``.

    No formula of a solver's cost is used: its counts at a few step numbers lead to a guess, and the
    answer is confirmed by counting there and at one step more.

    Args:
        solver: a solver, or an adapter of a fixed-step method.
        nfe: score evaluations per sample, at least 1.
        sde, denoise, event_shape: as in :func:`measured_nfe`.
    Raises:
        BudgetError: one step already costs more, or more steps do not cost more (the solver
            chooses its own steps, or evaluates nothing).
    """
    budget = require_count("nfe", nfe)

    def cost(steps: int) -> float:
        return measured_nfe(solver, steps, sde=sde, denoise=denoise, event_shape=event_shape)

    first = cost(1)
    if first > budget:
        raise BudgetError(
            f"nfe must be at least {first:g} for {solver}: that is what one step costs; "
            f"got {budget}"
        )
    low, low_cost = 1, first
    probe = 2
    while True:  # low is within the budget; find a number of steps above it
        high_cost = cost(probe)
        if high_cost > budget:
            high = probe
            break
        if high_cost <= low_cost and probe > 8:
            raise BudgetError(
                f"{solver} has no step count for a budget of evaluations: {probe} steps cost "
                f"{high_cost:g} evaluations, no more than {low} steps; it may choose its own steps"
            )
        rate = (high_cost - low_cost) / (probe - low)
        low, low_cost = probe, high_cost
        guess = low + int((budget - low_cost) / rate) if rate > 0 else 4 * low
        probe = min(max(guess, low + 1), 64 * low)
    while high - low > 1:
        middle = (low + high) // 2
        if cost(middle) > budget:
            high = middle
        else:
            low = middle
    return low


def _gaussian(x: Tensor, level: NoiseLevel) -> Prediction:
    alpha, sigma = (expand(field, x).to(x.dtype) for field in (level.alpha, level.sigma))
    return Prediction.from_x0(x, level, alpha * x / (alpha**2 + sigma**2))


def _identity(thing: Any) -> Hashable:
    """The settings of a frozen dataclass; of what cannot be hashed, its text."""
    try:
        hash(thing)
    except TypeError:
        return repr(thing)
    identity: Hashable = thing
    return identity
