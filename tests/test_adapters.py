"""The adapters against closed forms: exact ODE maps, exact moments, strong orders on one path."""

import math
from itertools import pairwise

import pytest
import torch

from sde_diffusion import (
    EDMSDE,
    VESDE,
    VPSDE,
    CosineVPSDE,
    GaussianMixture,
    Prediction,
    SubVPSDE,
    TabulatedVPSDE,
    classifier_free_guided,
    classifier_guided,
)
from sde_diffusion.errors import NonFiniteError
from sde_diffusion.named_targets import gaussian, ring
from solvers import (
    Ancestral,
    BrownianPath,
    EulerMaruyama,
    Noise,
    ProbabilityFlow,
    RecordedNoise,
    ScipyODE,
    TorchdiffeqODE,
    TorchsdeSDE,
    catalogue,
    sample,
)

DDPM = TabulatedVPSDE.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
SDES = [VPSDE(), VESDE(), SubVPSDE(), EDMSDE()]
IDS = [type(sde).__name__ for sde in SDES]
FIXED = {"euler": (1, 1), "midpoint": (2, 2), "heun2": (2, 2), "heun3": (3, 3), "rk4": (4, 4)}
ACCURATE = [
    *(TorchdiffeqODE(method, rtol=1e-8, atol=1e-8) for method in ("dopri5", "dopri8")),
    *(ScipyODE(method, rtol=1e-8, atol=1e-8) for method in ("RK45", "DOP853", "LSODA")),
]
LOOSE = [
    *(
        TorchdiffeqODE(method, rtol=1e-4, atol=1e-4)
        for method in ("bosh3", "adaptive_heun", "fehlberg2")
    ),
    *(ScipyODE(method, rtol=1e-4, atol=1e-4) for method in ("RK23", "Radau", "BDF")),
]
EVERY = [
    TorchdiffeqODE(),
    TorchdiffeqODE("rk4"),
    ScipyODE(),
    ScipyODE("LSODA"),
    *(TorchsdeSDE(method) for method in ("srk", "euler", "milstein")),
]


def start(sde, n, dimension=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(n, dimension, generator=generator, dtype=dtype) * sde.prior_std().to(dtype)


def exact_flow(target, sde, x):
    """The probability-flow map of one Gaussian: affine along each of its eigenvectors."""
    first, last = sde.at(float(sde.t_max)), sde.at(float(sde.t_min))
    eigenvectors = torch.eye(len(x[0]), dtype=x.dtype)
    if target.rotation is not None:
        eigenvectors = target.rotation[0]
    deviations = [
        torch.sqrt(level.alpha**2 * target.variances[0] + level.sigma**2) for level in (first, last)
    ]
    offset = (x - first.alpha * target.means[0]) @ eigenvectors
    return last.alpha * target.means[0] + (offset * deviations[1] / deviations[0]) @ eigenvectors.T


def name(solver):
    return f"{type(solver).__name__}-{solver.method}"


class Counter:
    """Counts calls and samples evaluated, on its own."""

    def __init__(self, score_fn):
        self.score_fn = score_fn
        self.calls = 0
        self.samples = 0
        self.times = []

    def __call__(self, x, level):
        self.calls += 1
        self.samples += len(x)
        self.times.append(float(level.t))
        return self.score_fn(x, level)


# --- ODE adapters: the right answer --------------------------------------------------------------


@pytest.mark.parametrize("sde", SDES, ids=IDS)
@pytest.mark.parametrize("solver", ACCURATE, ids=name)
def test_reaches_the_exact_flow(solver, sde):
    # Tolerances bound the error of a step; some dozens of steps, and the flow contracts: within 30
    # tolerances at the end.
    x = start(sde, 2)
    solution = sample(gaussian().score_fn(sde), sde, solver, x=x)
    assert (solution.x - exact_flow(gaussian(), sde, x)).abs().max() < 30 * solver.rtol


@pytest.mark.parametrize("solver", LOOSE, ids=name)
def test_low_order_and_implicit_methods_reach_the_exact_flow(solver):
    # fehlberg2 takes 1/512 of the distance to Euler's method for its error: its own is 400 times
    # the tolerance.
    factor = 1000 if solver.method == "fehlberg2" else 30
    x = start(VPSDE(), 2)
    solution = sample(gaussian().score_fn(VPSDE()), VPSDE(), solver, x=x)
    assert (solution.x - exact_flow(gaussian(), VPSDE(), x)).abs().max() < factor * solver.rtol


@pytest.mark.parametrize("sde", [CosineVPSDE(), DDPM], ids=["CosineVPSDE", "TabulatedVPSDE"])
@pytest.mark.parametrize("solver", [TorchdiffeqODE(), ScipyODE()], ids=name)
def test_reaches_the_exact_flow_on_the_other_sdes(solver, sde):
    x = start(sde, 2)
    solution = sample(gaussian().score_fn(sde), sde, solver, x=x)
    assert (solution.x - exact_flow(gaussian(), sde, x)).abs().max() < 30 * solver.rtol


@pytest.mark.parametrize("solver_type", [TorchdiffeqODE, ScipyODE])
def test_error_follows_the_tolerance(solver_type):
    sde = VPSDE()
    x = start(sde, 4)
    errors = []
    for tolerance in (1e-4, 1e-6, 1e-8):
        solver = solver_type(rtol=tolerance, atol=tolerance)
        solution = sample(gaussian().score_fn(sde), sde, solver, x=x)
        errors.append((solution.x - exact_flow(gaussian(), sde, x)).abs().max().item())
    # A hundredth of the tolerance: at least a twentieth of the error.
    assert all(fine < coarse / 20 for coarse, fine in pairwise(errors))


@pytest.mark.parametrize("sde", SDES, ids=IDS)
@pytest.mark.parametrize("norm", ["sample", "batch"])
def test_agrees_with_the_native_solver_on_a_mixture(sde, norm):
    # rk4 at 800 steps is within 1e-7 of the limit here; the adapters' tolerance is 1e-7.
    score_fn = ring().score_fn(sde)
    x = start(sde, 3)
    native = sample(score_fn, sde, ProbabilityFlow("rk4"), x=x, steps=800, grid="log_snr").x
    for solver_type in (TorchdiffeqODE, ScipyODE):
        solution = sample(score_fn, sde, solver_type(rtol=1e-7, atol=1e-7, norm=norm), x=x)
        assert (solution.x - native).abs().max() < 1e-5


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("sde", [VPSDE(), VESDE(), SubVPSDE()], ids=["VP", "VE", "subVP"])
def test_fixed_methods_take_the_grids_steps_and_have_their_order(method, sde):
    order, stages = FIXED[method]
    solver = TorchdiffeqODE(method)
    assert solver.order == order
    x = start(sde, 8)
    exact = exact_flow(gaussian(), sde, x)
    for grid in ("log_snr", "karras"):
        errors = []
        for steps in (64, 128):
            counter = Counter(gaussian().score_fn(sde))
            solution = sample(counter, sde, solver, x=x, steps=steps, grid=grid)
            assert solution.nfe == counter.calls == steps * stages
            assert solution.nfe_per_sample is None
            errors.append((solution.x - exact).square().mean().sqrt().item())
        assert math.log2(errors[0] / errors[1]) > order - 0.25


def test_fixed_euler_is_the_formula():
    sde = VPSDE()
    times = torch.tensor([1.0, 0.6, 0.35, 0.1], dtype=torch.float64)
    score_fn = ring().score_fn(sde)
    x = start(sde, 5)
    solution = sample(score_fn, sde, TorchdiffeqODE("euler"), x=x, grid=times)
    for now, then in pairwise(times):
        level, after = sde.at(now), sde.at(then)
        step = after.half_log_snr - level.half_log_snr
        slope = -level.sigma_over_alpha * score_fn(x, level).eps
        x = after.alpha * (x / level.alpha + step * slope)
    torch.testing.assert_close(solution.x, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", [TorchdiffeqODE(), TorchdiffeqODE("rk4"), ScipyODE()], ids=name)
def test_evaluates_within_the_grid_and_at_its_start(solver):
    sde = VPSDE()
    counter = Counter(ring().score_fn(sde))
    times = torch.tensor([0.9, 0.5, 0.01], dtype=torch.float64)
    sample(counter, sde, solver, x=start(sde, 2), grid=times)
    assert counter.times[0] == 0.9
    assert max(counter.times) == 0.9
    assert min(counter.times) >= 0.01


@pytest.mark.parametrize("solver", [TorchdiffeqODE(), ScipyODE(), TorchdiffeqODE("rk4")], ids=name)
def test_float32_states(solver):
    sde = VPSDE()
    x = start(sde, 3)
    narrow = sample(gaussian().score_fn(sde), sde, solver, x=x.float(), steps=100, grid="log_snr")
    assert narrow.x.dtype == torch.float32
    # The tolerance of 1e-5, some dozens of steps, and a score with float32's rounding.
    assert (narrow.x - exact_flow(gaussian(), sde, x)).abs().max() < 3e-4


# --- Counting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [*ACCURATE[:1], *ACCURATE[2:4], *LOOSE[3:5]], ids=name)
def test_counts_every_evaluation_of_every_sample(solver):
    sde = VPSDE()
    counter = Counter(ring().score_fn(sde))
    solution = sample(counter, sde, solver, x=start(sde, 3), denoise=True)
    assert solution.nfe_per_sample.shape == (3,)
    assert counter.samples == solution.nfe_per_sample.sum()
    assert solution.nfe == pytest.approx(counter.samples / 3)
    assert solution.network_passes == solution.nfe
    assert solution.stats["accepted"] > 1


@pytest.mark.parametrize("solver_type", [TorchdiffeqODE, ScipyODE])
def test_counts_a_batch_solved_at_once(solver_type):
    counter = Counter(ring().score_fn(VPSDE()))
    solution = sample(counter, VPSDE(), solver_type(norm="batch"), x=start(VPSDE(), 3))
    assert solution.nfe == counter.calls
    assert solution.nfe_per_sample is None


@pytest.mark.parametrize("method, per_step", [("srk", 2), ("euler", 1), ("milstein", 1)])
def test_counts_torchsdes_evaluations(method, per_step):
    counter = Counter(ring().score_fn(VPSDE()))
    solution = sample(counter, VPSDE(), TorchsdeSDE(method), shape=(3, 2), steps=10)
    assert solution.nfe == counter.calls == 10 * per_step


@pytest.mark.parametrize("solver", [TorchdiffeqODE(), ScipyODE(), TorchsdeSDE()], ids=name)
def test_counts_network_passes_of_guidance(solver):
    sde = VPSDE()
    model = ring().model(sde)
    twice = classifier_free_guided(model, 1, scale=2.0)
    solution = sample(twice, sde, solver, shape=(2, 2), steps=20)
    assert solution.network_passes == 2 * solution.nfe
    # Outside the interval one pass is enough, which needs levels whose ratio the host knows.
    partly = classifier_free_guided(model, 1, scale=2.0, interval=(0.3, 2.0))
    solution = sample(partly, sde, solver, shape=(2, 2), steps=20)
    assert solution.nfe < solution.network_passes < 2 * solution.nfe


# --- One sample is one sample --------------------------------------------------------------------


@pytest.mark.parametrize("solver", EVERY, ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_split_invariance(solver, dtype):
    sde = VPSDE()
    score_fn = ring().score_fn(sde)

    def draw(ids):
        solution = sample(
            score_fn,
            sde,
            solver,
            shape=(len(ids), 2),
            sample_ids=ids,
            steps=12,
            seed=3,
            dtype=dtype,
        )
        return solution.x

    whole = draw([0, 1, 2, 3, 4])
    assert whole.dtype == dtype
    assert torch.equal(whole, torch.cat([draw([0, 1]), draw([2]), draw([3, 4])]))


@pytest.mark.parametrize("solver", EVERY, ids=name)
@pytest.mark.parametrize("kind", ["cfg", "classifier"])
def test_labels_of_each_sample(solver, kind):
    sde = VESDE()
    target = ring()
    labels = torch.tensor([5, 0, 2])

    def guided(label, scale):
        if kind == "cfg":
            return classifier_free_guided(target.model(sde), label, scale)
        return classifier_guided(target.score_fn(sde), target.classifier(sde), label, scale)

    x = start(sde, 3)
    scales = torch.tensor([1.5, 0.5, 2.0], dtype=torch.float64)
    ids = torch.arange(3)
    whole = sample(guided(labels, scales), sde, solver, x=x, steps=8, sample_ids=ids)
    for i in range(3):
        alone = sample(
            guided(int(labels[i]), float(scales[i])),
            sde,
            solver,
            x=x[i : i + 1],
            steps=8,
            sample_ids=ids[i : i + 1],
        )
        torch.testing.assert_close(whole.x[i : i + 1], alone.x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("event", [(), (3, 2, 2)], ids=str)
@pytest.mark.parametrize("solver", EVERY, ids=name)
def test_event_shapes(event, solver):
    sde, variance = VPSDE(), 0.25

    def score_fn(x, level):
        assert x.shape[1:] == event
        return Prediction.from_score(x, level, -x / (level.alpha**2 * variance + level.sigma**2))

    solution = sample(score_fn, sde, solver, shape=(4, *event), steps=60, grid="log_snr", seed=1)
    assert solution.x.shape == (4, *event)
    if not solver.stochastic:
        x = sample(score_fn, sde, ProbabilityFlow("rk4"), shape=(4, *event), steps=100, seed=1).x
        assert (solution.x - x).abs().max() < 1e-3
    else:  # 5 standard deviations
        assert solution.x.abs().max() < 5 * math.sqrt(variance)


# --- torchsde: laws and orders -------------------------------------------------------------------


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


# --- Settings and failures -----------------------------------------------------------------------


def test_the_catalogue_lists_them():
    entries = catalogue()
    kinds = {name: entries[name].kind for name in ("torchdiffeq_ode", "scipy_ode", "torchsde_sde")}
    assert kinds == {"torchdiffeq_ode": "ODE", "scipy_ode": "ODE", "torchsde_sde": "SDE"}
    assert all(entries[name].adapter for name in kinds)
    assert [TorchdiffeqODE().order, ScipyODE().order, TorchsdeSDE().order] == [5, 5, 2]


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: TorchdiffeqODE("dopri6"), "unknown method 'dopri6'. Did you mean 'dopri"),
        (lambda: TorchdiffeqODE("implicit_adams"), "unknown method 'implicit_adams'"),
        (lambda: ScipyODE("rk45"), "unknown method 'rk45'. Did you mean 'RK45'"),
        (lambda: TorchsdeSDE("skr"), "unknown method 'skr'. Did you mean 'srk'"),
        (lambda: TorchdiffeqODE(rtol=0.0), "rtol must be a finite number greater than 0"),
        (lambda: ScipyODE(atol=float("nan")), "atol must be a finite number"),
        (lambda: ScipyODE(rtol=1e-16), "rtol must lie in"),
        (lambda: ScipyODE(norm="bach"), "unknown norm 'bach'. Did you mean 'batch'"),
        (lambda: TorchdiffeqODE(max_nfe=0), "max_nfe must be at least 1"),
    ],
)
def test_refuses_bad_settings(make, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        make()


@pytest.mark.parametrize(
    "solver",
    [*EVERY, TorchdiffeqODE(norm="batch"), ScipyODE("DOP853"), ScipyODE("Radau"), ScipyODE("BDF")],
    ids=name,
)
def test_a_network_that_returns_nan(solver):
    sde = VPSDE()
    score_fn = ring().score_fn(sde)

    def broken(x, level):
        eps = score_fn(x, level).eps
        return Prediction.from_eps(x, level, eps * (math.nan if level.t < 0.5 else 1.0))

    with pytest.raises(
        NonFiniteError, match=r"score_fn returned NaN or infinity at step \d, t = 0"
    ):
        sample(broken, sde, solver, shape=(2, 2), grid=[1.0, 0.8, 0.6, 0.3, 0.1])
    with pytest.raises(NonFiniteError) as caught:
        sample(broken, sde, solver, shape=(2, 2), grid=[1.0, 0.8, 0.6, 0.3, 0.1])
    assert caught.value.time < 0.5
    assert caught.value.step in (2, 3)


@pytest.mark.parametrize(
    "solver, words",
    [
        (TorchdiffeqODE(), "torchdiffeq's dopri5 failed at t = 0.8.*underflow in dt"),
        (ScipyODE(), "scipy's RK45 failed at t = 0.8.*step size is less than spacing"),
    ],
    ids=["torchdiffeq", "scipy"],
)
def test_a_solve_that_fails_says_what_and_when(solver, words):
    def explodes(x, level):  # dx/dlambda = x^2 from 1: infinite one unit of lambda on
        return Prediction.from_eps(x, level, -(x**2) / level.sigma)

    with pytest.raises(RuntimeError, match=words):
        sample(explodes, VESDE(), solver, x=torch.ones(1, 1, dtype=torch.float64))


@pytest.mark.parametrize("solver_type", [TorchdiffeqODE, ScipyODE])
def test_a_solve_without_end_is_given_up(solver_type):
    with pytest.raises(RuntimeError, match=r"no end after max_nfe=50 evaluations, t = 0\.\d"):
        sample(ring().score_fn(VPSDE()), VPSDE(), solver_type(max_nfe=50), shape=(1, 2))
