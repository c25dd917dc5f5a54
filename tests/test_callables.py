"""A user's samplers by their import path: beside ours, on our scores, noise and counting."""

from __future__ import annotations

import copy
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from experiments.cells import cell_key
from experiments.cli import app
from experiments.conditions import Condition
from experiments.spec import parse_solver, spec_of
from experiments.subjects import ExactSubject
from sde_diffusion import EDMSDE, SDE, VESDE, VPSDE, NonFiniteError, SubVPSDE, named_target
from solvers import (
    DDIM,
    BrownianPath,
    DPMSolverPP,
    EDMHeun,
    Integrator,
    ProbabilityFlow,
    Solver,
    grids,
    sample,
)

HERE = "tests.samplers"
# Both sides do the same arithmetic in another order; the state's scale is sigma_max at most.
ROUNDING = 1e-11


def mine(text: str) -> Any:
    return parse_solver(f"{HERE}:{text}")


def drawn(solver: Solver | Integrator, sde: SDE, n: int = 20, **options: Any) -> torch.Tensor:
    given: dict[str, Any] = {"shape": (n, 2), "steps": 12, "seed": 3, "dtype": torch.float64}
    return sample(named_target("moons").score_fn(sde), sde, solver, **given | options).x


@pytest.mark.parametrize(
    "sde", [VPSDE(), SubVPSDE(), VESDE(), EDMSDE()], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize(
    ("text", "ours"),
    [
        ("euler", DDIM()),
        ("heun", EDMHeun()),
        ("ancestral", DDIM(eta=1.0)),
        ("ancestral:eta=0.5", DDIM(eta=0.5)),
        ("with_randn_like", DDIM(eta=1.0)),
        ("own_terms", DDIM()),
        ("dpmpp_2m:weight=integral", DPMSolverPP(2)),
    ],
)
def test_the_same_method_gives_the_same_samples(sde: SDE, text: str, ours: Solver) -> None:
    a, b = drawn(mine(text), sde), drawn(ours, sde)
    torch.testing.assert_close(a, b, rtol=ROUNDING, atol=ROUNDING * float(sde.prior_std()))


@pytest.mark.parametrize("sde", [VPSDE(), VESDE()], ids=["vp", "ve"])
def test_published_2m_differs_from_ours_by_one_weight(sde: SDE) -> None:
    """Two steps, so that both have the same evaluations: what is apart is the second step's weight
    of the slope of x0, ``h - 1 + e^(-h)`` here and ``h/2 (1 - e^(-h))`` as published."""
    score, times = named_target("moons").score_fn(sde), grids.resolve("log_snr", sde, 16)[6:9]
    levels = [sde.at(t) for t in times]
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x * levels[0].sigma + levels[0].alpha
    inside = sample(score, sde, DDIM(), x=x, grid=times[:2]).x
    last_h, h = (float(b.half_log_snr - a.half_log_snr) for a, b in itertools.pairwise(levels))
    slope = (score(inside, levels[1]).x0 - score(x, levels[0]).x0) / last_h
    weights = h + math.expm1(-h), -0.5 * h * math.expm1(-h)
    solvers = DPMSolverPP(2), mine("dpmpp_2m")
    ours, published = (sample(score, sde, solver, x=x, grid=times).x for solver in solvers)
    assert (ours - published).abs().max() > 1e-3
    expected = levels[2].alpha * (weights[0] - weights[1]) * slope
    torch.testing.assert_close(ours - published, expected, rtol=0, atol=ROUNDING)


def test_published_2m_and_ours_are_methods_of_one_order_and_limit() -> None:
    """And the published one's error is the smaller, by about two thirds: in the median, for of 16
    steps on a mixture a difference now and then decides for another mode."""
    sde, errors = VPSDE(), []
    fine = drawn(ProbabilityFlow("rk4"), sde, 100, steps=400, grid="log_snr")
    for solver in (DPMSolverPP(2), mine("dpmpp_2m")):
        ends = [drawn(solver, sde, 100, steps=n, grid="log_snr") for n in (16, 64, 128)]
        errors.append([float((end - fine).abs().amax(1).median()) for end in ends])
    for found in errors:
        assert found[1] / found[2] > 2 ** (2 - 0.25)
        assert found[2] < 1e-3
    assert [0.5 < b / a < 0.8 for a, b in zip(*errors, strict=True)] == [True] * 3


def test_what_is_known_of_a_function() -> None:
    found = {
        text: (s.order, s.stochastic, s.depends_on_batch, s.adaptive)
        for text in ("euler", "heun", "ancestral", "ancestral:eta=0", "with_randn_like",
                     "with_generator", "own_terms", "own_terms:stir=true")
        for s in [mine(text)]
    }  # fmt: skip
    assert found == {
        "euler": (0, False, False, False),
        "heun": (2, False, False, False),
        "ancestral": (0, True, False, False),
        "ancestral:eta=0": (0, False, False, False),  # it asks for noise, and multiplies it by 0
        "with_randn_like": (0, True, False, False),
        "with_generator": (0, True, True, False),
        "own_terms": (0, False, False, False),
        "own_terms:stir=true": (0, True, False, False),
    }


@pytest.mark.parametrize("text", ["euler", "ancestral", "with_randn_like", "own_terms:stir=true"])
def test_a_sample_does_not_depend_on_its_batch(text: str) -> None:
    whole = drawn(mine(text), VPSDE())
    parts = [drawn(mine(text), VPSDE(), len(p), sample_ids=p) for p in torch.arange(20).split(7)]
    assert torch.equal(whole, torch.cat(parts))


def test_torchs_generator_is_seeded_and_left_as_it_was() -> None:
    before = torch.get_rng_state()
    first, again = (drawn(mine("with_generator"), VPSDE()) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, drawn(mine("with_generator"), VPSDE(), seed=4))
    part = drawn(mine("with_generator"), VPSDE(), 7)
    assert not torch.allclose(first[:7], part)  # which is what depends_on_batch says


def test_noise_may_be_a_brownian_path() -> None:
    sde = VPSDE()
    for text, ours in (("ancestral", DDIM(eta=1.0)),):
        a, b = (drawn(s, sde, noise=BrownianPath(sde, 0)) for s in (mine(text), ours))
        torch.testing.assert_close(a, b, rtol=ROUNDING, atol=ROUNDING)


def test_evaluations_are_counted_at_the_model() -> None:
    sde = VPSDE()
    score = named_target("ring").score_fn(sde)
    counts = [
        sample(score, sde, mine(text), shape=(3, 2), steps=5).nfe
        for text in ("euler", "heun", "euler:append_zero=true", "own_terms")
    ]
    assert counts == [5, 10, 6, 5]


def test_an_appended_zero_is_the_final_denoise() -> None:
    sde = VPSDE()
    a = drawn(mine("euler:append_zero=true"), sde)
    b = drawn(DDIM(), sde, denoise=True)  # Euler's step to 0 ends at the estimate of x0
    torch.testing.assert_close(a, b, rtol=ROUNDING, atol=ROUNDING)
    # So does the second-order step, of order 1 where it goes to 0: log-SNR has no end there.
    a = drawn(mine("dpmpp_2m:weight=integral,append_zero=true"), sde)
    b = drawn(DPMSolverPP(2), sde, denoise=True)
    torch.testing.assert_close(a, b, rtol=ROUNDING, atol=ROUNDING)


def test_text_and_pickle_bring_the_solver_back() -> None:
    for text in ("euler", "ancestral:eta=0.5", "euler:append_zero=True"):
        solver = mine(text)
        assert spec_of(solver) == f"{HERE}:{text}"
        again = copy.copy(solver)  # by the same __reduce__ as processes are given it
        assert again == solver == parse_solver(spec_of(solver))
        assert type(again) is type(solver)
    assert mine("euler") != mine("heun")
    nested = "predictor_corrector:predictor=tests.misbehaving:Raises(eta=0.5)"
    assert spec_of(parse_solver(nested)) == nested


def test_an_edited_file_is_another_solver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = ExactSubject("ring", ["vp"])

    def key(text: str) -> str:
        return cell_key("cell", subject, "vp", Condition(), parse_solver(text))

    body = "def sampler(model, x, sigmas):\n    return model(x, sigmas[0]) * {}\n"
    (tmp_path / "once_edited.py").write_text(body.format(1))
    (tmp_path / "twice_edited.py").write_text(body.format(2))
    monkeypatch.syspath_prepend(tmp_path)
    assert key("once_edited:sampler") != key("twice_edited:sampler")
    assert key(f"{HERE}:euler") == key(f"{HERE}:euler")
    assert key(f"{HERE}:ancestral") != key(f"{HERE}:ancestral:eta=0.5")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere:sampler", "'nowhere' cannot be imported from here.*catalogue"),
        (f"{HERE}:eulr", "unknown name 'eulr'. Did you mean 'euler'"),
        (f"{HERE}:number", "number is not a solver; derive it from solvers.Solver, or name a func"),
        (f"{HERE}:of_another_form", r"must be given \(model, x\); name a function called \(model"),
        (f"{HERE}:ancestral:etta=1", "unknown setting 'etta'. Did you mean 'eta'"),
        (f"{HERE}:ancestral:eta=much", "eta must be a"),
        (f"{HERE}:euler:callback=1", "unknown setting 'callback'"),
        ("solvers:Langevin", "is a corrector"),
    ],
)
def test_what_is_no_sampler_is_explained(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_solver(text)


def test_wrong_results_are_refused() -> None:
    with pytest.raises(NonFiniteError, match="gives_nan returned NaN"):
        drawn(mine("gives_nan"), VPSDE())
    with pytest.raises(TypeError, match=r"must return the state.*\(20, 2\), got \(20, 1\)"):
        drawn(mine("gives_another_shape"), VPSDE())


def test_compare_goes_on_beside_samplers_that_fail(tmp_path: Path) -> None:
    names = ["euler", "raises", "gives_nan", "hangs", "with_generator"]
    command = ["compare", "--target", "ring", "--sde", "vp", "--nfe", "6", "--solver", "ddim"]
    command += [part for name in names for part in ("--solver", f"{HERE}:{name}")]
    command += ["--samples", "20", "--repeats", "1", "--cell-timeout", "3", "--jobs", "1"]
    done = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "run")])
    assert done.exit_code == 3, done.output
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    found = {row["spec"]: (row["status"], row["nfe"], row["error"]) for row in rows}
    assert found["ddim"] == ("ok", 6, "")
    assert found[f"{HERE}:euler"] == ("ok", 6, "")
    assert found[f"{HERE}:with_generator"] == ("ok", 6, "")
    assert found[f"{HERE}:raises"][::2] == ("failed", "KeyError: 'no such thing'")
    assert found[f"{HERE}:gives_nan"][0] == "failed"
    assert "returned NaN" in found[f"{HERE}:gives_nan"][2]
    assert found[f"{HERE}:hangs"][0] == "timeout"
    metrics = {row["spec"]: row["metrics"] for row in rows}
    # Equal to rounding in float32, so that the energy distances are as near.
    energies = [metrics[s]["energy"]["value"] for s in ("ddim", f"{HERE}:euler")]
    assert energies[0] == pytest.approx(energies[1], rel=1e-3, abs=1e-5)
    labels = {row["spec"]: row["solver_label"] for row in rows}
    assert labels[f"{HERE}:with_generator"].endswith("(depends on its batch)")


def test_sample_and_steps_take_them(tmp_path: Path) -> None:
    run = CliRunner().invoke
    common = ["--target", "ring", "--sde", "vp", "--solver", f"{HERE}:euler"]
    done = run(app, ["sample", *common, "-n", "5", "--nfe", "6", "--out", str(tmp_path / "s")])
    assert done.exit_code == 0, done.output
    done = run(app, ["steps", *common, "--steps", "16,32,64", "--out", str(tmp_path / "t")])
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "t" / "results.json").read_text())["rows"]
    errors = [row["metrics"]["error"]["value"] for row in rows]
    assert errors[1] / errors[2] > 1.7  # Euler's is of order 1


def test_a_sampler_of_images_is_measured_on_images() -> None:
    from experiments.planning import steps_within

    assert steps_within(mine("images_only"), 7, False, event_shape=(1, 8, 8)) == 7


def test_levels_may_differ_by_sample_and_end_with_the_sde() -> None:
    drawn(mine("asks_around"), VPSDE(), 4)
    with pytest.raises(NonFiniteError, match="asked for the score at sigma = nan"):
        drawn(mine("asks_nowhere"), VPSDE())
