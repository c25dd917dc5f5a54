"""Linear samplers on one Gaussian, where mean and covariance after n steps are known exactly.

The update of every native sampler is affine there. ``affine_run`` reads the whole run off the
sampler; the recursions of ``tests/recursions.py`` say what it must be.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sde_diffusion import SDE, ScoreFn, TabulatedVPSDE
from solvers import (
    DDIM,
    Ancestral,
    AnnealedLangevin,
    EulerMaruyama,
    Hold,
    Langevin,
    PredictorCorrector,
    ProbabilityFlow,
    RecordedNoise,
    ReverseDiffusion,
    Solver,
    Step,
    grids,
)
from tests.problems import (
    SDES,
    SHORT_BETAS,
    GaussianProblem,
    IsotropicScore,
    Moments,
    affine_run,
    fitted_order,
    uniform_grid,
    warped_grid,
)
from tests.recursions import (
    RK,
    Line,
    Recursion,
    ancestral,
    chained,
    euler_maruyama,
    hold,
    posterior,
    reverse_diffusion,
    song_ermon_langevin,
    song_langevin,
)

CONTINUOUS = ("vp", "cosine", "subvp", "ve", "edm")
ROUNDING = 1e-10
"""Some 30 float64 operations a step, 11 steps, states up to 80 against results near 1: 1e-12 is
expected; the bugs this file is for change the result by more than 1e-3."""

SAMPLERS: dict[str, tuple[Solver, Recursion]] = {
    **{
        f"ancestral-{eta}-{variance}": (Ancestral(eta, variance), ancestral(eta, variance))  # type: ignore[arg-type]
        for eta in (0.0, 0.5, 1.0)
        for variance in ("small", "large")
    },
    "ancestral-as-posterior": (Ancestral(), posterior),
    "ddim": (DDIM(), ancestral(0.0, "small")),
    "ddim-0.3": (DDIM(0.3), ancestral(0.3, "small")),
    **{
        f"euler_maruyama-{eta}": (EulerMaruyama(eta), euler_maruyama(eta))
        for eta in (0.0, 0.5, 1.0, 1.5)
    },
    "reverse_diffusion": (ReverseDiffusion(), reverse_diffusion),
    **{f"probability_flow-{name}": (ProbabilityFlow(name), RK[name]) for name in RK},
}

CORRECTED: dict[str, tuple[Solver, Recursion]] = {
    "langevin-after": (
        PredictorCorrector(Ancestral(), Langevin(0.3, 2)),
        chained(posterior, song_langevin(0.3, 2, at_end=True)),
    ),
    "langevin-before": (
        PredictorCorrector(ReverseDiffusion(), Langevin(0.2, 2), first="corrector"),
        chained(song_langevin(0.2, 2, at_end=False), reverse_diffusion),
    ),
    "langevin-alone": (
        PredictorCorrector(Hold(), Langevin(0.4, 1)),
        chained(hold, song_langevin(0.4, 1, at_end=True)),
    ),
    "annealed-after-euler": (
        PredictorCorrector(EulerMaruyama(), AnnealedLangevin(0.1, 2)),
        chained(euler_maruyama(1.0), song_ermon_langevin(0.1, 2, at_end=True)),
    ),
    "annealed-before-heun": (
        PredictorCorrector(ProbabilityFlow("heun"), AnnealedLangevin(0.2, 1), first="corrector"),
        chained(song_ermon_langevin(0.2, 1, at_end=False), RK["heun"]),
    ),
    "annealed-alone": (
        PredictorCorrector(Hold(), AnnealedLangevin(0.5, 3)),
        chained(hold, song_ermon_langevin(0.5, 3, at_end=True)),
    ),
}


def grid_of(sde: SDE, kind: str, steps: int) -> Tensor:
    """The SDE's own grid, log-SNR steps that grow and shrink by 4, or each point of a uniform
    log-SNR grid moved by up to 0.4 of a step either way."""
    if kind == "default":
        return grids.resolve(None, sde, steps)
    if kind == "warped":
        return warped_grid(sde, steps)
    low, high = (float(sde.at(t).half_log_snr) for t in (float(sde.t_max), float(sde.t_min)))
    generator = torch.Generator().manual_seed(steps)
    shift = 0.8 * torch.rand(steps - 1, generator=generator, dtype=torch.float64) - 0.4
    inner = (torch.arange(1, steps) + shift) / steps
    times = sde.time(low + (high - low) * inner)
    ends = torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64)
    return torch.cat([ends[:1], times, ends[1:]])


@pytest.mark.parametrize("kind", ["default", "random"])
@pytest.mark.parametrize("name", [*CONTINUOUS, "table"])
@pytest.mark.parametrize("sampler", [*SAMPLERS, *CORRECTED])
def test_mean_and_covariance_after_a_run(sampler: str, name: str, kind: str) -> None:
    sde = TabulatedVPSDE.from_betas(SHORT_BETAS) if name == "table" else SDES[name]
    solver, recursion = {**SAMPLERS, **CORRECTED}[sampler]
    problem = GaussianProblem(sde)
    times = grid_of(sde, kind, 11)
    slots = (0, 1, 2, 3) if sampler in CORRECTED else (0,)
    run = affine_run(problem.score_fn, sde, solver, times, 2, slots)
    found = run.moments(problem.prior())
    variances, axes = torch.linalg.eigh(problem.covariance)
    means, moments = axes.T @ problem.mean, []
    for mean, variance in zip(means.tolist(), variances.tolist(), strict=True):
        line = Line(sde, mean, variance)
        moments.append(line.propagate(recursion, times.tolist(), 0.0, float(sde.prior_std()) ** 2))
    end = torch.tensor(moments, dtype=torch.float64)
    expected = Moments(axes @ end[:, 0], axes @ torch.diag(end[:, 1]) @ axes.T)
    assert found.distance(expected) < ROUNDING
    # Noise is drawn where the recursion has it and nowhere else, and noise of one step is new.
    for (step, slot), gain in run.gains.items():
        draws = recursion(line, *(line.at(float(t)) for t in times[step : step + 2]))
        stochastic = sum(bool(part.gains and part.gains[0]) for part in draws)
        first = 0 if sampler in SAMPLERS or draws_in_slot_0(solver) else 1
        assert bool(gain.abs().max() > 0) == (first <= slot < first + stochastic)


def draws_in_slot_0(solver: Solver) -> bool:
    return isinstance(solver, PredictorCorrector) and solver.predictor.stochastic


# --- convergence to the exact marginal -----------------------------------------------------------

MEAN, VARIANCE = 0.7, 0.4
SCORE = IsotropicScore(MEAN, VARIANCE)
CONVERGING = {
    "ancestral": Ancestral(),
    "ancestral-large": Ancestral(variance="large"),
    "ancestral-0.5": Ancestral(0.5),
    "ddim": DDIM(),
    "euler_maruyama": EulerMaruyama(),
    "euler_maruyama-0": EulerMaruyama(0.0),
    "euler_maruyama-1.5": EulerMaruyama(1.5),
    "reverse_diffusion": ReverseDiffusion(),
    "euler": ProbabilityFlow("euler"),
    "midpoint": ProbabilityFlow("midpoint"),
    "heun": ProbabilityFlow("heun"),
    "rk4": ProbabilityFlow("rk4"),
}


def updates(score_fn: ScoreFn, sde: SDE, solver: Solver, times: Tensor, slots: int = 1) -> Tensor:
    """Every step's update of one number, ``(steps, 2 + slots)``: ``a``, ``b`` and the gains.

    One call: each sample of a batch stands at the times of its own step.
    """
    probes, steps = 2 + slots, len(times) - 1
    levels = [sde.at(t.repeat_interleave(probes)) for t in (times[:-1], times[1:])]
    step = Step(0, *levels, solver.stages(sde, *levels))
    x = torch.zeros(steps, probes, dtype=torch.float64)
    x[:, 1] = 1.0
    draws = {(0, slot): torch.zeros_like(x) for slot in range(slots)}
    for slot in range(slots):
        draws[0, slot][:, 2 + slot] = 1.0
    noise = RecordedNoise({place: draw.reshape(-1, 1) for place, draw in draws.items()})
    x = x.reshape(-1, 1)
    end = solver.step(score_fn, x, step, solver.init(x), noise).x.reshape(steps, probes)
    return torch.cat([end[:, 1:2] - end[:, :1], end[:, :1], end[:, 2:] - end[:, :1]], 1)


def end_of_run(found: Tensor, mean: float, variance: float) -> tuple[float, float]:
    """Mean and variance after all of ``updates``."""
    for a, b, *gains in found.tolist():
        mean = a * mean + b
        variance = a**2 * variance + sum(gain**2 for gain in gains)
    return mean, variance


def errors_of_moments(sde: SDE, solver: Solver, times: Tensor, eta: float) -> Tensor:
    """Errors of mean and variance at the end, signed, in units of the exact deviation.

    The start is the marginal at ``t_max``, once as it is and once moved by a deviation and widened
    by a half: the first shows the noise that is put in, the second what becomes of the state.
    """
    problem = GaussianProblem(
        sde,
        torch.tensor([MEAN], dtype=torch.float64),
        torch.tensor([[VARIANCE]], dtype=torch.float64),
    )
    first, last = float(times[0]), float(times[-1])
    exact = problem.marginal(first)
    scale = float(problem.marginal(last).covariance) ** 0.5
    found = updates(SCORE, sde, solver, times)
    errors = []
    for start in (
        exact,
        Moments(exact.mean + exact.covariance[0].sqrt(), 1.5 * exact.covariance),
    ):
        mean, variance = end_of_run(found, float(start.mean), float(start.covariance))
        expected = problem.exact_moments(start, first, last, eta)
        errors.append((mean - float(expected.mean)) / scale)
        errors.append((variance - float(expected.covariance)) / scale**2)
    return torch.tensor(errors, dtype=torch.float64)


def errors_by_steps(sampler: str, name: str, kind: str) -> list[Tensor]:
    sde, solver = SDES[name], CONVERGING[sampler]
    eta = getattr(solver, "eta", 1.0 if solver.stochastic else 0.0)
    return [errors_of_moments(sde, solver, grid_of(sde, kind, n), eta) for n in STEPS]


STEPS = (128, 256, 512)


@pytest.mark.parametrize("kind", ["default", "warped", "random"])
@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("sampler", CONVERGING)
def test_moments_converge_to_the_exact_ones_at_the_declared_order(
    sampler: str, name: str, kind: str
) -> None:
    errors = errors_by_steps(sampler, name, kind)
    order = CONVERGING[sampler].order
    slope = fitted_order(STEPS, [float(e.norm()) for e in errors])
    assert slope > order - 0.25
    # Midpoint's leading error cancels over a whole run on a Gaussian; `ring` shows its order.
    assert slope < order + (1.25 if sampler == "midpoint" else 0.25)


@pytest.mark.parametrize("kind", ["default", "warped"])
@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("sampler", [s for s in CONVERGING if s != "midpoint"])
def test_the_limit_is_the_exact_law(sampler: str, name: str, kind: str) -> None:
    """Extrapolation to infinitely many steps takes at least three quarters of the finest error
    away; a bias of that size or more, which a slope over few grids may hide, would stay."""
    *_, coarse, fine = errors_by_steps(sampler, name, kind)
    order = CONVERGING[sampler].order
    limit = fine + (fine - coarse) / (2**order - 1)
    assert float(limit.norm()) < 0.25 * float(fine.norm())
    assert float(fine.norm()) < 0.2


# --- the bias of Langevin correctors -------------------------------------------------------------

PREDICTORS = {"ancestral": Ancestral(), "reverse_diffusion": ReverseDiffusion(), "ddim": DDIM()}


@pytest.mark.parametrize("first", ["predictor", "corrector"])
@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("snr", [0.16, 0.4])
@pytest.mark.parametrize("name", ["vp", "ve"])
def test_predictor_corrector_is_left_with_the_langevin_bias(
    name: str, snr: float, predictor: str, first: str
) -> None:
    """With data that is one point, ``score = -(x - mean)/sigma^2`` and a Langevin step of ``d =
    delta sigma^2`` multiplies the deviation by ``1 - delta`` and adds variance ``2 delta sigma^2``:
    its stationary variance is ``sigma^2 / (1 - delta/2)``. With more steps the predictor moves less
    in each and ``delta`` tends to ``2 snr^2``. A predictor with noise takes ``2 h`` a step off the
    excess, h the step in log-SNR, the corrector gives ``2 delta`` back: ``h / delta`` of the bias
    is missing, 9.4 / 4000 / 0.05 < 5 % here, and half of that with twice the steps.
    """
    sde = SDES[name]
    solver = PredictorCorrector(PREDICTORS[predictor], Langevin(snr), first)  # type: ignore[arg-type]
    point = IsotropicScore(MEAN, 0.0)
    bias = 1 / (1 - snr**2) - 1
    last, left = sde.at(float(sde.t_min)), []
    for n in (4000, 8000):
        found = updates(point, sde, solver, uniform_grid(sde, n), slots=2)
        mean, variance = end_of_run(found, 0.0, float(sde.prior_std()) ** 2)
        assert abs(mean - MEAN * float(last.alpha)) < 1e-6 * float(last.sigma)
        left.append(abs(variance / float(last.sigma) ** 2 - 1 - bias) / bias)
    assert left[0] < 0.05
    # DDIM carries a scaled law over exactly, so that nothing but the change of alpha is left.
    assert left[1] < 0.6 * left[0] + 1e-6
    assert (left[1] < 1e-5) == (predictor == "ddim")


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("step_size", [0.06, 0.5])
def test_annealed_langevin_has_its_stationary_variance(name: str, step_size: float) -> None:
    """At a fixed level, on data of variance c: ``v / (1 - step_size sigma^2 / (2 v))`` with ``v =
    alpha^2 c + sigma^2``. A thousand steps forget where they started: ``(1 - 0.06 sigma^2/v)^1000``
    is below 1e-20 at the level chosen, where sigma = 5 or nearly 1."""
    sde = SDES[name]
    start = 5.0 if name == "edm" else 0.75 * float(sde.t_max)
    times = torch.tensor([start, 0.999 * start], dtype=torch.float64)
    solver = PredictorCorrector(Hold(), AnnealedLangevin(step_size, 1000))
    found = updates(SCORE, sde, solver, times, slots=1001)
    mean, variance = end_of_run(found, 3.0, 10.0)
    level = sde.at(times[1])
    exact = float(level.alpha**2 * VARIANCE + level.sigma**2)
    expected = exact / (1 - step_size * float(level.sigma) ** 2 / (2 * exact))
    assert mean == pytest.approx(MEAN * float(level.alpha), rel=1e-9)
    assert variance == pytest.approx(expected, rel=1e-9)
