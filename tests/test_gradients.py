"""Gradients of a loss on the samples: against finite differences, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sde_diffusion import (
    VPSDE,
    EpsModel,
    classifier_free_guided,
    classifier_guided,
    named_target,
)
from sde_diffusion.prediction import ScoreFn
from solvers import (
    Adaptive,
    Ancestral,
    BogackiShampine,
    DPMSolverPP,
    EulerMaruyama,
    ParallelPicard,
    PredictorCorrector,
    ProbabilityFlow,
    Solver,
    UniPC,
    sample,
)

SDE = VPSDE()
RING = named_target("ring")
SOLVERS = [
    Ancestral(),
    EulerMaruyama(),
    PredictorCorrector(),
    ProbabilityFlow("heun"),
    DPMSolverPP(3),
    UniPC(3),
]


def end(score_fn: ScoreFn, solver: Solver, x: Tensor, steps: int = 6) -> Tensor:
    return sample(score_fn, SDE, solver, x=x, steps=steps, seed=1, gradients=True).x


def state() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 2, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_with_respect_to_the_initial_state(solver: Solver) -> None:
    """gradcheck's central differences at 1e-6 are good to about 1e-9 of the curvature."""
    score_fn = RING.score_fn(SDE)
    x = state().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: end(score_fn, solver, x), (x,), atol=1e-4)


@pytest.mark.parametrize("solver", SOLVERS[:4], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("guidance", ["classifier", "cfg"])
def test_with_respect_to_the_guidance_scale(guidance: str, solver: Solver) -> None:
    labels = torch.tensor([0, 3, 5])

    def run(scale: Tensor) -> Tensor:
        if guidance == "cfg":
            return end(classifier_free_guided(RING.model(SDE), labels, scale), solver, state())
        score_fn = RING.score_fn(SDE)
        return end(
            classifier_guided(score_fn, RING.classifier(SDE), labels, scale), solver, state()
        )

    scale = torch.tensor([1.5, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (scale,), atol=1e-4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.inner(torch.cat([x, t[:, None]], 1))


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_with_respect_to_network_parameters(solver: Solver) -> None:
    net = Net()
    model = EpsModel(net, SDE)
    weight = net.inner[2].weight
    end(model, solver, state()).square().sum().backward()
    assert weight.grad is not None
    step = 1e-6
    with torch.no_grad():
        losses = []
        for sign in (1, -1):
            weight[0, 0] += sign * step
            losses.append(float(end(model, solver, state()).square().sum()))
            weight[0, 0] -= sign * step
    # Central differences: rounding 1e-16 / 1e-6 of the loss, which is of order 1e2 to 1e4.
    assert float(weight.grad[0, 0]) == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-4)


def test_the_samples_are_those_of_a_run_without_gradients() -> None:
    score_fn, x = RING.score_fn(SDE), state()
    recorded = sample(
        score_fn, SDE, UniPC(3), x=x.clone().requires_grad_(), steps=9, gradients=True
    )
    plain = sample(score_fn, SDE, UniPC(3), x=x, steps=9)
    assert torch.equal(recorded.x, plain.x)
    assert recorded.x.requires_grad
    assert not plain.x.requires_grad


def test_what_has_no_gradients_says_so() -> None:
    score_fn = RING.score_fn(SDE)
    with pytest.raises(ValueError, match="gradients=True does not apply to ParallelPicard"):
        sample(score_fn, SDE, ParallelPicard(), shape=(2, 2), steps=3, gradients=True)
    with pytest.raises(ValueError, match="gradients does not apply to plan=Adaptive"):
        sample(score_fn, SDE, BogackiShampine(), shape=(2, 2), plan=Adaptive(), gradients=True)
