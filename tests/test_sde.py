"""Schedules against formulas in 40 digits, numerical derivatives and quadrature."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import torch
from scipy.integrate import quad, solve_ivp
from torch import Tensor

from sde_diffusion import (
    EDMSDE,
    SDE,
    VESDE,
    VPSDE,
    CosineVPSDE,
    SubVPSDE,
    TabulatedVPSDE,
    named_sde,
    sde_from_config,
)
from sde_diffusion.sde import HostedLevel
from tests.problems import (
    DDPM_BETAS,
    SDES,
    SHORT_BETAS,
    GaussianProblem,
    assert_close_to_monte_carlo,
    inner_times,
)

EPS32, EPS64 = 2.0**-23, 2.0**-52

# --- the formulas of maths.md, section 2, in as many digits as wanted ----------------------------


def _linear_alpha(t: mpmath.mpf) -> mpmath.mpf:
    low, high = mpmath.mpf("0.1"), mpmath.mpf(20)
    return mpmath.exp(-(t**2) * (high - low) / 4 - t * low / 2)


def _cosine_alpha(t: mpmath.mpf) -> mpmath.mpf:
    s = mpmath.mpf(0.008)  # the float that the SDE holds
    return mpmath.cos(mpmath.pi / 2 * (t + s) / (1 + s)) / mpmath.cos(mpmath.pi / 2 * s / (1 + s))


EXACT: dict[str, Callable[[mpmath.mpf], tuple[mpmath.mpf, mpmath.mpf]]] = {
    "vp": lambda t: (_linear_alpha(t), mpmath.sqrt(1 - _linear_alpha(t) ** 2)),
    "cosine": lambda t: (_cosine_alpha(t), mpmath.sqrt(1 - _cosine_alpha(t) ** 2)),
    "subvp": lambda t: (_linear_alpha(t), 1 - _linear_alpha(t) ** 2),
    "ve": lambda t: (mpmath.mpf(1), mpmath.mpf("0.01") * mpmath.mpf(5000) ** t),
    "edm": lambda t: (mpmath.mpf(1), t),
}


def wide_times(sde: SDE) -> list[float]:
    """From 1e-5, far below most ``t_min``, to ``t_max``."""
    return np.geomspace(1e-5, float(sde.t_max), 24).tolist()


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_schedule_is_the_formula_to_rounding(name: str, dtype: torch.dtype) -> None:
    # The promise is 1e-5 in float32. Fields are computed in float64 and rounded once, so a few
    # float32 ulps must do; in float64, 1e-11 leaves room for lambda near its zero. The cosine's
    # decay is a difference of two logarithms, whose ulps count 1/(1.2e-2 t) times at t = 1e-5.
    sde = SDES[name]
    tolerance = 2 * EPS32 if dtype == torch.float32 else 2e-9 if name == "cosine" else 1e-11
    assert tolerance < 1e-5
    for t in wide_times(sde):
        at = torch.tensor(t, dtype=dtype)
        level = sde.at(at)
        with mpmath.workdps(40):
            alpha, sigma = EXACT[name](mpmath.mpf(at.item()))
            expected = (alpha, sigma, mpmath.log(alpha / sigma))
            for found, value in zip(
                (level.alpha, level.sigma, level.half_log_snr), expected, strict=True
            ):
                error = abs(mpmath.mpf(found.item()) / value - 1)
                assert error < tolerance, (t, float(error))


@pytest.mark.parametrize("name", SDES)
def test_float32_agrees_with_float64_down_to_1e5(name: str) -> None:
    sde = SDES[name]
    t = torch.tensor(wide_times(sde), dtype=torch.float32)
    narrow, wide = sde.at(t), sde.at(t.double())
    for field in ("alpha", "sigma", "half_log_snr", "f", "g2"):
        found, expected = getattr(narrow, field).double(), getattr(wide, field)
        # One rounding of a float64 result: half an ulp, far inside the promised 1e-5.
        assert ((found - expected).abs() <= EPS32 * expected.abs()).all(), field


def derivative(function: Callable[[Tensor], Tensor], t: Tensor, h: Tensor) -> Tensor:
    """Central differences of order 4."""
    near = function(t + h) - function(t - h)
    far = function(t + 2 * h) - function(t - 2 * h)
    return (8 * near - far) / (12 * h)


@pytest.mark.parametrize("name", SDES)
def test_f_and_g2_are_the_derivatives_of_the_schedule(name: str) -> None:
    sde = SDES[name]
    t = torch.tensor(np.geomspace(1e-3, 0.95 * float(sde.t_max), 40))
    h = 1e-3 * t
    if isinstance(sde, TabulatedVPSDE):  # inside a table interval, where it is a cubic
        n = len(sde.betas)
        t = ((t * n).floor() + 0.4) / n
        h = torch.full_like(t, 0.1 / n)
    level = sde.at(t)
    f = derivative(lambda t: sde.at(t).alpha.log(), t, h)
    change = derivative(lambda t: sde.at(t).sigma ** 2, t, h)
    # Truncation: (h/t)^4 times the fifth derivative (at most (17 h)^4/30 = 1e-9, for VE). Rounding:
    # an ulp of alpha (1.1e-16) over 12 h, i.e. 1e-11 absolute at h = 1e-6, and f is at least 0.05.
    torch.testing.assert_close(level.f, f, rtol=1e-7, atol=1e-9)
    expected = change - 2 * f * level.sigma**2
    torch.testing.assert_close(level.g2, expected, rtol=1e-6, atol=1e-9)
    assert (level.g2 > 0).all()


@pytest.mark.parametrize("name", [*EXACT, "short table"])
def test_alpha_and_sigma_follow_from_f_and_g2_by_quadrature(name: str) -> None:
    # From t = 0, where alpha = 1, and sigma = 0 but for VE, which starts at sigma_min.
    sde = SDES[name] if name in SDES else TabulatedVPSDE.from_betas(SHORT_BETAS)
    kinks = getattr(sde, "times", torch.tensor([sde.t_max])).tolist()
    first = sde.sigma_min**2 if isinstance(sde, VESDE) else 0.0
    before, decay, variance = 0.0, 0.0, first
    for t in kinks if len(kinks) > 1 else (0.01 * sde.t_max, 0.3 * sde.t_max, sde.t_max):

        def slope(u: float, v: np.ndarray) -> np.ndarray:
            level = sde.at(float(u))
            return 2 * level.f.item() * v + level.g2.item()

        decay += quad(lambda u: sde.at(u).f.item(), before, t, epsabs=1e-13, epsrel=1e-12)[0]
        solved = solve_ivp(
            slope, (before, t), [variance], method="DOP853", rtol=1e-10, atol=1e-10 * t
        )
        variance, before = float(solved.y[0, -1]), t
        level = sde.at(float(t))
        # The tolerances asked of quad and of the integrator, with a factor for many pieces.
        assert math.exp(decay) == pytest.approx(level.alpha.item(), rel=1e-9, abs=0)
        assert variance == pytest.approx(level.sigma.item() ** 2, rel=1e-7, abs=0)


@pytest.mark.parametrize("name", SDES)
def test_half_log_snr_decreases_strictly(name: str) -> None:
    sde = SDES[name]
    t = torch.linspace(1e-5, float(sde.t_max), 5001, dtype=torch.float64)
    assert (sde.at(t).half_log_snr.diff() < 0).all()


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_time_is_the_inverse_of_half_log_snr(name: str, dtype: torch.dtype) -> None:
    sde = SDES[name]
    t = torch.tensor([1e-4, 1e-3, *inner_times(sde, 9)[1:]], dtype=dtype)
    level = sde.at(t)
    found = sde.time(level.half_log_snr)
    assert found.dtype == dtype
    assert found.shape == t.shape
    # A rounded lambda moves t by eps |lambda| / |d lambda/dt|, with d lambda/dt = -g2/(2 sigma^2);
    # 8 ulps of each, and in float64 a cosine table or acos close to alpha = 1, which costs 1e-13.
    eps = EPS32 if dtype == torch.float32 else EPS64
    wide = sde.at(t.double())
    rate = wide.g2 / (2 * wide.sigma**2)
    tolerance = 8 * eps * (t.double() + (1 + wide.half_log_snr.abs()) / rate) + 1e-13
    assert ((found.double() - t.double()).abs() <= tolerance).all()
    for value, expected in zip(level.half_log_snr, found, strict=True):  # 0-d
        assert sde.time(value).shape == ()
        assert sde.time(value) == expected
    number = sde.time(level.half_log_snr[2].item())
    assert number.dtype == torch.float64
    assert number.shape == ()
    assert number.item() == pytest.approx(t[2].item(), abs=float(tolerance[2]))


@pytest.mark.parametrize("sde", [VPSDE(3.0, 3.0), SubVPSDE(3.0, 3.0)], ids=["vp", "subvp"])
def test_time_serves_a_constant_beta(sde: SDE) -> None:
    t = torch.tensor([1e-4, 0.3, 1.0], dtype=torch.float64)
    torch.testing.assert_close(sde.time(sde.at(t).half_log_snr), t, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", ["vp", "cosine", "subvp", "ve", "edm"])
def test_time_decreases_over_a_wide_range_of_half_log_snr(name: str) -> None:
    sde = SDES[name]
    t = sde.time(torch.linspace(-3.5, 4.5, 201, dtype=torch.float64))
    assert t.isfinite().all()
    assert (t.diff() < 0).all()


# --- dtypes and shapes ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize(
    "t, dtype",
    [
        (0.5, torch.float64),
        (torch.tensor(0.5), torch.float32),
        (torch.tensor(0.5, dtype=torch.float64), torch.float64),
        (torch.tensor([0.25, 0.5]), torch.float32),
        (torch.tensor([0.25, 0.5], dtype=torch.float64), torch.float64),
        (torch.tensor([0.25, 0.5], dtype=torch.float16), torch.float32),
        (torch.tensor([0.25, 0.5], dtype=torch.bfloat16), torch.float32),
    ],
)
def test_fields_have_the_dtype_and_shape_of_the_time(
    name: str, t: float | Tensor, dtype: torch.dtype
) -> None:
    level = SDES[name].at(t)
    shape = t.shape if isinstance(t, Tensor) else ()
    for field in level:
        assert field.dtype == dtype
        assert field.shape == shape
    if shape:
        for i in range(len(level.t)):
            assert [f[i].item() for f in level] == [f.item() for f in SDES[name].at(level.t[i])]


def test_whole_numbers_are_times_too() -> None:
    assert VPSDE().at(1).alpha == VPSDE().at(1.0).alpha
    level = EDMSDE().at(torch.tensor([1, 2]))
    assert level.sigma.dtype == torch.get_default_dtype()
    assert level.sigma.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("t", [math.nan, math.inf, -math.inf])
def test_a_time_that_is_not_finite_is_refused(t: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        VPSDE().at(t)
    with pytest.raises(ValueError, match="half log-SNR"):
        VPSDE().time(t)


def test_a_time_that_is_no_number_is_refused() -> None:
    with pytest.raises(TypeError, match="must be a number, got 'noon'"):
        VPSDE().at("noon")  # type: ignore[arg-type]


def test_level_helpers() -> None:
    level = SDES["subvp"].at(0.4)
    torch.testing.assert_close(level.sigma_over_alpha, level.sigma / level.alpha)
    assert all(
        f.shape == (3,) and (f == g).all() for f, g in zip(level.per_sample(3), level, strict=True)
    )
    assert all(
        f.dtype == torch.float32 and f == g.float()
        for f, g in zip(level.map(Tensor.float), level, strict=True)
    )
    hosted = HostedLevel.of(level, 0.25)
    assert hosted == level
    assert hosted.host_ratio == 0.25


# --- perturb and the prior -----------------------------------------------------------------------


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("event", [(3,), (2, 4, 5), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_perturb_is_alpha_x0_plus_sigma_noise_sample_by_sample(
    name: str, event: tuple[int, ...], dtype: torch.dtype
) -> None:
    sde = SDES[name]
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 4, *event, generator=generator, dtype=dtype)
    times = torch.tensor(inner_times(sde, 4), dtype=torch.float64)
    per_sample = sde.perturb(x0, times, noise)  # float64 times must not promote a float32 state
    assert per_sample.dtype == dtype
    assert per_sample.shape == x0.shape
    for i, t in enumerate(times.tolist()):
        alpha, sigma = (v.item() for v in (sde.at(t).alpha, sde.at(t).sigma))
        expected = alpha * x0[i] + sigma * noise[i]
        torch.testing.assert_close(per_sample[i], expected)  # rounding of one dtype
        for one in (t, torch.tensor(t, dtype=torch.float64)):
            whole = sde.perturb(x0, one, noise)
            assert whole.dtype == dtype
            torch.testing.assert_close(whole[i], expected)


@pytest.mark.parametrize("name", SDES)
def test_perturbed_samples_have_the_marginals_moments(name: str) -> None:
    problem = GaussianProblem(SDES[name])
    n, t = 40_000, inner_times(SDES[name], 5)[2]
    x0, _ = problem.target.sample(n, seed=1, dtype=torch.float64)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = SDES[name].perturb(x0, t, noise)
    expected = problem.marginal(t)
    variance = expected.covariance.diagonal()
    assert_close_to_monte_carlo(x.mean(0), expected.mean, (variance / n).sqrt())
    # Var of an entry of a sample covariance: (C_ij^2 + C_ii C_jj) / n.
    spread = ((expected.covariance**2 + torch.outer(variance, variance)) / n).sqrt()
    assert_close_to_monte_carlo(torch.cov(x.T), expected.covariance, spread)


def test_perturb_wants_noise_of_the_right_shape() -> None:
    with pytest.raises(ValueError, match=r"noise must have x0's shape \(4, 2\), got \(4,\)"):
        VPSDE().perturb(torch.zeros(4, 2), 0.5, torch.zeros(4))


PRIORS = [
    (VPSDE(), 1.0),
    (CosineVPSDE(), 1.0),
    (SubVPSDE(), 1.0),
    (TabulatedVPSDE.from_betas(DDPM_BETAS), 1.0),
    (VESDE(), 50.0),
    (VESDE(0.02, 8.0), 8.0),
    (VESDE(0.01, 1.0, t_max=0.5), 0.1),  # geometric: halfway between 0.01 and 1
    (EDMSDE(), 80.0),
    (EDMSDE(t_max=20.0), 20.0),
]


@pytest.mark.parametrize("sde, std", PRIORS, ids=repr)
@pytest.mark.parametrize("event", [(3,), (2, 3, 4), ()])
def test_prior_is_a_normal_of_its_std(sde: SDE, std: float, event: tuple[int, ...]) -> None:
    assert sde.prior_std().shape == ()
    assert sde.prior_std().dtype == torch.float64
    assert sde.prior_std().item() == pytest.approx(std, rel=1e-12)
    x = 2 * std * torch.randn(5, *event, generator=torch.Generator().manual_seed(3)).double()
    each = torch.distributions.Normal(torch.tensor(0.0).double(), std).log_prob(x)
    expected = each.reshape(5, -1).sum(1)
    found = sde.prior_log_prob(x)
    assert found.shape == (5,)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# --- a DDPM table --------------------------------------------------------------------------------

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


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sde",
    [
        *SDES.values(),
        VPSDE(0.2, 15.0, 1e-4, 0.9),
        CosineVPSDE(s=0.01, t_max=0.9),
        SubVPSDE(t_min=1e-2),
        VESDE(0.02, 9.0, t_min=1e-3),
        EDMSDE(0.01, 10.0, t_min=0.02, t_max=5.0),
        TabulatedVPSDE.from_betas(SHORT_BETAS, t_min=0.01, t_max=0.8),
    ],
    ids=lambda sde: type(sde).__name__,
)
def test_config_survives_json(sde: SDE) -> None:
    again = sde_from_config(json.loads(json.dumps(sde.config())))
    assert type(again) is type(sde)
    assert again == sde
    assert (again.t_min, again.t_max) == (sde.t_min, sde.t_max)
    t = inner_times(sde, 3)[1]
    assert [f.item() for f in again.at(t)] == [f.item() for f in sde.at(t)]


def test_config_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"unknown SDE kind 'VPSED'\. Did you mean 'VPSDE'\?"):
        sde_from_config({"kind": "VPSED"})
    with pytest.raises(ValueError, match="unknown SDE kind None"):
        sde_from_config({})
    with pytest.raises(ValueError, match=r"'VPSDE' do not fit.*sigma_max"):
        sde_from_config({"kind": "VPSDE", "sigma_max": 3.0})
    with pytest.raises(ValueError, match="beta_min"):
        sde_from_config({"kind": "VPSDE", "beta_min": -1.0})


def test_sdes_by_name() -> None:
    for name in ("vp", "cosine", "subvp", "ve", "edm"):
        assert named_sde(name) == SDES[name]
    with pytest.raises(ValueError, match=r"unknown SDE 'subpv'.*'subvp'.*cosine, edm, subvp, ve"):
        named_sde("subpv")


NAN = math.nan
BAD_SETTINGS: list[tuple[Callable[[], SDE], type[Exception], str]] = [
    (lambda: VPSDE(beta_min=0.0), ValueError, "beta_min"),
    (lambda: VPSDE(beta_min=NAN), ValueError, "beta_min"),
    (lambda: VPSDE(beta_min="a"), TypeError, "beta_min"),  # type: ignore[arg-type]
    (lambda: VPSDE(beta_max=0.05), ValueError, "beta_max"),
    (lambda: VPSDE(beta_max=math.inf), ValueError, "beta_max"),
    (lambda: VPSDE(t_min=0.0), ValueError, "t_min"),
    (lambda: VPSDE(t_min=-0.1), ValueError, "t_min"),
    (lambda: VPSDE(t_min=NAN), ValueError, "t_min"),
    (lambda: VPSDE(t_min=1.0), ValueError, "t_min must be below t_max"),
    (lambda: VPSDE(t_max=math.inf), ValueError, "t_max"),
    (lambda: VPSDE(t_max=NAN), ValueError, "t_max"),
    (lambda: VPSDE(t_max=None), TypeError, "t_max"),  # type: ignore[arg-type]
    (lambda: SubVPSDE(beta_min=-1.0), ValueError, "beta_min"),
    (lambda: SubVPSDE(beta_max=0.0), ValueError, "beta_max"),
    (lambda: SubVPSDE(t_min=2.0), ValueError, "t_min"),
    (lambda: CosineVPSDE(s=0.0), ValueError, "s must"),
    (lambda: CosineVPSDE(t_max=1.0), ValueError, "t_max"),
    (lambda: CosineVPSDE(t_max=1.5), ValueError, "t_max"),
    (lambda: CosineVPSDE(t_min=0.0), ValueError, "t_min"),
    (lambda: VESDE(sigma_min=0.0), ValueError, "sigma_min"),
    (lambda: VESDE(sigma_max=0.01), ValueError, "sigma_max"),
    (lambda: VESDE(sigma_max=NAN), ValueError, "sigma_max"),
    (lambda: VESDE(t_min=0.0), ValueError, "t_min"),
    (lambda: EDMSDE(sigma_min=-1.0), ValueError, "sigma_min"),
    (lambda: EDMSDE(sigma_max=0.001), ValueError, "sigma_max"),
    (lambda: EDMSDE(t_min=0.0), ValueError, "t_min"),
    (lambda: EDMSDE(t_min=90.0), ValueError, "t_min"),
    (lambda: EDMSDE(t_max=NAN), ValueError, "t_max"),
    (lambda: TabulatedVPSDE(()), ValueError, "betas is empty"),
    (lambda: TabulatedVPSDE.from_betas([]), ValueError, "betas is empty"),
    (lambda: TabulatedVPSDE.from_betas([0.1, 0.0]), ValueError, r"betas\[1\]"),
    (lambda: TabulatedVPSDE.from_betas([0.1, 0.2, 1.0]), ValueError, r"betas\[2\]"),
    (lambda: TabulatedVPSDE.from_betas([NAN]), ValueError, r"betas\[0\]"),
    (lambda: TabulatedVPSDE.from_betas(torch.zeros(2, 2)), ValueError, "one-dimensional"),
    (lambda: TabulatedVPSDE.from_betas([0.1], t_min=-0.5), ValueError, "t_min"),
    (lambda: TabulatedVPSDE.from_betas([0.1], t_min=1.0), ValueError, "t_min"),
    (lambda: TabulatedVPSDE.from_betas([0.1], t_max=1.5), ValueError, "t_max"),
    (lambda: TabulatedVPSDE.from_betas([0.1], t_max=NAN), ValueError, "t_max"),
]


@pytest.mark.parametrize("make, error, message", BAD_SETTINGS, ids=range(len(BAD_SETTINGS)))
def test_a_wrong_setting_is_named(
    make: Callable[[], SDE], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()
