"""torchsde's methods: exact moments, weak orders, strong orders on one path."""

import math

import pytest
import torch

from sde_diffusion import VESDE, VPSDE, GaussianMixture
from sde_diffusion.named_targets import gaussian, ring
from solvers import (
    Ancestral,
    BrownianPath,
    EulerMaruyama,
    Noise,
    RecordedNoise,
    TorchsdeSDE,
    sample,
)
from tests.adapters import IDS, SDES, start


def moments(solver, sde, steps, grid):
    """Mean and variance of a linear sampler on a 1-D Gaussian, exactly.

    Its result is ``c + M x + sum_k (a_k z_k0 + b_k z_k1)``: every coefficient is read off from one
    sample.
    """
    mean, variance = 0.5, 0.3
    target = GaussianMixture(torch.tensor([[mean]]), torch.tensor([variance]))
    eye = torch.eye(2 * steps + 2, dtype=torch.float64)[:, :, None]
    draws = {(k, slot): eye[2 + 2 * k + slot] for k in range(steps) for slot in (0, 1)}
    x = sample(
        target.score_fn(sde),
        sde,
        solver,
        x=eye[0],
        steps=steps,
        grid=grid,
        noise=RecordedNoise(draws),
    ).x[:, 0]
    # Sample 1 is the one with neither a start nor noise.
    coefficients = x - x[1]
    levels = sde.at(float(sde.t_max)), sde.at(float(sde.t_min))
    means = [mean * level.alpha for level in levels]
    variances = [
        float(torch.tensor(variance).double() * level.alpha**2 + level.sigma**2) for level in levels
    ]
    got_mean = x[1] + coefficients[0] * means[0]
    got_variance = coefficients[0] ** 2 * variances[0] + coefficients[2:].square().sum()
    return abs(got_mean - means[1]).item(), abs(got_variance - variances[1]).item()


@pytest.mark.parametrize("sde", SDES, ids=IDS)
@pytest.mark.parametrize("method", ["srk", "euler", "milstein"])
def test_weak_order_on_a_gaussian(method, sde):
    solver = TorchsdeSDE(method)
    for grid in ("log_snr", "karras"):
        errors = [moments(solver, sde, steps, grid) for steps in (128, 256)]
        # Linear in the clock, so the mean comes out exactly: 1e-12 is rounding. The mixture's
        # variance is a float32 0.3.
        assert max(error[0] for error in errors) < 1e-12
        assert math.log2(errors[0][1] / errors[1][1]) > solver.order - 0.1


@pytest.mark.parametrize("method, steps", [("srk", 60), ("euler", 400)])
def test_mean_and_covariance_within_their_standard_errors(method, steps):
    sde, n = VPSDE(), 4000
    solution = sample(
        gaussian().score_fn(sde), sde, TorchsdeSDE(method), shape=(n, 2), steps=steps, seed=5
    )
    level = sde.at(float(sde.t_min))
    mean = level.alpha * gaussian().mean()
    covariance = level.alpha**2 * gaussian().covariance() + level.sigma**2 * torch.eye(2).double()
    x = solution.x.double()
    deviations = covariance.diagonal().sqrt()
    # Four standard errors: of a mean sd/sqrt(n), of a covariance at most sqrt(2) sd_i sd_j/sqrt(n);
    # the bias of these step numbers is 0.5 % of a variance at most.
    assert ((x.mean(0) - mean).abs() < 4 * deviations / math.sqrt(n)).all()
    scale = deviations[:, None] * deviations
    off = (x.T.cov() - covariance).abs() / scale
    assert (off < 4 * math.sqrt(2 / n) + 0.005).all()


class SharedPath(Noise):
    """One path's increments and space-time Levy areas, from a fine grid to all it contains.

    Over ``[a, c] = [a, b] + [b, c]`` the increments add up, and so do the integrals of the path:
    ``U = sum_i (W_before_i h_i + h_i (W_i / 2 + H_i))``, from which ``H = U / h - W / 2``.
    """

    def __init__(self, tau, paths, ratio, seed=0):
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(2, len(tau) - 1, paths, 1, generator=generator, dtype=torch.float64)
        self.h = -tau.diff()[:, None, None]
        self.w = self.h.sqrt() * z[0]
        self.levy = (self.h / 12).sqrt() * z[1]
        self.ratio = ratio

    def coarse(self, ratio):
        other = object.__new__(SharedPath)
        other.__dict__.update(self.__dict__, ratio=ratio)
        return other

    def __call__(self, x, step, slot=0):
        here = slice(step.index * self.ratio, (step.index + 1) * self.ratio)
        h, w = self.h[here], self.w[here]
        total, length = w.sum(0), h.sum(0)
        if slot == 0:
            return total / length.sqrt()
        before = w.cumsum(0) - w
        integral = (h * (before + 0.5 * w + self.levy[here])).sum(0)
        return (integral / length - 0.5 * total) / (length / 12).sqrt()

    def prior(self, x):
        raise NotImplementedError

    def select(self, indices):
        raise NotImplementedError

    def exact(self, sde, tau, variance, x):
        """The reverse SDE's solution for N(0, variance): ``y / (variance + tau)`` is driven by the
        path alone. In each fine step the integrand is taken as linear: an error of order 2."""
        weight = (1 / (variance + tau))[:, None, None]
        first, last = weight[:-1], weight[1:]
        driven = (first * self.w + (last - first) * (0.5 * self.w - self.levy)).sum(0)
        begin, end = sde.at(float(sde.t_max)), sde.at(float(sde.t_min))
        y = (x / begin.alpha * weight[0] + driven) / weight[-1]
        return end.alpha * y


@pytest.mark.parametrize("sde", SDES[:3], ids=IDS[:3])
@pytest.mark.parametrize("method, order", [("euler", 1), ("milstein", 1), ("srk", 2)])
def test_strong_order_on_one_path(sde, method, order):
    # srk's order is 1.5 in general; what holds it back is the drift's curvature, which a Gaussian
    # has not.
    finest, paths, variance = 1024, 400, 0.3
    low, high = (sde.at(float(t)).half_log_snr.item() for t in (sde.t_max, sde.t_min))
    times = sde.time(torch.linspace(low, high, finest + 1, dtype=torch.float64))
    times[0], times[-1] = sde.t_max, sde.t_min
    tau = torch.exp(-2 * sde.at(times).half_log_snr)
    path = SharedPath(tau, paths, 1)
    target = GaussianMixture(torch.zeros(1, 1), torch.tensor([variance], dtype=torch.float64))
    x = start(sde, paths, dimension=1)
    exact = path.exact(sde, tau, variance, x)
    steps, errors = (32, 64, 128, 256), []
    for n in steps:
        ratio = finest // n
        got = sample(
            target.score_fn(sde),
            sde,
            TorchsdeSDE(method),
            x=x,
            grid=times[::ratio],
            noise=path.coarse(ratio),
        )
        errors.append((got.x - exact).square().mean().sqrt().item())
    slope = math.log2(errors[0] / errors[-1]) / math.log2(steps[-1] / steps[0])
    # 400 paths: an RMS error is known to 1 / sqrt(800) = 4 %, the slope over three doublings to
    # 0.03; the rest is the next order's share at 32 steps.
    assert abs(slope - order) < 0.25


@pytest.mark.parametrize("sde", [VPSDE(), VESDE()], ids=["VP", "VE"])
def test_strong_order_where_the_drift_is_curved(sde):
    # Two overlapping modes; the reference is srk on the finest grid, 16 times the steps.
    finest, paths = 2048, 400
    target = GaussianMixture(torch.tensor([[-0.6], [0.8]]), torch.tensor([0.3, 0.2]))
    low, high = (sde.at(float(t)).half_log_snr.item() for t in (sde.t_max, sde.t_min))
    times = sde.time(torch.linspace(low, high, finest + 1, dtype=torch.float64))
    times[0], times[-1] = sde.t_max, sde.t_min
    path = SharedPath(torch.exp(-2 * sde.at(times).half_log_snr), paths, 1)
    x = start(sde, paths, dimension=1)

    def run(method, n):
        ratio = finest // n
        grid, noise = times[::ratio], path.coarse(ratio)
        solver = TorchsdeSDE(method)
        return sample(target.score_fn(sde), sde, solver, x=x, grid=grid, noise=noise).x

    exact = run("srk", finest)
    for method, order in (("euler", 1), ("srk", 1.5)):
        coarse, fine = ((run(method, n) - exact).square().mean().sqrt().item() for n in (32, 128))
        assert math.log2(coarse / fine) / 2 > order - 0.25


def test_euler_on_ve_is_ancestral_sampling_with_the_large_variance():
    sde = VESDE()
    settings = {"shape": (5, 2), "steps": 20, "seed": 2, "dtype": torch.float64}
    score_fn = ring().score_fn(sde)
    ours = sample(score_fn, sde, TorchsdeSDE("euler"), **settings)
    native = sample(score_fn, sde, Ancestral(variance="large"), **settings)
    torch.testing.assert_close(ours.x, native.x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sde", SDES[:3], ids=IDS[:3])
def test_follows_the_brownian_path_of_the_native_sampler(sde):
    # Both converge to the same strong solution, at order 1: 4 times the steps, a quarter of the
    # distance; half leaves room for 100 paths and higher orders.
    x = start(sde, 100, dimension=2)
    distances = []
    for steps in (25, 100):
        path = BrownianPath(sde, seed=4, depth=16)
        results = [
            sample(gaussian().score_fn(sde), sde, solver, x=x, steps=steps, noise=path).x
            for solver in (TorchsdeSDE("euler"), EulerMaruyama())
        ]
        distances.append((results[0] - results[1]).square().mean().sqrt().item())
    assert distances[1] < distances[0] / 2


def test_repeats_by_seed_and_leaves_torchs_generator_alone():
    torch.manual_seed(11)
    state = torch.get_rng_state()
    score_fn = ring().score_fn(VPSDE())
    first, again, other = (
        sample(score_fn, VPSDE(), TorchsdeSDE(), shape=(3, 2), steps=5, seed=seed).x
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
