"""Recorded noise: given back as it was, and missing draws named."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sde_diffusion import VPSDE
from solvers import CounterNoise, EulerMaruyama, Noise, RecordedNoise, sample
from tests.noises import like, step_of
from tests.problems import IsotropicScore


def test_recorded_noise_gives_back_what_it_was_given() -> None:
    draws = torch.arange(24, dtype=torch.float64).reshape(2, 4, 3)
    initial = -torch.ones(4, 3, dtype=torch.float64)
    noise: Noise = RecordedNoise(list(draws), initial)
    x = like(4, 3, dtype=torch.float32)
    assert torch.equal(noise(x, step_of(1)), draws[1].float())
    assert torch.equal(noise.prior(x), initial.float())
    assert noise(x, step_of(0)).dtype == torch.float32
    slots: Noise = RecordedNoise({(0, 0): draws[0], (0, 1): draws[1]})
    assert torch.equal(slots(x.double(), step_of(0), 1), draws[1])
    chosen = torch.tensor([2, 0])
    part = noise.select(chosen)
    assert torch.equal(part(x[chosen], step_of(1)), draws[1][chosen].float())
    assert torch.equal(part.prior(x[chosen]), initial[chosen].float())


def test_recorded_noise_that_is_missing_is_named() -> None:
    noise = RecordedNoise([torch.zeros(4, 3)])
    with pytest.raises(ValueError, match=r"no draw for step 1, slot 0 \(it has 1 draws\)"):
        noise(like(4, 3), step_of(1))
    with pytest.raises(ValueError, match="step 0, slot 2"):
        noise(like(4, 3), step_of(0), 2)
    with pytest.raises(ValueError, match="no initial draw"):
        noise.prior(like(4, 3))
    with pytest.raises(ValueError, match="no initial draw"):
        noise.select(torch.tensor([0])).prior(like(1, 3))


def test_a_run_replayed_from_recorded_noise_is_the_same_run() -> None:
    counter, sde, score_fn = CounterNoise(11), VPSDE(), IsotropicScore()
    x = like(4, 3)
    draws = [counter.normal(x, i, 0).clone() for i in range(6)]
    settings: dict[str, Any] = {"shape": (4, 3), "steps": 6, "dtype": torch.float64}
    recorded = RecordedNoise(draws, counter.prior(x))
    replayed = sample(score_fn, sde, EulerMaruyama(), noise=recorded, **settings)
    assert torch.equal(replayed.x, sample(score_fn, sde, EulerMaruyama(), seed=11, **settings).x)
