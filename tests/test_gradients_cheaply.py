"""Gradients with little memory, by checkpoints and by adjoint equations: against plain autograd and
closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from sde_diffusion import (
    SDE,
    VPSDE,
    EpsModel,
    NoiseLevel,
    Prediction,
    classifier_free_guided,
    named_target,
)
from sde_diffusion.prediction import ScoreFn
from solvers import (
    DPMSolverPP,
    EulerMaruyama,
    Integrator,
    PredictorCorrector,
    ProbabilityFlow,
    Restart,
    ScipyODE,
    Solver,
    TorchdiffeqODE,
    TorchsdeSDE,
    UniPC,
    sample,
)
from tests.problems import SDES, GaussianProblem, IsotropicScore, fitted_order

RING = named_target("ring")
LABELS = torch.tensor([0, 3, 5])
NATIVE: list[Solver] = [
    ProbabilityFlow("heun"),
    DPMSolverPP(3),
    UniPC(3),
    EulerMaruyama(),
    DPMSolverPP(2, eta=1.0),
    PredictorCorrector(),
]


class Net(nn.Module):
    null_label = 8

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.inner = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.inner(torch.cat([x, t[:, None], 0.1 * label[:, None].to(x)], 1))


def state(count: int = 3, sde: SDE | None = None) -> Tensor:
    x = torch.randn(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x if sde is None else x * sde.prior_std()


def gradients_of(solver: Solver | Integrator, mode: Any, **settings: Any) -> list[Tensor]:
    """Of one loss, with respect to x_T, one guidance scale per sample, and a network's weights."""
    sde, net = VPSDE(), Net()
    x = state().requires_grad_()
    scale = torch.tensor([1.5, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    guided = classifier_free_guided(EpsModel(net, sde), LABELS, scale)
    run = sample(guided, sde, solver, x=x, seed=1, gradients=mode, **settings)
    run.x.square().sum().backward()  # type: ignore[no-untyped-call]
    found = [x.grad, scale.grad, *(parameter.grad for parameter in net.parameters())]
    assert all(gradient is not None and bool(gradient.any()) for gradient in found)
    return [gradient for gradient in found if gradient is not None]


def furthest(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference of any gradient, relative to that gradient's length."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


# --- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", NATIVE, ids=repr)
@pytest.mark.parametrize("steps", [1, 2, 11])
def test_checkpoints_give_the_plain_gradient(solver: Solver, steps: int) -> None:
    """The same operations on the same numbers; only sums of gradients may be taken in another
    order."""
    plain = gradients_of(solver, True, steps=steps)
    assert furthest(gradients_of(solver, "checkpoint", steps=steps), plain) < 1e-12


def test_checkpoints_under_restarts_and_with_a_trajectory() -> None:
    settings: dict[str, Any] = {
        "steps": 9, "plan": Restart([(0.1, 0.6, 2, 3)]), "trajectory": 4, "denoise": True,
    }  # fmt: skip
    plain = gradients_of(UniPC(3), True, **settings)
    assert furthest(gradients_of(UniPC(3), "checkpoint", **settings), plain) < 1e-12
    sde, score_fn = VPSDE(), RING.score_fn(VPSDE())
    runs = [
        sample(score_fn, sde, UniPC(3), x=state(), gradients=mode, **settings)
        for mode in (False, True, "checkpoint")
    ]
    for run in runs[1:]:
        assert torch.equal(run.x, runs[0].x)
        assert run.nfe == runs[0].nfe
        assert run.trajectory is not None
        assert runs[0].trajectory is not None
        assert torch.equal(run.trajectory, runs[0].trajectory)


class Living:
    """Counts the evaluations whose inner tensor autograd still holds, and the most at a time."""

    def __init__(self) -> None:
        self.held: list[StorageWeakRef] = []
        self.most = 0

    def __call__(self, x: Tensor, level: NoiseLevel) -> Prediction:
        inner = torch.sin(x)
        self.held = [held for held in self.held if not held.expired()]
        self.held.append(StorageWeakRef(inner.untyped_storage()))
        self.most = max(self.most, len(self.held))
        return Prediction.from_eps(x, level, inner * inner)  # which saves ``inner``


@pytest.mark.parametrize("solver", [DPMSolverPP(3), EulerMaruyama()], ids=repr)
def test_memory_grows_as_the_root_of_the_number_of_steps(solver: Solver) -> None:
    most: dict[Any, list[int]] = {True: [], "checkpoint": []}
    counts = (16, 64, 256)
    for mode, peaks in most.items():
        for steps in counts:
            living = Living()
            x = state().requires_grad_()
            sample(living, VPSDE(), solver, x=x, steps=steps, gradients=mode).x.sum().backward()
            peaks.append(living.most)
    assert most[True] == list(counts)
    # One segment of sqrt(n) steps, and the evaluation that is being made.
    assert all(
        peak <= math.sqrt(n) + 2 for peak, n in zip(most["checkpoint"], counts, strict=True)
    ), most


# --- adjoint equations ---------------------------------------------------------------------------

ODES = [
    TorchdiffeqODE(rtol=1e-6, atol=1e-6),
    TorchdiffeqODE("dopri8", rtol=1e-8, atol=1e-8, norm="batch"),
]


@pytest.mark.parametrize("solver", ODES, ids=lambda s: f"{s.method}-{s.norm}")
@pytest.mark.parametrize("mode", [True, "adjoint"])
@pytest.mark.parametrize("name", ["vp", "ve"])
def test_the_flow_of_a_gaussian(name: str, mode: Any, solver: TorchdiffeqODE) -> None:
    """The gradient of the exact map is its matrix, closed form; tolerances add up over the run."""
    sde = SDES[name]
    problem = GaussianProblem(sde)
    weights = torch.tensor([1.0, -2.0], dtype=torch.float64)
    x = state(2, sde).requires_grad_()
    run = sample(problem.score_fn, sde, solver, x=x, gradients=mode)
    (run.x @ weights).sum().backward()
    matrix, _ = problem.exact_affine_map(float(sde.t_max), float(sde.t_min))
    assert x.grad is not None
    assert torch.allclose(x.grad, (weights @ matrix).expand_as(x), rtol=1e-4, atol=1e-5)
    plain = sample(problem.score_fn, sde, solver, x=x.detach())
    assert torch.equal(run.x, plain.x)
    assert run.nfe == plain.nfe + (3 if mode == "adjoint" else 0)


def test_guidance_and_parameters_through_the_flow() -> None:
    """Adaptive: as recorded, to the tolerance. On a grid both are second order in its step."""
    expected = gradients_of(ODES[1], True)
    assert furthest(gradients_of(ODES[0], "adjoint"), expected) < 1e-4
    assert furthest(gradients_of(ODES[1], "adjoint"), expected) < 1e-6
    apart = [
        furthest(gradients_of(TorchdiffeqODE("midpoint"), "adjoint", steps=n), expected)
        for n in (40, 80)
    ]
    assert fitted_order((40, 80), apart, finest=2) > 1.75
    recorded = gradients_of(TorchdiffeqODE("rk4"), True, steps=40)
    assert furthest(recorded, expected) < 1e-3


@pytest.mark.parametrize("method", ["srk", "euler"])
@pytest.mark.parametrize("name", ["vp", "ve"])
def test_the_reverse_sde_of_a_gaussian(name: str, method: str) -> None:
    """Along one path the gradient is the exact map's matrix, whatever the noise. Recorded, that of
    Euler's and SRA1's steps, which is exact here; by the adjoint to first order."""
    sde = SDES[name]
    problem = GaussianProblem(sde)
    matrix, _ = problem.exact_affine_map(float(sde.t_max), float(sde.t_min), eta=1.0)
    exact = matrix.sum(0).expand(3, 2)
    errors, counts = [], (50, 100, 200)
    for steps in counts:
        ends = []
        for mode in (True, "adjoint"):
            x = state(sde=sde).requires_grad_()
            run = sample(
                problem.score_fn, sde, TorchsdeSDE(method), x=x, steps=steps, seed=2, gradients=mode
            )  # type: ignore[call-overload]
            run.x.sum().backward()
            assert x.grad is not None
            ends.append(run.x.detach())
            if mode is True:
                assert torch.allclose(x.grad, exact, rtol=1e-9)
        errors.append(float((x.grad - exact).norm() / exact.norm()))
        assert torch.equal(*ends)
        assert run.nfe == (2 if method == "srk" else 1) * steps + 3
    assert fitted_order(counts, errors) > 0.9, errors
    assert errors[-1] < 0.1


def test_guidance_and_parameters_through_the_reverse_sde() -> None:
    """On one path, as the path is refined by nothing: recorded against adjoint, first order."""
    apart = [
        furthest(
            gradients_of(TorchsdeSDE("euler"), "adjoint", steps=n),
            gradients_of(TorchsdeSDE("euler"), True, steps=n),
        )
        for n in (50, 400)
    ]
    assert apart[1] < 0.1
    assert apart[1] < 0.25 * apart[0]


def test_float32_states_and_weights() -> None:
    sde, score_fn = VPSDE(), RING.score_fn(VPSDE())
    for solver, settings in (
        (TorchdiffeqODE("rk4"), {"steps": 30}),
        (TorchsdeSDE(), {"steps": 30}),
    ):
        x = state().float().requires_grad_()
        sample(score_fn, sde, solver, x=x, gradients="adjoint", **settings).x.sum().backward()
        assert x.grad is not None
        assert x.grad.dtype == torch.float32
        assert bool(x.grad.isfinite().all())


def test_a_parameter_that_was_not_found_is_not_forgotten() -> None:
    """A scale that acts on a narrow interval of times only is not seen by the probes."""
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    guided = classifier_free_guided(RING.model(VPSDE()), LABELS, scale, interval=(0.5, 0.6))
    x = state().requires_grad_()
    run = sample(guided, VPSDE(), TorchdiffeqODE("rk4"), x=x, steps=60, gradients="adjoint")
    with pytest.raises(RuntimeError, match=r"parameters of shape \(\) .* use gradients=True"):
        run.x.sum().backward()


def test_what_cannot_says_so_before_any_evaluation() -> None:
    def never(*_: Any) -> Any:
        raise AssertionError

    score_fn: ScoreFn = never
    for solver, mode, message in (
        (ScipyODE(), True, "gradients=True does not apply to ScipyODE"),
        (ScipyODE(), "adjoint", "gradients='adjoint' does not apply to ScipyODE"),
        (TorchdiffeqODE(), "checkpoint", "to TorchdiffeqODE.* use True or 'adjoint'"),
        (UniPC(), "adjoint", "use True, 'checkpoint', or TorchdiffeqODE or TorchsdeSDE"),
        (UniPC(), "checkpoints", "unknown value of gradients 'checkpoints'"),
    ):
        settings: dict[str, Any] = {"shape": (2, 2), "steps": 3, "gradients": mode}
        with pytest.raises(ValueError, match=message):
            sample(score_fn, VPSDE(), solver, **settings)
    plain = sample(IsotropicScore(), VPSDE(), UniPC(), shape=(2, 2), steps=3)
    assert not plain.x.requires_grad
