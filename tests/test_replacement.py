"""Replacement of the known part, and RePaint: laws, noise, masks, batches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sde_diffusion import Inpainting, Matrix, dps_guided, named_target, pigdm_guided
from solvers import Ancestral, ProbabilityFlow, RePaint, Replacement, Step, UniPC, sample
from solvers.base import Solver, Stepped
from tests.problems import SDES
from tests.restored import NORMAL, STD


class _Recorder(Solver):
    """Notes the states it is given, and moves on as ``Ancestral``."""

    order = 1
    stochastic = True

    def __init__(self) -> None:
        self.seen: list[tuple[Step, Tensor]] = []

    def step(self, score_fn: Any, x: Tensor, step: Step, state: Any, noise: Any) -> Stepped:
        self.seen.append((step, x))
        bare = Step(step.index, step.start, step.end)
        return Ancestral().step(score_fn, x, bare, state, noise)


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("noise_std", [0.0, 0.2])
def test_the_known_part_has_the_noise_of_its_own_time_from_the_first_state_on(
    name: str, noise_std: float
) -> None:
    sde, n = SDES[name], 4000
    measurement = Inpainting(torch.tensor([1, 0, 1, 0]), noise_std)
    # Measurements with their noise in them; without noise in y there is nothing to allow for.
    y = measurement.draw(torch.tensor([[0.8, 0.0, -0.4, 0.0]]).double().repeat(n, 1), seed=1)
    recorder = _Recorder()
    run = sample(
        NORMAL.score_fn(sde),
        sde,
        Replacement(recorder, measurement, y),
        shape=(n, 4),
        steps=6,
        dtype=torch.float64,
    )
    assert len(recorder.seen) == 6
    ends = [(step.start, x) for step, x in recorder.seen]
    ends.append((recorder.seen[-1][0].end, run.x))
    for level, x in ends:
        if level.sigma < level.alpha * noise_std:
            continue  # less noise than y itself has: nothing is replaced
        for i, value in ((0, 0.8), (2, -0.4)):
            z = (x[:, i] - level.alpha * value) / level.sigma
            # Mean 0 and variance 1 to five standard errors: 1 / sqrt(n) and sqrt(2 / n).
            assert abs(float(z.mean())) < 5 / math.sqrt(n)
            assert abs(float(z.var()) - 1) < 5 * math.sqrt(2 / n)


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_noise_is_allowed_for_in_every_direction(name: str) -> None:
    """A measurement that sees one direction ten times less: there its noise is ten times as large,
    and at the end the model's own estimate has been left alone."""
    sde, n = SDES[name], 4000
    matrix = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.1, 0.0, 0.0]])
    measurement = Matrix(matrix, noise_std=0.2)
    truth = torch.tensor([[0.8, -0.4, 0.0, 0.0]], dtype=torch.float64)
    y = measurement.draw(truth.repeat(n, 1), seed=1)
    recorder = _Recorder()
    run = sample(
        NORMAL.score_fn(sde),
        sde,
        Replacement(recorder, measurement, y),
        shape=(n, 4),
        steps=12,
        dtype=torch.float64,
    )
    seen = 0
    for step, x in recorder.seen:
        for i, std in ((0, 0.2), (1, 2.0)):
            if step.start.sigma >= step.start.alpha * std:
                z = (x[:, i] - step.start.alpha * truth[0, i]) / step.start.sigma
                assert abs(float(z.mean())) < 5 / math.sqrt(n)
                assert abs(float(z.var()) - 1) < 5 * math.sqrt(2 / n)
                seen += 1
    assert seen > 6
    assert float(run.x[:, 1].std()) < 1.5 * STD  # not the 2.0 of the measurement's noise


def test_full_and_empty_masks() -> None:
    sde, target = SDES["vp"], named_target("gmm16")
    score_fn = target.score_fn(sde)
    x0, _ = target.sample(3, 3)
    everything, nothing = Inpainting(torch.ones(16)), Inpainting(torch.zeros(16))
    settings: Any = {"shape": (3, 16), "steps": 40}
    plain = sample(score_fn, sde, Ancestral(), **settings).x
    level = sde.at(float(sde.t_min))
    for method in (dps_guided, pigdm_guided):
        free = sample(method(score_fn, nothing, torch.zeros(3, 16)), sde, Ancestral(), **settings)
        assert (free.x == plain).all()
    free = sample(score_fn, sde, Replacement(Ancestral(), nothing, torch.zeros(1, 16)), **settings)
    assert (free.x == plain).all()
    # All known: what is left is the noise of t_min, at most 5 sigma of it in 48 numbers.
    kept = sample(score_fn, sde, Replacement(Ancestral(), everything, x0), **settings).x
    assert float((kept - level.alpha * x0).abs().max()) < 5 * float(level.sigma)
    found = sample(
        pigdm_guided(score_fn, everything, x0), sde, Ancestral(), denoise=True, **settings
    )
    assert float((found.x - x0).abs().max()) < 0.05


def test_repaint_comes_closer_than_replacement() -> None:
    """A correlated Gaussian of which one number is known, far out: the other's exact mean moves by
    0.3 / 0.8 of it, which replacement alone only partly sees."""
    sde, target, n = SDES["vp"], named_target("gaussian"), 2000
    known = Inpainting(torch.tensor([1, 0]))
    y = torch.tensor([[2.5, 0.0]])
    exact = float(target.posterior(known, y[0]).mean()[1])
    errors = []
    for plan in (None, RePaint(jump=5, times=4), RePaint(jump=5, times=12)):
        run = sample(
            target.score_fn(sde),
            sde,
            Replacement(Ancestral(), known, y),
            plan=plan,
            shape=(n, 2),
            steps=40,
        )
        assert run.nfe == 40 * (1 if plan is None else plan.times)
        errors.append(abs(float(run.x[:, 1].mean()) - exact))
    # One standard error of a mean is 0.53 / sqrt(2000) = 0.012.
    assert errors[0] > errors[1] + 5 * 0.012 > 0.06
    assert errors[1] > errors[2] - 3 * 0.012
    assert errors[2] < 0.5 * errors[0]


def test_repaint_once_is_the_plain_grid_and_batches_do_not_matter() -> None:
    sde, target = SDES["ve"], named_target("ring")
    known = Inpainting(torch.tensor([1, 0]))
    y = torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]])
    settings: Any = {"steps": 12, "dtype": torch.float64}
    score_fn = target.score_fn(sde)
    whole = Replacement(Ancestral(), known, y)
    plain = sample(score_fn, sde, whole, shape=(3, 2), **settings).x
    once = sample(score_fn, sde, whole, shape=(3, 2), plan=RePaint(5, 1), **settings).x
    assert (once == plain).all()
    back = sample(score_fn, sde, whole, shape=(3, 2), plan=RePaint(5, 3), **settings).x
    assert not (back == plain).any(1).all()
    for i in range(3):
        part = Replacement(Ancestral(), known, y[i : i + 1])
        alone = sample(
            score_fn, sde, part, shape=(1, 2), sample_ids=[i], plan=RePaint(5, 3), **settings
        )
        assert (alone.x[0] == back[i]).all()


def test_going_back_keeps_the_law() -> None:
    """Without a measurement, walks back and forth leave the exact law where it is."""
    sde, n = SDES["vp"], 4000
    for solver in (ProbabilityFlow(), UniPC()):
        run = sample(
            NORMAL.score_fn(sde),
            sde,
            solver,
            shape=(n, 4),
            steps=40,
            grid="log_snr",
            plan=RePaint(6, 3),
            dtype=torch.float64,
        )
        # Five standard errors, and 0.01 for 40 steps of order 2 and 3.
        assert float((run.x.mean(0) - NORMAL.means[0]).abs().max()) < 5 * STD / math.sqrt(n) + 0.01
        assert float((run.x.var(0) / STD**2 - 1).abs().max()) < 5 * math.sqrt(2 / n) + 0.01
