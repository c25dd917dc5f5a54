"""Schedules against formulas in 40 digits, numerical derivatives and quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import torch
from scipy.integrate import quad, solve_ivp
from torch import Tensor

from sde_diffusion import EDMSDE, SDE, VESDE, VPSDE, SubVPSDE, TabulatedVPSDE
from sde_diffusion.sde import HostedLevel
from tests.problems import SDES, SHORT_BETAS, inner_times

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
