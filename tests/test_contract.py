"""Public names and arguments that others rely on: names, order and defaults stay as they are;
more optional arguments may follow."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

import sde_diffusion
import solvers
from sde_diffusion import SDE, GaussianMixture, NoiseLevel, Prediction, TabulatedVPSDE
from solvers import Integrator, Solution, Solver, Step, Stepped


def called(text: str) -> list[tuple[str, Any]]:
    """``a, b=1`` as names and defaults, ``inspect.Parameter.empty`` where there is none."""
    namespace: dict[str, Any] = {}
    exec(f"def function({text}): ...", namespace)
    return parameters(namespace["function"])


def parameters(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]


LIBRARY = {
    "VPSDE": "beta_min=0.1, beta_max=20.0, t_min=1e-3, t_max=1.0",
    "CosineVPSDE": "",
    "SubVPSDE": "beta_min=0.1, beta_max=20.0",
    "VESDE": "sigma_min=0.01, sigma_max=50.0",
    "EDMSDE": "sigma_min=0.002, sigma_max=80.0",
    "EpsModel": "net, sde",
    "X0Model": "net, sde",
    "VModel": "net, sde",
    "ScoreModel": "net, sde",
    "EDMModel": "net, sde",
    "bind": "model, label",
    "classifier_guided": "score_fn, classifier, label, scale=1.0",
    "classifier_free_guided": "model, label, scale=1.0, interval=None, rescale=0.0",
    "GaussianMixture": "means, covariances, weights=None, labels=None",
}
SOLVERS = {
    "Ancestral": "eta=1.0, variance='small'",
    "DDIM": "eta=0.0",
    "EulerMaruyama": "eta=1.0",
    "ReverseDiffusion": "",
    "Langevin": "snr=0.16, steps=1",
    "AnnealedLangevin": "",
    "ProbabilityFlow": "method='heun'",
    "TorchsdeSDE": "method='srk'",
    "DPMSolverPP": "order=2, eta=0.0",
    "DEIS": "order=3",
    "UniPC": "order=3",
    "EDMStochasticHeun": "s_churn=0.0",
}
METHODS: list[tuple[Callable[..., Any], str]] = [
    (SDE.at, "self, t"),
    (SDE.time, "self, half_log_snr"),
    (SDE.perturb, "self, x0, t, noise"),
    (SDE.prior_std, "self"),
    (SDE.prior_log_prob, "self, x"),
    (TabulatedVPSDE.from_betas, "betas"),
    (Prediction.from_eps, "x, level, eps"),
    (Prediction.from_x0, "x, level, x0"),
    (Prediction.from_score, "x, level, score"),
    (Prediction.from_v, "x, level, v"),
    (GaussianMixture.sample, "self, n, seed, label=None"),
    (GaussianMixture.log_prob, "self, x"),
    (GaussianMixture.log_prob_at, "self, x, level"),
    (GaussianMixture.score_fn, "self, sde, label=None"),
    (GaussianMixture.classifier, "self, sde"),
    (GaussianMixture.conditional, "self, label"),
    (Solver.init, "self, x"),
    (Solver.step, "self, score_fn, x, step, state, noise"),
    (Integrator.solve, "self, score_fn, sde, x, times, noise"),
    (
        solvers.log_likelihood,
        "score_fn, sde, x, *, divergence='exact', probes=1, seed=0, solver=None, prior='standard'",
    ),
]


def begins(function: Callable[..., Any], text: str) -> None:
    expected = called(text)
    found = parameters(function)
    assert found[: len(expected)] == expected
    rest = list(inspect.signature(function).parameters.values())[len(expected) :]
    assert all(p.default is not p.empty or p.kind is p.VAR_KEYWORD for p in rest)


@pytest.mark.parametrize("name", LIBRARY)
def test_the_library(name: str) -> None:
    begins(getattr(sde_diffusion, name), LIBRARY[name])


@pytest.mark.parametrize("name", SOLVERS)
def test_the_solvers(name: str) -> None:
    begins(getattr(solvers, name), SOLVERS[name])
    assert name in dir(solvers)


@pytest.mark.parametrize("function,text", METHODS, ids=lambda v: getattr(v, "__qualname__", ""))
def test_methods_and_functions(function: Callable[..., Any], text: str) -> None:
    begins(function, text)


@pytest.mark.parametrize(
    "name,first",
    [
        ("PredictorCorrector", ["predictor", "corrector"]),
        ("TorchdiffeqODE", ["method", "rtol", "atol"]),
        ("ScipyODE", ["method", "rtol", "atol"]),
        ("AdaptiveSDE", ["pair", "rtol", "atol", "max_steps"]),
    ],
)
def test_solvers_whose_defaults_are_free(name: str, first: list[str]) -> None:
    found = parameters(getattr(solvers, name))
    assert [parameter for parameter, _ in found][: len(first)] == first
    getattr(solvers, name)()


def test_sample_takes_what_it_took() -> None:
    arguments = (
        "score_fn, sde, solver, *, shape=None, x=None, steps=None, grid=None, seed=0, "
        "sample_ids=None, plan=None, noise=None, denoise=False, trajectory=False, dtype=0, "
        "device=None, compile=False, progress=False"
    )
    expected = [name for name, _ in called(arguments)]
    assert list(inspect.signature(solvers.sample).parameters)[: len(expected)] == expected


def test_records_have_their_fields() -> None:
    assert NoiseLevel._fields == ("t", "alpha", "sigma", "half_log_snr", "f", "g2")
    assert Step._fields[:3] == ("index", "start", "end")
    assert Stepped._fields[:3] == ("x", "state", "error")
    fields = ("x", "nfe", "network_passes", "times", "trajectory", "stats")
    assert set(fields) <= set(Solution.__dataclass_fields__)
    for name in ("x", "level", "x0", "eps", "score", "v"):
        assert hasattr(Prediction, name) or name in Prediction.__slots__


def test_two_names_of_one_solver() -> None:
    from solvers import EDMHeun, EDMStochasticHeun

    assert EDMStochasticHeun is EDMHeun
    assert EDMStochasticHeun(s_churn=10.0).stochastic
