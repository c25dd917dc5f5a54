"""Encoding and decoding: closed forms, orders, round trips, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sde_diffusion import (
    EDMSDE,
    VESDE,
    VPSDE,
    GaussianMixture,
    NoiseLevel,
    Prediction,
    SubVPSDE,
    bind,
    named_target,
)
from solvers import Adaptive, catalogue
from solvers.encoding import (
    change_class,
    decode,
    encode,
    interpolate,
    ode_solvers,
    round_trip,
    spherical,
)
from solvers.mirror import MirroredSDE
from tests.problems import SDES, fitted_order, inner_times

TARGET = named_target("gmm16")


@pytest.mark.parametrize("name", SDES)
def test_the_mirrored_sde_is_the_sde_with_signal_and_noise_exchanged(name: str) -> None:
    sde = SDES[name]
    mirror = MirroredSDE(sde)
    for t in inner_times(sde):
        there, here = sde.at(t), mirror.at(mirror.t_min + mirror.t_max - t)
        # Times near t_min lose digits to t_max: 1e-16 * 80 / 0.002 on EDM.
        torch.testing.assert_close(here.alpha, there.sigma, rtol=1e-9, atol=0)
        torch.testing.assert_close(here.sigma, there.alpha, rtol=1e-9, atol=0)
        torch.testing.assert_close(mirror.time(here.half_log_snr), here.t, rtol=1e-6, atol=1e-9)
        back = mirror.unmirrored(here)
        for field, wanted in zip(back, there, strict=True):
            torch.testing.assert_close(field, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["vp", "ve", "subvp"])
def test_the_mirrored_drift_and_diffusion_belong_to_its_kernel(name: str) -> None:
    """f = d log alpha/dt and g^2 = d sigma^2/dt - 2 f sigma^2, by central differences."""
    mirror, h = MirroredSDE(SDES[name]), 1e-5
    for t in (0.2, 0.5, 0.9):
        low, at, high = (mirror.at(t + d) for d in (-h, 0.0, h))
        f = (high.alpha.log() - low.alpha.log()) / (2 * h)
        g2 = (high.sigma**2 - low.sigma**2) / (2 * h) - 2 * f * at.sigma**2
        torch.testing.assert_close(at.f, f, rtol=1e-5, atol=1e-6)  # h^2 times a third derivative
        torch.testing.assert_close(at.g2, g2, rtol=1e-5, atol=1e-6)


MEAN, DEVIATION = torch.tensor([0.5, -1.0]).double(), torch.tensor([0.3, 1.2]).double()


def latent(sde: VPSDE, x: Tensor) -> Tensor:
    """Of a Gaussian's sample: its distance from the mean, in deviations, stays."""
    first, last = sde.at(float(sde.t_min)), sde.at(float(sde.t_max))
    spread = [torch.sqrt(v.alpha**2 * DEVIATION**2 + v.sigma**2) for v in (first, last)]
    return last.alpha * MEAN + spread[1] / spread[0] * (x - first.alpha * MEAN)


@pytest.mark.parametrize("sde", [VPSDE(), VESDE(), SubVPSDE(), EDMSDE()], ids=str)
def test_encoding_a_gaussian_is_its_closed_form(sde: VPSDE) -> None:
    target = GaussianMixture(MEAN[None], (DEVIATION**2)[None])
    x, _ = target.sample(5, 0, dtype=torch.float64)
    wanted = latent(sde, x)
    found = encode(target.score_fn(sde), sde, x, plan=Adaptive(1e-9, 1e-9))
    assert found.reached is not None
    assert bool(found.reached.all())
    # 1e-9 a step relative to sqrt(alpha^2 + sigma^2), over some dozens of steps.
    torch.testing.assert_close(found.x, wanted, rtol=1e-7, atol=1e-7 * float(sde.prior_std()))
    back = decode(target.score_fn(sde), sde, wanted, plan=Adaptive(1e-9, 1e-9))
    torch.testing.assert_close(back.x, x, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ode_solvers())
def test_every_ode_solver_encodes(name: str) -> None:
    """At its declared order, or, where it chooses its own steps, to its tolerance."""
    solver = catalogue()[name].type()
    sde = VPSDE()
    score_fn = GaussianMixture(MEAN[None], (DEVIATION**2)[None]).score_fn(sde)
    x = torch.tensor([[0.9, -0.4], [0.1, 1.0]], dtype=torch.float64)
    wanted = latent(sde, x)
    if getattr(solver, "adaptive", False):
        # Tolerances of 1e-5 a step in y = x / alpha.
        found = encode(score_fn, sde, x, solver=solver).x
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=0)
        return
    steps = [100, 200, 400]
    errors = [
        float((encode(score_fn, sde, x, solver=solver, steps=n, grid="log_snr").x - wanted).norm())
        for n in steps
    ]
    assert errors[-1] < 0.03
    assert fitted_order(steps, errors) > solver.order - 0.25


@pytest.mark.parametrize("sde", [VPSDE(), VESDE()], ids=["vp", "ve"])
def test_a_round_trip_on_an_exact_target_comes_back(sde: VPSDE) -> None:
    x, _ = TARGET.sample(4, 3, dtype=torch.float64)
    trip = round_trip(TARGET.score_fn(sde), sde, x)
    assert trip.rms.shape == (4,)
    assert float(trip.rms.max()) < 1e-4
    torch.testing.assert_close((trip.x - x).square().mean(1).sqrt(), trip.rms)


def test_a_sample_is_encoded_alike_in_any_batch() -> None:
    sde = VPSDE()
    x, _ = TARGET.sample(6, 1, dtype=torch.float64)
    labels = torch.tensor([0, 3, 5, 1, 2, 9])
    whole = encode(TARGET.score_fn(sde, labels), sde, x, solver=named("deis"), steps=12)
    part = torch.tensor([4, 1])
    alone = encode(TARGET.score_fn(sde, labels[part]), sde, x[part], solver=named("deis"), steps=12)
    assert torch.equal(whole.x[part], alone.x)


def named(name: str) -> object:
    return catalogue()[name].type()


def test_changing_the_class_keeps_the_latent() -> None:
    """Of two Gaussians: the place relative to the mean, in deviations, is kept."""
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.5]], dtype=torch.float64)
    target = GaussianMixture(means, torch.tensor([0.04, 0.25]), labels=torch.tensor([0, 1]))
    sde = VPSDE(t_min=1e-5)
    x = torch.tensor([[-1.1, 0.3]], dtype=torch.float64)
    moved = change_class(target.model(sde), sde, x, 0, 1, plan=Adaptive(1e-8, 1e-8))
    wanted = means[1] + (0.5 / 0.2) * (x - means[0])
    # The means decay to 0.0066 of themselves, not to 0: a shift of 0.0066 * 2 and its scaling.
    alpha = sde.at(1.0).alpha
    correction = (
        float(alpha * (means[0] - means[1]).norm()) * 0.5 / math.sqrt(1 - float(alpha) ** 2)
    )
    assert float((moved.x - wanted).norm()) < 1.01 * correction + 1e-4
    same = change_class(target.model(sde), sde, x, 1, 1)
    torch.testing.assert_close(same.x, x, atol=1e-4, rtol=0)


def test_interpolation_runs_from_one_to_the_other_on_the_sphere() -> None:
    sde = VPSDE()
    score_fn = TARGET.conditional(0).score_fn(sde)
    x, _ = TARGET.sample(4, 1, label=0, dtype=torch.float64)
    path = interpolate(score_fn, sde, x[:2], x[2:], count=3)
    assert path.shape == (3, 2, 16)
    torch.testing.assert_close(path[0], x[:2], atol=1e-4, rtol=0)
    torch.testing.assert_close(path[-1], x[2:], atol=1e-4, rtol=0)


def test_spherical_interpolation_keeps_norm_and_speed() -> None:
    a = torch.tensor([[3.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    b = torch.tensor([[0.0, 3.0], [2.0, 2.0]], dtype=torch.float64)
    third = spherical(a, b, 1 / 3)
    angle = math.pi / 6
    wanted = torch.tensor([3 * math.cos(angle), 3 * math.sin(angle)]).double()
    torch.testing.assert_close(third[0], wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(third[1], a[1] + (b[1] - a[1]) / 3)  # parallel: a straight line
    with pytest.raises(ValueError, match="pair 1 of a and b is opposite"):
        spherical(a, torch.stack([b[0], -b[1]]), 0.5)


def test_temperature_scales_the_latent() -> None:
    sde = VPSDE(t_min=1e-5)
    target = GaussianMixture(torch.zeros(1, 2), torch.tensor([0.25]))
    z = torch.tensor([[0.4, -1.0]], dtype=torch.float64)
    score_fn = target.score_fn(sde)
    half = decode(score_fn, sde, z, temperature=0.5)
    torch.testing.assert_close(half.x, 0.5 * decode(score_fn, sde, z).x, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="temperature must be a finite number greater than 0"):
        decode(score_fn, sde, z, temperature=0.0)


class Faulty:
    """An exact score that is NaN, or wild, on the samples whose first element is above 10."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.target = GaussianMixture(torch.zeros(1, 2), torch.ones(1))

    def __call__(self, x: Tensor, level: NoiseLevel) -> Prediction:
        prediction = self.target.score_fn(VPSDE())(x, level)
        bad = x[:, :1] > 10
        worse = math.nan if self.how == "nan" else 1e3 * torch.sin(1e7 * x)
        return Prediction.from_eps(x, level, torch.where(bad, worse, prediction.eps))


@pytest.mark.parametrize("how", ["nan", "wild"])
def test_a_sample_that_does_not_arrive_is_reported_and_harms_no_other(how: str) -> None:
    sde = VPSDE()
    x = torch.tensor([[0.5, 1.0], [100.0, 0.0], [-1.0, 0.3]], dtype=torch.float64)
    plan = Adaptive(1e-5, 1e-5, max_steps=200)
    found = encode(Faulty(how), sde, x, plan=plan)
    assert found.reached is not None
    assert found.reached.tolist() == [True, False, True]
    assert bool(found.x[1].isnan().all())
    good = torch.tensor([0, 2])
    assert torch.equal(found.x[good], encode(Faulty(how), sde, x[good], plan=plan).x)


def test_what_does_not_fit_is_refused() -> None:
    sde = VPSDE()
    x = torch.zeros(2, 16, dtype=torch.float64)
    score_fn = TARGET.score_fn(sde)
    with pytest.raises(ValueError, match=r"EulerMaruyama.* draws noise; these do: adams_bashforth"):
        encode(score_fn, sde, x, solver=named("euler_maruyama"), steps=10)
    with pytest.raises(ValueError, match=r"Hold.* makes no step"):
        encode(score_fn, sde, x, solver=named("hold"), steps=10)
    with pytest.raises(ValueError, match="steps is missing"):
        encode(score_fn, sde, x, solver=named("deis"))
    with pytest.raises(TypeError, match="x must be a floating tensor"):
        encode(score_fn, sde, torch.zeros(2, 16, dtype=torch.long))
    with pytest.raises(ValueError, match="a and b must have one shape"):
        interpolate(score_fn, sde, x, x[:1])
    with pytest.raises(ValueError, match=r"label must lie in 0\.\.9"):
        change_class(TARGET.model(sde), sde, x, 0, 10)
    with pytest.raises(ValueError, match="one entry per sample, 2, got 3"):
        encode(bind(TARGET.model(sde), torch.tensor([0, 1, 2])), sde, x)
    with pytest.raises(ValueError, match="unfinished"):
        Adaptive(unfinished="ignore")
