"""diffusers' schedulers in the table of certificates: measured as they come, and never ours to
answer for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from experiments.certify import candidates, orders
from experiments.certify.bench import Bench
from experiments.certify.candidates import Candidate, named_candidate, peer_candidates
from experiments.certify.certificate import QUICK, Certificate
from experiments.cli import app
from solvers.adapters.diffusers_ import SCHEDULERS, diffusers_scheduler, installed
from solvers.catalogue import is_peer

needs_diffusers = pytest.mark.skipif(not installed(), reason="the extra 'peers' is not installed")
pytestmark = pytest.mark.filterwarnings("default")  # the library's own
BENCH = Bench()


def certificate_of(name: str, **settings: Any) -> Certificate:
    solver = diffusers_scheduler(name, **settings)
    return orders.certify(Candidate(name, solver), BENCH, QUICK)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["orders", *arguments])


def test_without_diffusers_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(candidates, "catalogued_peers", dict)
    done = run("--peers")
    assert done.exit_code == 2
    assert "--peers needs diffusers: install the extra 'peers'" in done.stderr
    assert not list(tmp_path.iterdir())


@needs_diffusers
def test_every_scheduler_is_a_candidate_in_its_orders() -> None:
    made = peer_candidates()
    assert {c.name.split(":")[1] for c in made} == set(SCHEDULERS)
    assert len(peer_candidates(quick=True)) == len(SCHEDULERS)
    assert all(is_peer(c.solver) for c in made)
    orders_of_unipc = {c.solver.order for c in made if "UniPC" in c.name}
    assert orders_of_unipc == {1, 2, 3}
    found = named_candidate("diffusers:LMSDiscreteScheduler:order=3")
    assert found.solver == diffusers_scheduler("LMSDiscreteScheduler", order=3)
    assert not is_peer(named_candidate("ddim").solver)


@needs_diffusers
@pytest.mark.parametrize("order,expected", [(1, 1.0), (2, 2.0), (3, 2.0)])
def test_multistep_orders_are_as_measured_elsewhere(order: int, expected: float) -> None:
    """Its third order lacks a factor 2 in the second difference and is 2 (``WithoutTheFactorTwo``
    in test_certificates.py is the same slip in ours): a known answer, on smooth times."""
    certificate = certificate_of(
        "DPMSolverMultistepScheduler", solver_order=order, use_karras_sigmas=True
    )
    check = certificate.get("uneven")
    assert check is not None
    assert float(check.measured) == pytest.approx(expected, abs=0.3)
    assert check.passed is (order < 3)
    assert certificate.peer
    assert {c.key for c in certificate.checks} == {"uneven", "limit", "nfe", "split", "short"}


@needs_diffusers
def test_weak_order_of_a_stochastic_scheduler() -> None:
    certificate = certificate_of("EulerAncestralDiscreteScheduler")
    check = certificate.get("uneven")
    assert check is not None
    assert check.declared == "1"
    assert check.passed is not None
    assert certificate.get("split").passed  # type: ignore[union-attr]


@needs_diffusers
def test_what_raises_is_a_miss_and_not_the_end_of_the_run() -> None:
    certificate = certificate_of("DPMSolverMultistepScheduler", prediction_type="flow_prediction")
    assert not certificate.passed
    raised = [check for check in certificate.checks if check.measured == "raised"]
    assert len(raised) == len(certificate.checks) == 4
    assert "has no meaning" in raised[0].note


@needs_diffusers
def test_a_peers_miss_is_shown_and_leaves_the_exit_code_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    third = "diffusers:DPMSolverMultistepScheduler:solver_order=3,use_karras_sigmas=true"
    done = run("--quick", "--solver", third, "--solver", "ddim", "--out", "kept")
    assert done.exit_code == 0, done.output
    assert "1 certified, all pass" in done.stdout
    assert "1 of diffusers measured, 1 miss something" in done.stdout
    assert "FAIL" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 112
    written = json.loads((tmp_path / "kept" / "orders.json").read_text())
    assert written["passed"] is True
    assert [(c["peer"], c["passed"]) for c in written["certificates"]] == [
        (True, False),
        (False, True),
    ]
