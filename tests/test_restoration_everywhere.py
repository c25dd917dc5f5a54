"""Guidance by measurements and energies within every sampler, and what does not fit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sde_diffusion import (
    Colorization,
    LinearMap,
    Measurement,
    autoguided,
    dps_guided,
    energy_guided,
    pigdm_guided,
    thresholded,
)
from solvers import (
    Adaptive,
    Ancestral,
    BrownianPath,
    CounterNoise,
    RePaint,
    Replacement,
    catalogue,
    manifold_constrained,
    sample,
)
from solvers.base import Solver
from tests.problems import SDES
from tests.restored import KNOWN, NORMAL, STD, Y, states

# --- every sampler -------------------------------------------------------------------------------

NATIVE = sorted(name for name, entry in catalogue().items() if issubclass(entry.type, Solver))


@pytest.mark.parametrize("name", ["vp", "ve"])
@pytest.mark.parametrize("solver_name", NATIVE)
def test_all_samplers_take_all_methods(solver_name: str, name: str) -> None:
    sde = SDES[name]
    solver: Any = catalogue()[solver_name].type()
    score_fn = NORMAL.score_fn(sde)
    y = Y.float()
    constrained, wrapped = manifold_constrained(score_fn, solver, KNOWN, y, 0.5, STD)
    # How near the known numbers must come to what was measured. Unconditional samples are 0.83 away
    # (the prior's deviation, 0.6, and mean); the norm's gradient alone leaves more than the others.
    for guided, method, near in (
        (pigdm_guided(score_fn, KNOWN, y, data_std=STD), solver, 0.25),
        (dps_guided(score_fn, KNOWN, y, 0.5, STD), solver, 0.65),
        (score_fn, Replacement(solver, KNOWN, y), 0.25),
        (constrained, wrapped, 0.25),
    ):
        run = sample(guided, sde, method, shape=(64, 4), steps=24)
        if solver_name != "hold" or method is not solver:  # which never looks at the score
            assert float((run.x - y)[:, [0, 2]].square().mean().sqrt()) < near


# --- what does not fit ---------------------------------------------------------------------------


def test_operators_without_a_gradient() -> None:
    sde = SDES["vp"]
    x, level = states(sde, 0.4), sde.at(0.4)
    for fn in (
        lambda x: x.detach().round(),
        lambda x: torch.from_numpy(x.numpy()),
        lambda x: (x > 0).to(x.dtype),
    ):
        guided = dps_guided(NORMAL.score_fn(sde), Measurement(fn), torch.zeros(1, 4))
        with pytest.raises(ValueError, match=r"not differentiable.*smc_sample.*Replacement"):
            guided(x, level)
    with pytest.raises(ValueError, match="energy must be differentiable"):
        energy_guided(NORMAL.score_fn(sde), lambda x0: x0.detach().sum(1))(x, level)


@pytest.mark.parametrize(
    "make, error, says",
    [
        (lambda s: pigdm_guided(s, Measurement(torch.abs), Y), TypeError, "linear measurement"),
        (lambda s: dps_guided(s, torch.abs, Y), TypeError, "wrap a function"),
        (lambda s: dps_guided(s, KNOWN, torch.zeros(2, 5)), ValueError, "does not fit"),
        (lambda s: dps_guided(s, KNOWN, Y, data_std=0.0), ValueError, "data_std"),
        (lambda s: dps_guided(s, Colorization(), torch.zeros(1, 3, 2, 2)), ValueError, "1, H, W"),
        (lambda s: Replacement(Ancestral(), Measurement(torch.abs), Y), TypeError, "linear"),
        (lambda s: Replacement(s, KNOWN, Y), TypeError, "steps here"),
        (
            lambda s: Replacement(Ancestral(), LinearMap(lambda x: x[:, :2], (4,), 0.1), Y[:, :2]),
            ValueError,
            "noise_std=0, or a Matrix",
        ),
        (lambda s: RePaint(0, 3), ValueError, "jump"),
        (lambda s: RePaint(3, 0), ValueError, "times"),
        (lambda s: energy_guided(s, 3.0), TypeError, "energy must be a function"),
        (lambda s: autoguided(s, s, math.inf), ValueError, "scale must be a finite"),
        (lambda s: thresholded(s, 0.0), ValueError, "quantile"),
        (lambda s: thresholded(s, limit=0.0), ValueError, "limit"),
    ],
)
def test_mistakes_at_construction(make: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make(NORMAL.score_fn(SDES["vp"]))


def test_mistakes_at_the_first_evaluation() -> None:
    sde = SDES["vp"]
    score_fn = NORMAL.score_fn(sde)
    two = Y.repeat(2, 1)
    with pytest.raises(ValueError, match="y has shape"):
        sample(dps_guided(score_fn, KNOWN, two), sde, Ancestral(), shape=(3, 4), steps=2)
    with pytest.raises(ValueError, match="measures samples"):
        sample(score_fn, sde, Replacement(Ancestral(), KNOWN, two), shape=(3, 4), steps=2)
    with pytest.raises(ValueError, match="one number per sample"):
        sample(energy_guided(score_fn, torch.abs), sde, Ancestral(), shape=(3, 4), steps=2)
    scaled = dps_guided(score_fn, KNOWN, Y, lambda level: torch.ones(3, 1))
    with pytest.raises(ValueError, match="scale must give"):
        sample(scaled, sde, Ancestral(), shape=(3, 4), steps=2)
    replacing: Any = {"solver": Replacement(Ancestral(), KNOWN, Y), "shape": (3, 4), "steps": 2}
    with pytest.raises(ValueError, match="BrownianPath"):
        sample(score_fn, sde, plan=RePaint(), noise=BrownianPath(sde, 0), **replacing)
    with pytest.raises(ValueError, match="trajectory"):
        sample(score_fn, sde, plan=RePaint(), noise=CounterNoise(0), trajectory=True, **replacing)
    with pytest.raises(ValueError, match="error"):
        sample(score_fn, sde, plan=Adaptive(), **replacing)
