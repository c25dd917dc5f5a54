"""From a number of score evaluations to a number of steps, by measuring."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from sde_diffusion import SDE, VPSDE, GaussianMixture
from sde_diffusion.errors import require_count
from solvers import Integrator, Solver, sample

_SDE = VPSDE()
_TARGET = GaussianMixture(means=torch.zeros(1, 1), covariances=torch.ones(1))
_measured: dict[tuple[Hashable, bool, int, Hashable], float] = {}


def measured_nfe(
    solver: Solver | Integrator, steps: int, *, sde: SDE | None = None, denoise: bool = False
) -> float:
    """Score evaluations of one run of ``steps`` steps, counted on a one-dimensional Gaussian.

    Args:
        solver: a solver or an adapter.
        steps: number of steps of its default grid.
        sde: which SDE to run; a fixed-step solver's count does not depend on it.
        denoise: whether the run ends with a denoise.
    """
    sde = _SDE if sde is None else sde
    key = (_identity(solver), denoise, steps, _identity(sde))
    if key not in _measured:
        run = sample(_TARGET.score_fn(sde), sde, solver, shape=(1, 1), steps=steps, denoise=denoise)
        _measured[key] = float(run.nfe)
    return _measured[key]


def steps_for_budget(
    solver: Solver | Integrator, nfe: int, *, sde: SDE | None = None, denoise: bool = False
) -> int:
    """The most steps whose measured evaluations stay within a budget of ``nfe``.

    No formula of a solver's cost is used: its counts at a few step numbers lead to a guess, and the
    answer is confirmed by counting there and at one step more.

    Args:
        solver: a solver, or an adapter of a fixed-step method.
        nfe: score evaluations per sample, at least 1.
        sde, denoise: as in :func:`measured_nfe`.
    Raises:
        ValueError: one step already costs more, or more steps do not cost more (the solver
            chooses its own steps, or evaluates nothing).
    """
    budget = require_count("nfe", nfe)

    def cost(steps: int) -> float:
        return measured_nfe(solver, steps, sde=sde, denoise=denoise)

    first = cost(1)
    if first > budget:
        raise ValueError(
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
            raise ValueError(
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


def _identity(thing: Any) -> Hashable:
    """The settings of a frozen dataclass; of what cannot be hashed, its text."""
    try:
        hash(thing)
    except TypeError:
        return repr(thing)
    identity: Hashable = thing
    return identity
