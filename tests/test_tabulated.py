"""A DDPM table in continuous time: exact at its own times, smooth in between."""

from __future__ import annotations

import mpmath
import pytest
import torch

from sde_diffusion import VPSDE, TabulatedVPSDE
from tests.problems import DDPM_BETAS, SDES, SHORT_BETAS

EPS64 = 2.0**-52

TABLES = {
    "ddpm": DDPM_BETAS,
    "short": SHORT_BETAS,
    "two": torch.tensor([0.1, 0.9], dtype=torch.float64),
    "one": torch.tensor([0.3], dtype=torch.float64),
    "jagged": torch.tensor([0.5, 1e-4, 0.999, 1e-3, 0.2], dtype=torch.float64),
}


@pytest.mark.parametrize("name", TABLES)
def test_table_is_exact_at_its_own_times(name: str) -> None:
    betas = TABLES[name]
    sde = TabulatedVPSDE.from_betas(betas)
    n = len(betas)
    expected = torch.cumprod(1 - betas, 0)
    assert sde.times.tolist() == [(i + 1) / n for i in range(n)]
    assert sde.t_max == 1
    assert sde.t_min == (1 / n if n > 1 else 0.5)
    level = sde.at(sde.times)
    # A cumulative product of n rounded factors against a sum of n rounded logarithms: n ulps.
    torch.testing.assert_close(level.alpha**2, expected, rtol=2 * n * EPS64, atol=0)
    torch.testing.assert_close(level.sigma**2, 1 - expected, rtol=1e-11, atol=0)
    torch.testing.assert_close(sde.time(level.half_log_snr), sde.times, rtol=1e-11, atol=0)


def test_table_against_the_chains_first_step_in_many_digits() -> None:
    # 1 - prod(1 - beta) cancels in float64 for small betas: sigma must not.
    betas = torch.tensor([1e-9, 2e-9], dtype=torch.float64)
    sde = TabulatedVPSDE.from_betas(betas)
    with mpmath.workdps(40):
        kept = (1 - mpmath.mpf(betas[0].item())) * (1 - mpmath.mpf(betas[1].item()))
        expected = float(mpmath.sqrt(1 - kept))
    assert sde.at(1.0).sigma.item() == pytest.approx(expected, rel=1e-14, abs=0)


@pytest.mark.parametrize("name", TABLES)
def test_table_is_monotone_and_smooth_in_between(name: str) -> None:
    betas = TABLES[name]
    sde = TabulatedVPSDE.from_betas(betas)
    n = len(betas)
    t = torch.linspace(0, 1, 20 * n + 1, dtype=torch.float64)
    level = sde.at(t)
    assert level.alpha[0] == 1
    assert level.sigma[0] == 0
    assert (level.alpha.diff() < 0).all()
    assert (level.half_log_snr.diff() < 0).all()
    assert (level.g2[1:-1] > 0).all()
    assert (level.f <= 0).all()
    torch.testing.assert_close(level.g2, -2 * level.f, rtol=0, atol=0)
    # Continuous across the knots: the one-sided values close in on each other with the distance
    # (1e-9 of an interval, times a bend of at most 6 slopes of at most 3 max|log(1 - beta)|).
    knots = sde.times[:-1]
    left, right = sde.at(knots - 1e-9 / n).f, sde.at(knots + 1e-9 / n).f
    bound = 40e-9 * n * float(torch.log1p(-betas).abs().max())
    assert n == 1 or (left - right).abs().max() < bound
    # Between two table times, alpha lies between its two table values.
    exact = torch.cat([torch.ones(1).double(), torch.cumprod(1 - betas, 0)]).sqrt()
    middle = sde.at((torch.arange(n, dtype=torch.float64) + 0.5) / n).alpha
    assert ((middle < exact[:-1]) & (middle > exact[1:])).all()


def test_table_of_the_linear_chain_is_near_the_continuous_twin() -> None:
    # maths.md, section 3: close, not equal. The chain's sum of betas up to t = i/N lies below the
    # integral by about t (beta_1 - beta_0)/(2N): 5 % of it, 0.025 in lambda, at t = 0.01 and less
    # beyond; at t = 1 the chain's product of 1 - beta lies below exp(-sum) by sum beta^2/4 = 0.03.
    t = torch.linspace(0.01, 1, 50, dtype=torch.float64)
    table, twin = SDES["tabulated"].at(t), VPSDE().at(t)
    gap = (table.half_log_snr - twin.half_log_snr).abs().max()
    assert 1e-3 < gap < 5e-2
