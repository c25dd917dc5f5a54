"""Adapters: evaluations counted, samples independent of their batch, settings and failures."""

import math

import pytest
import torch

from sde_diffusion import VESDE, VPSDE, Prediction, classifier_free_guided, classifier_guided
from sde_diffusion.errors import NonFiniteError
from sde_diffusion.named_targets import ring
from solvers import ProbabilityFlow, ScipyODE, TorchdiffeqODE, TorchsdeSDE, catalogue, sample
from tests.adapters import ACCURATE, EVERY, LOOSE, Counter, name, start

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
