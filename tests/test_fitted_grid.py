"""Fitted grids: less error on samples that the fit has not seen, and files that can be kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from sde_diffusion import VESDE, VPSDE, GaussianMixture, named_target
from solvers import (
    DPMSolverPP,
    EulerMaruyama,
    ProbabilityFlow,
    UniPC,
    grids,
    local_errors,
    sample,
)
from solvers.fitted_grid import FittedGrid

VP = VPSDE()
RING = named_target("ring").score_fn(VP)


@pytest.fixture(scope="module")
def fitted() -> FittedGrid:
    return grids.fit(RING, VP, DPMSolverPP(2), 8, evaluations=200)


def test_local_errors_and_what_is_left_of_them_on_a_gaussian() -> None:
    """Closed form: with data variance v, ``y = x / alpha`` goes like ``sqrt(v + s^2)``, s = sigma /
    alpha; so a deviation at s leaves ``sqrt((v + s_end^2) / (v + s^2))``, and with ``y = sqrt(v +
    s^2) u`` the estimate is ``x0 = v u / sqrt(v + s^2)``, of which the derivatives in l = -log s
    are taken here by hand."""
    v = 0.25
    target = GaussianMixture(torch.zeros(1, 2), torch.tensor([v]))
    pilot = local_errors.solved(target.score_fn(VP), VP, (256, 2), seed=0, steps=200)
    s = np.exp(-pilot.half_log_snr)
    left = np.sqrt((v + s[-1] ** 2) / (v + s**2))
    # Growth is read off runs of order 2 at 24 steps, at 8 places.
    np.testing.assert_allclose(pilot.growth, left, rtol=0.25)
    first, second = s**2 / (v + s**2) ** 1.5, s**2 * (s**2 - 2 * v) / (v + s**2) ** 2.5
    for order, exact in ((1, first), (2, np.abs(second))):
        wanted = (exact * left) ** (1 / (order + 1))
        wanted = wanted / wanted.mean() + 0.4
        found = local_errors.density(pilot, order)
        # A cusp at the zero of the second derivative, and the places between the probes.
        assert np.abs(found / found.mean() - wanted / wanted.mean()).mean() < 0.05


def test_equal_local_errors_are_the_optimum_of_their_sum() -> None:
    """For errors ``w h^(p+1)`` with ``w = e^(a l)``: against the best of all grids of four steps,
    by a search over their inner times."""
    places, p, a = np.linspace(0, 1, 2001), 2, 6.0
    weight = np.exp(a * places)

    def total(inner: np.ndarray) -> float:
        ends = np.concatenate([[0.0], np.sort(inner), [1.0]])
        integrals = (np.exp(a * ends[1:]) - np.exp(a * ends[:-1])) / a
        return float(np.sum(integrals * np.abs(np.diff(ends)) ** p))

    found = local_errors.equidistributed(places, weight ** (1 / (p + 1)), 4).numpy()
    np.testing.assert_allclose(np.diff(np.exp(a * found / (p + 1))), np.expm1(2) / 4, rtol=1e-4)
    best = minimize(total, np.linspace(0, 1, 5)[1:-1], method="Nelder-Mead").fun
    assert best < 0.6 * total(np.linspace(0, 1, 5)[1:-1])
    assert total(found[1:-1]) < 1.05 * best


def test_without_a_search_it_is_the_best_of_its_starts() -> None:
    grid = grids.fit(RING, VP, DPMSolverPP(2), 8, evaluations=0)
    assert grid.error <= grid.untuned_error


@pytest.mark.parametrize("sde", [VP, VESDE()], ids=["vp", "ve"])
@pytest.mark.parametrize("solver", [DPMSolverPP(2), UniPC(2)], ids=["dpm", "unipc"])
def test_less_error_than_any_fixed_grid_on_fresh_noises(sde, solver) -> None:  # type: ignore[no-untyped-def]
    """Measured ratios are 0.11 to 0.33 at 8 steps; 0.5 leaves room for another search path."""
    score_fn = named_target("ring").score_fn(sde)
    grid = grids.fit(score_fn, sde, solver, 8, evaluations=200, seed=1)
    settings = {"shape": (512, 2), "seed": 99}
    fine = sample(score_fn, sde, ProbabilityFlow("rk4"), steps=300, grid="log_snr", **settings).x

    def error(g: object) -> float:
        x = sample(score_fn, sde, solver, steps=8, grid=g, **settings).x
        return float((x - fine).square().mean().sqrt())

    ratio = error(grid) / min(error(name) for name in grids.GRIDS if name != "table")
    assert ratio < 0.5


def test_it_is_a_grid_and_says_what_it_reached(fitted: FittedGrid) -> None:
    times = grids.resolve(fitted, VP, 8)
    assert (times[0].item(), times[-1].item()) == (VP.t_max, VP.t_min)
    assert fitted.error < fitted.untuned_error
    assert "DPMSolverPP(order=2" in fitted.fitted_to
    with pytest.raises(ValueError, match="fitted for 8 steps, and steps=9"):
        sample(RING, VP, DPMSolverPP(2), shape=(2, 2), steps=9, grid=fitted)


def test_same_seed_same_grid(fitted: FittedGrid) -> None:
    assert grids.fit(RING, VP, DPMSolverPP(2), 8, evaluations=200) == fitted


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps(steps: int) -> None:
    grid = grids.fit(RING, VP, DPMSolverPP(2), steps, evaluations=30)
    assert len(grid.times) == steps + 1
    assert grid.error <= grid.untuned_error


def test_a_saved_grid_is_the_same_when_loaded(fitted: FittedGrid, tmp_path: Path) -> None:
    fitted.save(tmp_path / "grid.json")
    assert FittedGrid.load(tmp_path / "grid.json") == fitted
    assert [p.name for p in tmp_path.iterdir()] == ["grid.json"]
    replace(fitted, error=1.0).save(tmp_path / "grid.json")
    assert FittedGrid.load(tmp_path / "grid.json").error == 1.0


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"format": "something else"}'])
def test_files_that_hold_something_else(content: str, tmp_path: Path) -> None:
    (tmp_path / "grid.json").write_text(content)
    with pytest.raises(ValueError, match="holds no fitted grid"):
        FittedGrid.load(tmp_path / "grid.json")


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="solver must draw no noise"):
        grids.fit(RING, VP, EulerMaruyama(), 8)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        grids.fit(RING, VP, DPMSolverPP(2), 0)
    with pytest.raises(ValueError, match="pilot must be at least 1"):
        grids.fit(RING, VP, DPMSolverPP(2), 8, pilot=0)
    with pytest.raises(ValueError, match="shape is missing"):
        grids.fit(lambda x, level: RING(x, level), VP, DPMSolverPP(2), 8)


def test_events_of_any_shape() -> None:
    def unit_normal(x: torch.Tensor, level):  # type: ignore[no-untyped-def]
        from sde_diffusion import Prediction

        return Prediction.from_score(x, level, -x / (level.alpha**2 + level.sigma**2))

    grid = grids.fit(unit_normal, VP, DPMSolverPP(2), 4, pilot=8, shape=(3, 4, 4), evaluations=30)
    assert grid.error <= grid.untuned_error
