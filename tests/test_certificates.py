"""Certificates: every solver of the catalogue earns one, and deliberately wrong solvers do not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from experiments.certify import orders
from experiments.certify.accuracy import flow_order
from experiments.certify.bench import Bench
from experiments.certify.candidates import Candidate, catalogue_candidates, named_candidate
from experiments.certify.certificate import QUICK, Certificate
from experiments.certify.convergence import converge
from experiments.cli import app
from solvers import (
    DEIS,
    DormandPrince,
    DPMSolverPP,
    EulerMaruyama,
    Langevin,
    PredictorCorrector,
    Solver,
    Step,
    Stepped,
    catalogue,
)
from solvers.methods.embedded_pairs import DORMAND_PRINCE
from tests.problems import uniform_grid

CANDIDATES = {candidate.name: candidate for candidate in catalogue_candidates()}
BENCH = Bench()


@cache
def certificate_of(solver: Solver) -> Certificate:
    return orders.certify(Candidate(type(solver).__name__, solver), BENCH, QUICK)


def failed(certificate: Certificate) -> dict[str, str]:
    return {check.key: check.measured for check in certificate.checks if check.passed is False}


@pytest.mark.parametrize("name", CANDIDATES)
def test_every_solver_of_the_catalogue_earns_its_certificate(name: str) -> None:
    certificate = orders.certify(CANDIDATES[name], BENCH, QUICK)
    assert failed(certificate) == {}
    assert {check.key for check in certificate.checks} >= {"limit", "nfe", "split", "short"}


def test_candidates_are_the_catalogue_in_every_order() -> None:
    families = {name.partition(":")[0] for name in CANDIDATES}
    assert families == {n for n, entry in catalogue().items() if entry.kind != "corrector"}
    for made in ("deis:order=4", "uni_pc:order=2,variant=bh1", "dpm_solver_pp:order=3,eta=1"):
        assert made in CANDIDATES
    quick = catalogue_candidates(quick=True)
    assert len(quick) == len(families)


def test_the_stochastic_multistep_method_declares_what_it_can_keep() -> None:
    assert [DPMSolverPP(k, 1.0).weak_order for k in (1, 2, 3)] == [1, 2, 2]
    assert DPMSolverPP(3).weak_order == 3
    assert EulerMaruyama().weak_order == 1


# --- solvers that are wrong on purpose -----------------------------------------------------------


@dataclass(frozen=True)
class SigmaAtTheWrongEnd(DEIS):
    """The factor of an exponential step's integral is the sigma of its start, not of its end."""

    def coefficients(self, step: Step) -> Any:
        propagators, weights, repair = super().coefficients(step)
        slip = step.start.sigma / step.end.sigma
        return propagators, tuple(weight * slip for weight in weights), repair


@dataclass(frozen=True)
class WithoutTheFactorTwo(DPMSolverPP):
    """Third order with half the second difference's weight (Lu et al.'s code)."""

    order: int = 3

    def _integrals(self, nodes: Any, lower: Any, upper: Any, end: Any) -> Any:
        full = super()._integrals(nodes, lower, upper, end)
        if len(nodes) < 3:
            return full
        two = super()._integrals(nodes[:2], lower, upper, end)
        two = torch.cat([two, torch.zeros_like(two[:1])])
        return 0.5 * (full + two)


@dataclass(frozen=True)
class EulerByTheWrongStep(EulerMaruyama):
    """Euler-Maruyama with dt = -1/N on times that are (T - t_min)/(N - 1) apart."""

    def coefficients(self, step: Step) -> Any:
        start = step.start
        h = torch.full_like(start.t, 1 / (start.t.numel() + 1))
        pull = -0.5 * (1 + self.eta**2) * start.g2 * h / start.sigma
        return 1 - start.f * h, pull, self.eta * torch.sqrt(start.g2 * h)


@dataclass(frozen=True)
class NoiseOfTheBatch(EulerMaruyama):
    """Draws for the whole batch at once, so that a sample's noise depends on where it stands."""

    def step(self, score_fn: Any, x: Any, step: Any, state: Any, noise: Any) -> Stepped:
        generator = torch.Generator().manual_seed(step.index)
        z = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        return super().step(score_fn, x, step, state, lambda *_: z)


@dataclass(frozen=True)
class HiddenEvaluations(EulerMaruyama):
    """Evaluates past the count."""

    def step(self, score_fn: Any, x: Any, step: Any, state: Any, noise: Any) -> Stepped:
        score_fn.score_fn(x, step.start)
        return super().step(score_fn, x, step, state, noise)


@dataclass(frozen=True)
class NotForOneStep(EulerMaruyama):
    """Needs a second step, as some libraries' multistep methods do."""

    def coefficients(self, step: Step) -> Any:
        _ = step.start.t.diff()[0]
        return super().coefficients(step)


@dataclass(frozen=True)
class WrongLimit(EulerMaruyama):
    """Order 1 towards a law that is a third too narrow."""

    def coefficients(self, step: Step) -> Any:
        keep, pull, spread = super().coefficients(step)
        return keep, pull, 0.8 * spread


@dataclass(frozen=True)
class Overdeclared(EulerMaruyama):
    """Euler that calls itself a method of order 2."""

    eta: float = 0.0
    order = 2


WRONG: dict[str, tuple[Solver, set[str]]] = {
    "sigma at the wrong end": (SigmaAtTheWrongEnd(2), {"uniform", "uneven"}),
    "no factor 2": (WithoutTheFactorTwo(), {"uniform", "uneven", "start"}),
    "dt = -1/N": (EulerByTheWrongStep(), {"uneven"}),
    "dt = -1/N, ODE": (EulerByTheWrongStep(0.0), {"uneven"}),
    "noise of the batch": (NoiseOfTheBatch(), {"split"}),
    "norm over the batch": (PredictorCorrector(corrector=Langevin(norm="batch")), {"split"}),
    "hidden evaluations": (HiddenEvaluations(), {"nfe"}),
    "one step": (NotForOneStep(), {"short"}),
    "wrong limit": (WrongLimit(), {"uniform", "uneven", "limit"}),
    "overdeclared": (Overdeclared(), {"uniform", "uneven", "start"}),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_solver_is_caught_and_for_the_right_reason(name: str) -> None:
    solver, expected = WRONG[name]
    certificate = certificate_of(solver)
    assert not certificate.passed
    assert expected <= set(failed(certificate)), failed(certificate)


def test_the_wrong_second_difference_shows_as_order_two() -> None:
    check = certificate_of(WithoutTheFactorTwo()).get("uneven")
    assert check is not None
    assert 1.7 < float(check.measured) < 2.3


@dataclass(frozen=True)
class SlippedRow(DormandPrince):
    """Dormand & Prince's pair with one part in ten thousand moved within an inner row."""

    pair = DORMAND_PRINCE._replace(
        rows=(
            *DORMAND_PRINCE.rows[:2],
            (44 / 45, -56 / 15 * 1.0001, 32 / 9 + 56 / 15 * 0.0001),
            *DORMAND_PRINCE.rows[3:],
        )
    )


def test_order_five_is_told_from_a_slip_in_the_fifth_digit() -> None:
    """On the closed-form problem of the high orders, where the true pair measures 5."""
    sizes = replace(QUICK, flows=(("gaussian", "ve"),), most=480)
    measured = {
        type(solver): [c for c in flow_order(solver, BENCH, sizes) if c.key != "limit"]
        for solver in (DormandPrince(), SlippedRow())
    }
    for check in measured[DormandPrince]:
        assert float(check.measured) == pytest.approx(5, abs=0.25)  # as the certificate asks
    assert all(check.passed is False for check in measured[SlippedRow])


# --- the fit -------------------------------------------------------------------------------------


def fitted(error_at: Callable[[int], float], declared: float) -> tuple[float | None, int]:
    curve = converge(error_at, "made up", declared, QUICK)
    return curve.slope, curve.steps[-1]


def test_slopes_are_those_of_the_finest_grids_above_rounding() -> None:
    slope, last = fitted(lambda n: n**-2.0 + 1e3 * n**-4.0, 2)
    assert slope == pytest.approx(2, abs=0.25)
    # A lower order that shows only on fine grids is seen: a miss refines, to the most there is.
    slope, last = fitted(lambda n: 1e-2 * n**-2.0 + n**-3.0, 3)
    assert slope is not None
    assert slope < 2.75
    assert last == 1440
    # Down at rounding, coarser grids speak; an exact method has no slope and passes.
    slope, _ = fitted(lambda n: n**-6.0 + 1e-15, 4)
    assert slope == pytest.approx(6, abs=0.3)
    assert fitted(lambda n: 1e-15, 4)[0] is None
    assert fitted(lambda n: float("nan"), 4)[0] == -float("inf")


def test_shared_paths_are_one_path() -> None:
    paths = BENCH.paths("vp")
    levels = paths.sde.at(uniform_grid(paths.sde, 256))
    increments = []
    for count in (32, 256):
        step = 256 // count
        total = 0.0
        for k in range(0, 256, step):
            start, end = (levels.map(lambda f, i=i: f[i]) for i in (k, k + step))
            span = start.sigma_over_alpha**2 - end.sigma_over_alpha**2
            total = total + span.sqrt() * paths.noise(paths.x, Step(k // step, start, end))
        increments.append(total)
    assert torch.allclose(*increments, rtol=1e-12)


def test_a_part_of_shared_paths_has_their_noise() -> None:
    paths, part = BENCH.paths("vp"), torch.tensor([40, 3, 17])
    times = uniform_grid(paths.sde, 256)
    step = Step(3, *(paths.sde.at(float(times[k])) for k in (96, 128)))
    some = paths.noise.select(part)
    for slot in (0, 1):
        assert torch.equal(some(paths.x[part], step, slot), paths.noise(paths.x, step, slot)[part])
    assert torch.equal(some.prior(paths.x[part]), paths.noise.prior(paths.x)[part])
    again = some.select(torch.tensor([2]))
    assert torch.equal(again(paths.x[[17]], step), paths.noise(paths.x, step)[[17]])


# --- the command ---------------------------------------------------------------------------------

MINE = """
from solvers import DDIM, EulerMaruyama, Langevin

class Mine(DDIM):
    '''Good.'''

class Boast(EulerMaruyama):
    '''Not so good.'''
    order = 3

Corrector = Langevin
number = 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_certified.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["orders", *arguments])


def test_a_users_own_class(here: Path) -> None:
    done = run("--solver", "my_certified:Mine", "--quick", "--out", "mine")
    assert done.exit_code == 0, done.output
    assert "1 certified, all pass" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 110
    written = json.loads((here / "mine" / "orders.json").read_text())
    assert written["status"] == "finished"
    assert written["passed"] is True
    assert written["environment"]["versions"]["torch"] == torch.__version__
    (certificate,) = written["certificates"]
    assert certificate["name"] == "my_certified:Mine"
    assert {check["key"] for check in certificate["checks"]} >= {"uniform", "uneven", "limit"}
    assert (here / "mine" / "orders.png").stat().st_size > 10_000
    bad = run("--solver", "my_certified:Boast:eta=0", "--quick", "--out", "mine")
    assert bad.exit_code == 1
    assert "FAIL" in bad.stdout
    assert "1 fail: my_certified:Boast:eta=0" in bad.stdout
    assert json.loads((here / "mine" / "orders.json").read_text())["passed"] is False


@pytest.mark.parametrize(
    "text,message",
    [
        ("ddimm", "unknown solver 'ddimm'"),
        ("nowhere:Mine", "'nowhere' cannot be imported from here"),
        ("my_certified:Mein", "unknown name 'Mein'. Did you mean 'Mine'"),
        ("my_certified:number", "my_certified:number is not a solver"),
        ("my_certified:Corrector", "is a corrector and does not sample by itself"),
        ("my_certified:Mine:eta=7", r"eta must lie in [0, 1], got 7"),
        ("my_certified:Mine:etta=0", "unknown setting 'etta'"),
        ("solvers:Solver", "solvers:Solver lacks"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_two(here: Path, text: str, message: str) -> None:
    done = run("--solver", text)
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (here / "runs").exists()


def test_ctrl_c_keeps_what_is_finished(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = orders.certify

    def certify(candidate: Candidate, *others: Any) -> Certificate:
        if candidate.name == "hold":
            raise KeyboardInterrupt
        return real(candidate, *others)

    monkeypatch.setattr(orders, "certify", certify)
    done = run("--solver", "ddim", "--solver", "hold", "--quick", "--out", "stopped")
    assert done.exit_code == 130
    assert "interrupted at hold; 1 certificates are kept in stopped/orders.json" in done.stderr
    written = json.loads((here / "stopped" / "orders.json").read_text())
    assert written["status"] == "interrupted"
    assert [c["name"] for c in written["certificates"]] == ["ddim"]


def test_an_exception_inside_a_solver_is_its_failure() -> None:
    @dataclass(frozen=True)
    class Raises(EulerMaruyama):
        def step(self, *arguments: Any) -> Stepped:
            raise RuntimeError("not today")

    certificate = certificate_of(Raises())
    assert not certificate.passed
    assert all("not today" in check.note for check in certificate.checks)


def test_a_solver_that_is_not_affine_is_judged_by_samples() -> None:
    @dataclass(frozen=True)
    class Curved(EulerMaruyama):
        def step(self, score_fn: Any, x: Any, step: Any, state: Any, noise: Any) -> Stepped:
            stepped = super().step(score_fn, x, step, state, noise)
            h = step.start.t - step.end.t
            return Stepped(stepped.x + 1e-3 * h * torch.tanh(x), state)

    certificate = certificate_of(Curved())
    check = certificate.get("uniform")
    assert check is not None
    assert check.passed is None
    assert "not affine" in check.note
    assert certificate.get("limit") is not None
    assert named_candidate("ddim").solver == CANDIDATES["ddim"].solver
