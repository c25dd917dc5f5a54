"""Solvers as text, in both directions, and what is said of text that is not one."""

from __future__ import annotations

import pytest

from experiments.spec import parse_solver, spec_of
from solvers import (
    DDIM,
    Ancestral,
    EulerMaruyama,
    Langevin,
    PredictorCorrector,
    ProbabilityFlow,
    catalogue,
)

NESTED = "predictor_corrector:predictor=euler_maruyama(eta=0.5),corrector=langevin(snr=0.1,steps=2)"


@pytest.mark.parametrize(
    ("text", "solver"),
    [
        ("ancestral", Ancestral()),
        ("ancestral:eta=0.5", Ancestral(eta=0.5)),
        ("ancestral:eta=0,variance=large", Ancestral(eta=0.0, variance="large")),
        (" ddim ", DDIM()),
        ("probability_flow:method=rk4", ProbabilityFlow("rk4")),
        ("probability_flow(method=rk4)", ProbabilityFlow("rk4")),
        (NESTED, PredictorCorrector(EulerMaruyama(0.5), Langevin(snr=0.1, steps=2))),
    ],
)
def test_text_becomes_the_solver(text: str, solver: object) -> None:
    assert parse_solver(text) == solver


@pytest.mark.parametrize("text", [NESTED, "ancestral:eta=0.5", "probability_flow", "ddim"])
def test_solver_becomes_the_shortest_text(text: str) -> None:
    assert spec_of(parse_solver(text)) == text


def test_every_solver_of_the_catalogue_has_a_text() -> None:
    for name, entry in catalogue().items():
        if entry.kind != "corrector":
            solver = parse_solver(name)
            assert type(solver) is entry.type
            assert spec_of(solver) == name


def test_a_default_given_explicitly_is_left_out_of_the_text() -> None:
    assert spec_of(parse_solver("probability_flow:method=heun")) == "probability_flow"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("probability_flwo", "Did you mean 'probability_flow'.*Known: .*ancestral"),
        ("", "unknown solver ''"),
        ("ancestral:etta=1", "unknown setting 'etta'. Did you mean 'eta'.*Known: eta, variance"),
        ("ancestral:eta=two", "eta must be a number, got 'two'"),
        ("ancestral:eta=2", r"eta must lie in \[0, 1\], got 2.0"),
        ("ancestral:variance=lrge", "Did you mean 'large'"),
        ("ancestral:eta", "written key=value, got 'eta'"),
        ("ancestral:", "leave the colon out"),
        ("ancestral:eta=1,eta=0", "'eta' is given twice"),
        ("langevin", "is a corrector.*predictor_corrector:corrector=langevin"),
        ("predictor_corrector:corrector=ancestral", "must be a corrector.*one of .*langevin"),
        ("predictor_corrector:corrector=langevin(steps=1.5)", "steps must be a whole number"),
        ("predictor_corrector:corrector=langevin(steps=1", "parentheses"),
        ("predictor_corrector:predictor=nope", "unknown solver 'nope'"),
    ],
)
def test_text_that_is_no_solver_is_explained(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_solver(text)
