"""Orders by slope and by limit: deterministic samplers on `ring` and a Gaussian, strong orders on
one Brownian path.

A slope is fitted to the three finest grids in float64; the reference is a closed form, or scipy's
DOP853 on the equation in t, which shares nothing with the solvers.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from sde_diffusion import SDE, ScoreFn, named_target
from solvers import (
    DDIM,
    Ancestral,
    BrownianPath,
    EulerMaruyama,
    Noise,
    ProbabilityFlow,
    ReverseDiffusion,
    Solver,
    Step,
    grids,
    sample,
)
from tests.problems import (
    SDES,
    GaussianProblem,
    IsotropicScore,
    fine_flow,
    fitted_order,
    uniform_grid,
    warped_grid,
)

DETERMINISTIC: dict[str, Solver] = {
    "midpoint": ProbabilityFlow("midpoint"),
    "heun": ProbabilityFlow("heun"),
    "rk4": ProbabilityFlow("rk4"),
    "ddim": DDIM(),
    "euler_maruyama-0": EulerMaruyama(0.0),
}
STEPS = (128, 256, 512)


def refined_grid(sde: SDE, steps: int) -> Tensor:
    """Sixteen random log-SNR intervals, the longest some six times the shortest, each cut into
    equal parts: a grid without any law that still refines, so that its slope means something."""
    low, high = (float(sde.at(t).half_log_snr) for t in (float(sde.t_max), float(sde.t_min)))
    generator = torch.Generator().manual_seed(5)
    lengths = 0.3 + 1.7 * torch.rand(16, generator=generator, dtype=torch.float64)
    parts = (lengths / lengths.sum()).repeat_interleave(steps // 16) / (steps // 16)
    times = sde.time(low + (high - low) * parts.cumsum(0)[:-1])
    ends = torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64)
    return torch.cat([ends[:1], times, ends[1:]])


GRIDS = {
    "time": grids.time,
    "log_snr": uniform_grid,
    "warped": warped_grid,
    "random": refined_grid,
}


@cache
def problem(target: str, name: str) -> tuple[ScoreFn, Tensor, Tensor]:
    """Score, states at ``t_max`` and where the probability flow takes them."""
    sde = SDES[name]
    first, last = float(sde.t_max), float(sde.t_min)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 2, generator=generator, dtype=torch.float64) * sde.prior_std()
    if target == "gaussian":
        gaussian = GaussianProblem(sde)
        return gaussian.score_fn, x, gaussian.exact_flow(x, first, last)
    score_fn = named_target(target).score_fn(sde)
    return score_fn, x, fine_flow(score_fn, sde, x, first, last)


@pytest.mark.parametrize(
    "name,grid",
    # On VE, uniform in t and uniform in log-SNR are one grid.
    [(n, g) for n in ("vp", "ve", "subvp") for g in GRIDS if (n, g) != ("ve", "time")],
)
@pytest.mark.parametrize("target", ["ring", "gaussian"])
@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_order_and_limit_of_deterministic_samplers(
    sampler: str, target: str, name: str, grid: str
) -> None:
    sde, solver = SDES[name], DETERMINISTIC[sampler]
    score_fn, x, exact = problem(target, name)
    ends = [sample(score_fn, sde, solver, x=x, grid=GRIDS[grid](sde, n)).x for n in STEPS]
    errors = [float((end - exact).square().mean().sqrt()) for end in ends]
    slope = fitted_order(STEPS, errors)
    assert slope > solver.order - 0.25
    if target == "ring":  # on a Gaussian midpoint's leading error cancels over the run
        assert slope < solver.order + 0.25
    # The limit: on 512 steps each is near the solution, and the extrapolation
    # to infinitely many steps is nearer, so the error does not end in a floor.
    assert errors[-1] < {1: 0.1, 2: 5e-4, 4: 5e-7}[solver.order]
    if not (sampler == "midpoint" and target == "gaussian"):
        limit = ends[-1] + (ends[-1] - ends[-2]) / (2**solver.order - 1)
        assert float((limit - exact).square().mean().sqrt()) < 0.25 * errors[-1]


# --- strong order --------------------------------------------------------------------------------

MEAN, VARIANCE = 0.7, 0.4
STRONG = {
    "euler_maruyama": EulerMaruyama(),
    "ancestral": Ancestral(),
    "ancestral-large": Ancestral(variance="large"),
    "reverse_diffusion": ReverseDiffusion(),
}
STRONG_STEPS = (32, 64, 128)
STRONG_CASES = [("vp", "log_snr"), ("ve", "warped"), ("subvp", "log_snr")]


class Remembered(Noise):
    """A Brownian path that keeps what it was asked: samplers on one grid ask the same."""

    def __init__(self, path: BrownianPath) -> None:
        self.path = path
        self.known: dict[tuple[float, float], Tensor] = {}

    def __call__(self, x: Tensor, step: Step, slot: int = 0) -> Tensor:
        place = float(step.start.t), float(step.end.t)
        if place not in self.known:
            self.known[place] = self.path(x, step, slot)
        return self.known[place]

    def prior(self, x: Tensor) -> Tensor:
        return self.path.prior(x)

    def select(self, indices: Tensor) -> Noise:
        raise NotImplementedError


@cache
def shared_path(name: str, grid: str) -> tuple[Remembered, Tensor, Tensor]:
    """A path, states at ``t_max`` and the solution on the path at ``t_min``.

    The reference takes 512 steps of the exact transition with the path's increments. Within a step
    it weighs the path evenly, which leaves a strong error of order 1 as well, four times below that
    of 128 steps and independent of it: in the mean square it adds a few per cent to the last error
    and takes at most 0.05 from a slope.
    """
    sde = SDES[name]
    gaussian = GaussianProblem(
        sde,
        torch.tensor([MEAN], dtype=torch.float64),
        torch.tensor([[VARIANCE]], dtype=torch.float64),
    )
    # 2^13 leaves: the path is linear on a sixteenth of the reference's steps.
    path = Remembered(BrownianPath(sde, 11, depth=13))
    x = path.prior(torch.empty(100, 1, dtype=torch.float64)) * sde.prior_std()
    start = x
    times = GRIDS[grid](sde, 512).tolist()
    for k, (t, u) in enumerate(pairwise(times)):
        matrix, offset = gaussian.exact_affine_map(t, u, eta=1.0)
        before, after = (gaussian.marginal(s).covariance for s in (t, u))
        spread = (after - matrix @ before @ matrix.T).sqrt()
        x = x @ matrix.T + offset + path(x, Step(k, sde.at(t), sde.at(u))) * spread
    return path, start, x


@pytest.mark.parametrize("name,grid", STRONG_CASES)
@pytest.mark.parametrize("sampler", STRONG)
def test_strong_order_on_a_shared_path(sampler: str, name: str, grid: str) -> None:
    """Additive noise: the strong order is 1, not 1/2, and all samplers converge to one path."""
    sde, score_fn = SDES[name], IsotropicScore(MEAN, VARIANCE)
    path, start, exact = shared_path(name, grid)
    errors = []
    for n in STRONG_STEPS:
        times = GRIDS[grid](sde, n)
        end = sample(score_fn, sde, STRONG[sampler], x=start, grid=times, noise=path).x
        errors.append(float((end - exact).square().mean().sqrt()))
    assert 0.85 < fitted_order(STRONG_STEPS, errors) < 1.2
    # A tenth of the law's own deviation sqrt(0.4): independent paths would be 0.9 apart.
    assert errors[-1] < 0.06
