"""diffusers' schedulers as Integrators: equal to ours where they are the same method, and ours in
what they are given: scores, noise, levels."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.metrics import energy_distance, median_distance
from experiments.spec import parse_solver, spec_of
from sde_diffusion import (
    EDMSDE,
    SDE,
    VESDE,
    VPSDE,
    CosineVPSDE,
    NoiseLevel,
    Prediction,
    SubVPSDE,
    TabulatedVPSDE,
    named_target,
)
from solvers import (
    DDIM,
    Ancestral,
    DPMSolverPP,
    Integrator,
    ProbabilityFlow,
    RecordedNoise,
    Solution,
    Solver,
    UniPC,
    catalogue,
    sample,
)
from solvers.adapters.diffusers_ import SCHEDULERS, diffusers_scheduler
from solvers.catalogue import named, peers, settings_of

pytest.importorskip("diffusers", reason="the extra 'peers' is not installed")
pytestmark = pytest.mark.filterwarnings("default")  # the library's own

# Their chains are float32: the product of 50 rounded factors (6e-8 each) moves alpha_bar by up to
# 3e-6, and the state by as much of its size.
FLOAT32_CHAIN = 1e-5
_HEUN = {"lower_order_final": False, "solver_type": "heun"}
_PUBLISHED_2M = parse_solver("tests.samplers:dpmpp_2m")


def assert_equal_to_their_rounding(found: Tensor, ours: Tensor) -> None:
    assert (found - ours).abs().max() < FLOAT32_CHAIN * ours.abs().max().clamp_min(1)


def score_fn(x: Tensor, level: NoiseLevel) -> Prediction:
    sigma = level.sigma.to(x.dtype)
    return Prediction.from_eps(x, level, torch.tanh(0.8 * x / (1 + sigma) + 0.1))


def start(scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return scale * torch.randn((5, 3), generator=generator, dtype=torch.float64)


def table(levels: int = 50) -> TabulatedVPSDE:
    return TabulatedVPSDE.from_betas(torch.linspace(2e-3, 0.2, levels, dtype=torch.float64))


def test_ddpm_is_ours_on_its_table() -> None:
    generator = torch.Generator().manual_seed(2)
    draws = list(torch.randn(49, 5, 3, generator=generator, dtype=torch.float64))
    found, ours = (
        sample(score_fn, table(), s, x=start(), steps=49, noise=RecordedNoise(draws))
        for s in (diffusers_scheduler("DDPMScheduler"), Ancestral())
    )
    assert_equal_to_their_rounding(found.x, ours.x)
    assert found.nfe == ours.nfe == 49


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_ours_on_its_thinned_table(eta: float) -> None:
    theirs = diffusers_scheduler("DDIMScheduler", eta=eta)
    assert theirs.stochastic is (eta > 0)
    found = sample(score_fn, table(), theirs, x=start(), steps=10, seed=4)
    times = (torch.tensor([*range(49, 0, -5), 0]) + 1.0).double() / 50
    ours = sample(score_fn, table(), DDIM(eta), x=start(), grid=times, seed=4)
    assert torch.allclose(found.times, ours.times, atol=1e-5)
    assert_equal_to_their_rounding(found.x, ours.x)


@pytest.mark.parametrize(
    "sde",
    [VPSDE(), CosineVPSDE(), SubVPSDE(t_min=0.02), VESDE(), EDMSDE()],
    ids=lambda s: type(s).__name__,
)
@pytest.mark.parametrize(
    "name",
    ["DDIMScheduler", "EulerDiscreteScheduler", "EDMEulerScheduler", "UniPCMultistepScheduler"],
)
def test_every_sde_is_served_in_every_convention(name: str, sde: SDE) -> None:
    """The state, the level and the output are converted rightly: first order is our DDIM on the
    scheduler's levels."""
    settings = {"solver_order": 1, "disable_corrector": tuple(range(30))} if "UniPC" in name else {}
    x = start(sde.prior_std().item())
    found = sample(score_fn, sde, diffusers_scheduler(name, **settings), x=x, steps=20)
    ours = sample(score_fn, sde, DDIM(), x=x, grid=found.times)
    # Schedulers that compute in float32 do so with states of the prior's size.
    assert (found.x - ours.x).abs().max() < 1e-3
    assert found.nfe == 20
    assert found.times[0] == sde.t_max
    assert found.times[-1] == sde.t_min


@pytest.mark.parametrize("sde", [VPSDE(), VESDE()], ids=["vp", "ve"])
@pytest.mark.parametrize(
    "name,settings,ours",
    [
        ("HeunDiscreteScheduler", {}, ProbabilityFlow("heun")),
        ("UniPCMultistepScheduler", {"lower_order_final": False}, UniPC(2)),
        # The default, "midpoint", is the algorithm as published: tests.samplers.dpmpp_2m.
        ("DPMSolverMultistepScheduler", _HEUN, DPMSolverPP(2)),
        ("DPMSolverMultistepScheduler", {"lower_order_final": False}, _PUBLISHED_2M),
    ],
)
def test_second_order_methods_are_ours_on_the_schedulers_levels(
    name: str, settings: dict[str, Any], ours: Solver | Integrator, sde: SDE
) -> None:
    score, shape = named_target("ring").score_fn(sde), (64, 2)
    theirs = diffusers_scheduler(name, use_exponential_sigmas=True, **settings)
    found = sample(score, sde, theirs, shape=shape, steps=20)
    same = sample(score, sde, ours, shape=shape, grid=found.times)
    fine = sample(score, sde, ProbabilityFlow("rk4"), shape=shape, steps=200, grid="log_snr")
    # Equal but for float32 and, in UniPC, the first step's corrector.
    assert median_distance(found.x, same.x) < 0.05 * median_distance(found.x, fine.x)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("sde", [VPSDE(), VESDE()], ids=["vp", "ve"])
def test_every_scheduler_reaches_the_ring(name: str, sde: SDE) -> None:
    target = named_target("ring")
    exact, _ = target.sample(1000, seed=1)
    solver = diffusers_scheduler(name)
    found = sample(target.score_fn(sde), sde, solver, shape=(1000, 2), steps=30)
    floor = energy_distance(target.sample(1000, seed=2)[0], exact)
    # The estimate's bias at equal laws is about 1e-3; a wrong convention costs 0.05 and more.
    assert energy_distance(found.x, exact) < floor + 5e-3
    assert float(found.stats["end_sigma_over_alpha"]) > 0
    again = sample(target.score_fn(sde), sde, solver, shape=(1000, 2), steps=30)
    assert torch.equal(found.x, again.x)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_few_steps_and_counted_evaluations(name: str) -> None:
    target, solver = named_target("ring"), diffusers_scheduler(name)
    for steps in (2, 3):
        calls: list[Tensor] = []

        def counted(x: Tensor, level: NoiseLevel, calls: list[Tensor] = calls) -> Prediction:
            calls.append(level.t)
            return target.score_fn(VPSDE())(x, level)

        found = sample(counted, VPSDE(), solver, shape=(4, 2), steps=steps)
        assert found.nfe == len(calls) >= steps
        assert bool(found.x.isfinite().all())


@pytest.mark.parametrize("name", [n for n, k in SCHEDULERS.items() if k.stochastic])
def test_the_noise_is_ours(name: str) -> None:
    target, sde = named_target("ring"), VPSDE()

    def run(seed: int, **options: object) -> Solution:
        solver = diffusers_scheduler(name)
        x = torch.ones(4, 2)
        return sample(target.score_fn(sde), sde, solver, x=x, steps=10, seed=seed, **options)  # type: ignore[arg-type]

    torch.manual_seed(0)
    first = run(1)
    torch.manual_seed(1)
    assert torch.equal(first.x, run(1).x)
    assert not torch.equal(first.x, run(2).x)
    # A sample's noise is its own, whatever its batch.
    assert torch.equal(first.x[2:].flip(0), run(1, sample_ids=[0, 1, 3, 2]).x[2:])


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler"]
)
def test_the_prediction_is_in_the_form_expected(name: str, prediction_type: str) -> None:
    if (name, prediction_type) == ("EulerDiscreteScheduler", "sample"):
        pytest.skip("EulerDiscreteScheduler does not take it")
    sde = VPSDE()
    found, default = (
        sample(score_fn, sde, diffusers_scheduler(name, **settings), x=start(), steps=10).x
        for settings in ({"prediction_type": prediction_type}, {})
    )
    assert torch.allclose(found, default, atol=1e-3)


def test_names_and_settings_as_text() -> None:
    text = "diffusers:DPMSolverMultistepScheduler:solver_order=3,use_karras_sigmas=True"
    solver = parse_solver(text)
    assert solver == diffusers_scheduler(
        "DPMSolverMultistepScheduler", solver_order=3, use_karras_sigmas=True
    )
    assert spec_of(solver) == text
    assert parse_solver(text.replace("True", "true")) == solver
    assert solver.order == 3
    assert type(parse_solver("diffusers:LMSDiscreteScheduler")) is named(
        "diffusers:LMSDiscreteScheduler"
    )
    assert pickle.loads(pickle.dumps(solver)) == solver  # noqa: S301
    assert settings_of(solver)["solver_order"] == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("diffusers:DPMSolverMultistep", "mean 'DPMSolverMultistepScheduler'.*Known: DDIM"),
        ("diffusers:", "unknown diffusers scheduler ''"),
        ("diffusers", "unknown diffusers scheduler|unknown solver"),
        ("diffusers:DDIMScheduler:etta=1", "unknown setting 'etta'. Did you mean 'eta'"),
        ("diffusers:DDIMScheduler:", "leave the colon out"),
        ("diffusers:DPMSolverMultistepScheduler:solver_type=hun", "Did you mean 'heun'"),
        (
            "diffusers:HeunDiscreteScheduler:use_karras_sigmas=true,use_beta_sigmas=true",
            "Only one of",
        ),
    ],
)
def test_text_that_is_no_scheduler_is_explained(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_solver(text)


def test_settings_in_python_are_checked() -> None:
    with pytest.raises(ValueError, match=r"unknown setting of DDIMScheduler 'etha'.*mean 'eta'"):
        diffusers_scheduler("DDIMScheduler", etha=1.0)
    with pytest.raises(ValueError, match=r"unknown setting .* 'beta_start'"):
        diffusers_scheduler("DDIMScheduler", beta_start=0.1)


def test_a_level_that_their_chain_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"alpha_bar in float32.*raise the SDE's t_min"):
        sample(score_fn, SubVPSDE(), diffusers_scheduler("DDIMScheduler"), x=start(), steps=5)


def test_listed_where_installed() -> None:
    assert set(peers()) == {f"diffusers:{name}" for name in SCHEDULERS}
    assert not set(peers()) & set(catalogue())


def test_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from solvers.adapters import diffusers_

    monkeypatch.setattr(diffusers_, "installed", lambda: False)
    diffusers_.scheduler_type.cache_clear()
    with pytest.raises(ImportError, match=r"sde-diffusion\[peers\]"):
        diffusers_scheduler("DDIMScheduler")
    with pytest.raises(ValueError, match=r"sde-diffusion\[peers\]"):
        parse_solver("diffusers:DDIMScheduler")


def test_in_a_comparison(tmp_path: Path) -> None:
    from experiments.compare import CompareOptions, make_plan, run

    class Silent:
        def start(self, total: float) -> None: ...
        def now(self, what: str) -> None: ...
        def done(self, amount: float) -> None: ...

    options = CompareOptions(
        targets=["ring"],
        sdes=["vp"],
        solvers=["diffusers:UniPCMultistepScheduler:solver_order=3", "ddim"],
        budgets=[10],
        samples=200,
        repeats=1,
        out=str(tmp_path / "run"),
    )
    rows = run(make_plan(options), Silent()).folder.rows
    assert [row["solver"] for row in rows] == ["diffusers:UniPCMultistepScheduler", "ddim"]
    assert [row["nfe"] for row in rows] == [10, 10]
