"""Time grids: their ends, their spacing, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sde_diffusion import EDMSDE, SDE, VPSDE, TabulatedVPSDE
from solvers import grids
from solvers.grids import GRIDS, resolve
from tests.problems import DDPM_BETAS, SDES, SHORT_BETAS

STEPS = (1, 2, 3, 10, 100)


def grid_of(name: str, sde: SDE, steps: int) -> Tensor:
    return resolve(name, sde, steps)


def even(values: Tensor, tolerance: float) -> bool:
    """Whether the values are equally spaced, to a part of their range."""
    gaps = values.diff()
    return bool(((gaps - gaps.mean()).abs() < tolerance * (values[-1] - values[0]).abs()).all())


def spacing_variable(name: str, sde: SDE, times: Tensor) -> Tensor:
    """What the grid is uniform in, from maths and ``sde.at``."""
    level = sde.at(times)
    if name == "time":
        return times
    if name == "quadratic":
        return times.sqrt()
    if name == "cosine":
        return torch.acos((2 * (times - sde.t_min) / (sde.t_max - sde.t_min) - 1).clamp(-1, 1))
    if name == "log_snr":
        return (level.alpha / level.sigma).log()
    if name == "arctan":
        return torch.atan((2 * level.sigma / level.alpha) ** (1 / 3))
    return (level.sigma / level.alpha) ** (1 / 7)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("sde_name", SDES)
@pytest.mark.parametrize("name", sorted(GRIDS))
def test_a_grid_owns_its_ends_and_decreases(name: str, sde_name: str, steps: int) -> None:
    sde = SDES[sde_name]
    if name == "table" and sde_name != "tabulated":
        with pytest.raises(ValueError, match="grid 'table' needs"):
            grid_of(name, sde, steps)
        return
    times = grid_of(name, sde, steps)
    assert times.shape == (steps + 1,)
    assert times.dtype == torch.float64
    assert (times.diff() < 0).all()
    # Exactly: the state drawn from the prior stands at t_max, and runs are compared at t_min.
    assert times[0].item() == sde.t_max
    assert times[-1].item() == sde.t_min


@pytest.mark.parametrize("sde_name", SDES)
@pytest.mark.parametrize("name", sorted(set(GRIDS) - {"table"}))
def test_a_grid_is_uniform_in_what_it_says(name: str, sde_name: str) -> None:
    sde = SDES[sde_name]
    times = grid_of(name, sde, 40)
    # Rounding of t and of the schedule's inverse; acos near its ends turns an ulp e into sqrt(e).
    tolerance = 1e-7 if name == "cosine" else 1e-9
    assert even(spacing_variable(name, sde, times), tolerance)
    others = set(GRIDS) - {"table", name}
    if sde_name == "ve":  # log sigma is linear in t there
        others -= {"time", "log_snr"} if name in ("time", "log_snr") else set()
    for other in others:
        assert not even(spacing_variable(other, sde, times), 1e-4), other


def test_cosine_grid_is_dense_at_both_ends() -> None:
    gaps = -grids.cosine(VPSDE(), 20).diff()
    assert gaps.argmax().item() in (9, 10)
    torch.testing.assert_close(gaps, gaps.flip(0), rtol=1e-9, atol=0)


def test_karras_grid_is_their_equation_5() -> None:
    n, rho = 18, 7.0
    i = torch.arange(n, dtype=torch.float64)
    expected = (80 ** (1 / rho) + i / (n - 1) * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho
    torch.testing.assert_close(grids.karras(EDMSDE(), n - 1), expected, rtol=1e-11, atol=0)
    other = grids.karras(EDMSDE(), n - 1, rho=3.0)
    assert even(other ** (1 / 3), 1e-11)
    for rho in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="rho"):
            grids.karras(EDMSDE(), 10, rho=rho)


def test_arctan_grid_joins_karras_and_log_snr() -> None:
    """Its limits, and at rho = 1 the arc of ``x / radius``, whose cosine and sine are alpha and
    sigma."""
    sde = VPSDE()
    far = grids.arctan(sde, 12, rho=7.0, scale=1e30)
    torch.testing.assert_close(far, grids.karras(sde, 12), rtol=1e-3, atol=0)
    slow = grids.arctan(sde, 12, rho=1e5)
    torch.testing.assert_close(slow, grids.log_snr(sde, 12), rtol=1e-3, atol=0)
    arc = sde.at(grids.arctan(sde, 12, rho=1.0, scale=1.0))
    assert even(torch.atan2(arc.sigma, arc.alpha), 1e-9)
    for setting in ("rho", "scale"):
        with pytest.raises(ValueError, match=setting):
            grids.arctan(sde, 10, **{setting: 0.0})


# --- the chain's own times -----------------------------------------------------------------------


@pytest.mark.parametrize("betas", [SHORT_BETAS, DDPM_BETAS], ids=["20", "1000"])
def test_table_grid_is_the_chains_own_times(betas: Tensor) -> None:
    sde, n = TabulatedVPSDE.from_betas(betas), len(betas)
    full = grid_of("table", sde, n - 1)
    assert torch.equal(full, sde.times.flip(0))  # bit for bit: labels are read off these
    product = torch.cumprod(1 - betas, 0).flip(0)
    # n factors, an ulp each.
    torch.testing.assert_close(sde.at(full).alpha ** 2, product, rtol=n * 5e-16, atol=0)


@pytest.mark.parametrize("steps", [1, 2, 7, 10, 50, 250, 999])
def test_table_grid_thins_evenly(steps: int) -> None:
    sde = SDES["tabulated"]
    assert isinstance(sde, TabulatedVPSDE)
    times = grid_of("table", sde, steps)
    index = (times * 1000).round().long() - 1
    assert torch.equal(times, sde.times[index])
    assert (index[0].item(), index[-1].item()) == (999, 0)
    gaps = -index.diff()
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


def test_table_grid_respects_the_sdes_ends() -> None:
    sde = TabulatedVPSDE.from_betas(SHORT_BETAS, t_min=0.2, t_max=0.8)
    times = grid_of("table", sde, 12)
    torch.testing.assert_close(times, torch.arange(16, 3, -1, dtype=torch.float64) / 20)


@pytest.mark.parametrize("steps", [20, 21, 64])
def test_more_steps_than_the_table_has_are_uniform_in_t(steps: int) -> None:
    times = grid_of("table", TabulatedVPSDE.from_betas(SHORT_BETAS), steps)
    assert times.shape == (steps + 1,)
    assert even(times, 1e-12)
    assert (times[0].item(), times[-1].item()) == (1.0, 0.05)


def test_table_grid_ends_at_the_sdes_ends_even_between_table_times() -> None:
    sde = TabulatedVPSDE.from_betas(SHORT_BETAS, t_min=0.01, t_max=0.93)
    for steps in (1, 5, 17):
        times = grid_of("table", sde, steps)
        assert times[0].item() == 0.93
        assert times[-1].item() == 0.01


# --- resolve -------------------------------------------------------------------------------------


def test_default_grids() -> None:
    assert torch.equal(resolve(None, VPSDE(), 10), grids.time(VPSDE(), 10))
    assert torch.equal(resolve(None, EDMSDE(), 10), grids.karras(EDMSDE(), 10))
    table = TabulatedVPSDE.from_betas(SHORT_BETAS)
    assert torch.equal(resolve(None, table, 10), grids.table(table, 10))


@pytest.mark.parametrize(
    "given",
    [
        [0.9, 0.5, 0.1],
        (0.9, 0.5, 0.1),
        torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64),
        lambda sde, steps: torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64),
        lambda sde, steps: [0.9, 0.5, 0.1],
    ],
    ids=["list", "tuple", "tensor", "callable", "callable to a list"],
)
def test_times_may_be_given(given: Any) -> None:
    expected = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    torch.testing.assert_close(resolve(given, VPSDE(), 2), expected, rtol=1e-15, atol=0)
    if not callable(given):
        assert torch.equal(resolve(given, VPSDE(), None), expected)


NAN = math.nan


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: resolve("karas", VPSDE(), 5), ValueError, r"unknown grid 'karas'.*'karras'"),
        (lambda: resolve("time", VPSDE(), 0), ValueError, "steps must be at least 1, got 0"),
        (lambda: resolve("time", VPSDE(), -3), ValueError, "steps must be at least 1, got -3"),
        (lambda: resolve("time", VPSDE(), 2.5), TypeError, "steps must be a whole number"),  # type: ignore[arg-type]
        (lambda: resolve("time", VPSDE(), True), TypeError, "steps must be a whole number"),
        (lambda: resolve("time", VPSDE(), None), ValueError, "steps is missing"),
        (lambda: resolve(None, VPSDE(), None), ValueError, "steps is missing"),
        (lambda: resolve([0.9, 0.1], VPSDE(), 2), ValueError, "steps=2"),
        (lambda: resolve([0.9], VPSDE(), None), ValueError, "at least two times"),
        (lambda: resolve([], VPSDE(), None), ValueError, "at least two times"),
        (lambda: resolve(torch.ones(2, 2), VPSDE(), None), ValueError, r"got shape \(2, 2\)"),
        (lambda: resolve([0.9, NAN, 0.1], VPSDE(), None), ValueError, r"grid\[1\].*nan"),
        (lambda: resolve([math.inf, 0.1], VPSDE(), None), ValueError, r"grid\[0\].*inf"),
        (lambda: resolve([0.9, 0.5, 0.0], VPSDE(), None), ValueError, r"grid\[2\].*above 0.*t_min"),
        (lambda: resolve([0.9, 0.5, -0.1], VPSDE(), None), ValueError, r"grid\[2\]"),
        (lambda: resolve([1.1, 0.5], VPSDE(), None), ValueError, r"grid\[0\].*beyond t_max"),
        (lambda: resolve([0.9, 0.5, 0.5, 0.1], VPSDE(), None), ValueError, r"grid\[2\]=0\.5"),
        (lambda: resolve([0.1, 0.5, 0.9], VPSDE(), None), ValueError, r"grid\[1\]=0\.5 follows"),
        (
            lambda: resolve(lambda sde, steps: grids.time(sde, 3), VPSDE(), 5),
            ValueError,
            "4 times.*steps=5",
        ),
        (
            lambda: resolve(lambda sde, steps: [1.0, NAN], VPSDE(), 1),  # type: ignore[arg-type,return-value]
            ValueError,
            r"grid\[1\]",
        ),
    ],
    ids=range(20),
)
def test_a_wrong_grid_is_refused(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()
