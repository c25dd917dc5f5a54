"""Noise as a function of (seed, sample, step, slot).

Monte-Carlo bounds are 5 standard errors (1 in 1.7 million by chance; the seeds are fixed besides).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from solvers import CounterNoise
from tests.noises import correlation, like, step_of

EVENTS = [(), (1,), (2,), (7,), (3, 5, 5), (16, 16)]


# --- counter noise: a pure function --------------------------------------------------------------


@pytest.mark.parametrize("event", EVENTS)
def test_noise_is_the_same_whatever_was_asked_before(event: tuple[int, ...]) -> None:
    x = like(3, *event)
    places = [(index, slot) for index in (0, 1, 2, 63, 64, 65, 1000) for slot in (0, 1, 2)]
    fresh = {place: CounterNoise(5).normal(x, *place).clone() for place in places}
    forwards, backwards = CounterNoise(5), CounterNoise(5)
    for place in places:
        assert torch.equal(forwards.normal(x, *place), fresh[place])
    for place in reversed(places):
        assert torch.equal(backwards.normal(x, *place), fresh[place])
    mixed = CounterNoise(5)
    mixed.prior(x)
    mixed.normal(like(2, *event, 3), 1, 0)  # another shape in between
    mixed.normal(like(3, *event, dtype=torch.float32), 1, 0)
    for place in (places[3], places[0], places[3], places[-1]):
        assert torch.equal(mixed.normal(x, *place), fresh[place])
    called = CounterNoise(5)
    assert torch.equal(called(x, step_of(2), 1), fresh[2, 1])
    assert torch.equal(called(x, step_of(2)), fresh[2, 0])


@pytest.mark.parametrize("event", EVENTS)
def test_look_ahead_changes_nothing(event: tuple[int, ...], monkeypatch: Any) -> None:
    x = like(3, *event)
    ahead = CounterNoise(1)
    found = [ahead.normal(x, i, 0).clone() for i in range(130)]
    monkeypatch.setattr("solvers.noise._LOOK_AHEAD_STEPS", 1)
    single = CounterNoise(1)
    for i in range(130):
        assert torch.equal(single.normal(x, i, 0), found[i])


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_samples_noise_is_its_own_in_any_batch(
    event: tuple[int, ...], dtype: torch.dtype
) -> None:
    n = 37
    ids = torch.arange(100, 100 + n)
    x = like(n, *event, dtype=dtype)
    whole = CounterNoise(3, ids)
    expected = [whole.prior(x), *(whole.normal(x, i, slot) for i in (0, 5) for slot in (0, 1))]
    for sizes in ([1] * n, [36, 1], [3, 5, 7, 22]):
        parts = []
        for chosen in torch.arange(n).split(sizes):
            for noise in (CounterNoise(3, ids[chosen]), whole.select(chosen)):
                part = x[chosen]
                parts.append(
                    [noise.prior(part)]
                    + [noise.normal(part, i, slot) for i in (0, 5) for slot in (0, 1)]
                )
        for which in (0, 1):
            for k, value in enumerate(expected):
                assert torch.equal(torch.cat([p[k] for p in parts[which::2]]), value)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    assert torch.equal(CounterNoise(3, ids[order]).normal(x, 5, 1), expected[4][order])


def test_ids_are_the_row_numbers_by_default() -> None:
    x = like(4, 3)
    given = CounterNoise(0, torch.arange(4))
    assert torch.equal(CounterNoise(0).normal(x, 2, 0), given.normal(x, 2, 0))
    chosen = torch.tensor([3, 1])
    assert torch.equal(
        CounterNoise(0).select(chosen).normal(x[chosen], 2, 0), given.normal(x, 2, 0)[chosen]
    )
    twice = given.select(torch.tensor([3, 1, 2])).select(torch.tensor([2, 0]))
    assert torch.equal(twice.normal(x[:2], 2, 0), given.normal(x, 2, 0)[[2, 3]])


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_noise_has_the_states_shape_and_dtype(event: tuple[int, ...], dtype: torch.dtype) -> None:
    x = like(3, *event, dtype=dtype)
    noise = CounterNoise(0)
    for value in (noise.prior(x), noise(x, step_of(0)), noise(x, step_of(0), 3)):
        assert value.shape == x.shape
        assert value.dtype == dtype
        assert value.isfinite().all()


@pytest.mark.parametrize("event", [(), (7,), (3, 32, 32)])
def test_float32_is_float64_to_rounding(event: tuple[int, ...]) -> None:
    n = 30_000 // max(1, math.prod(event)) + 1
    wide = CounterNoise(2).normal(like(n, *event), 3, 0)
    narrow = CounterNoise(2).normal(like(n, *event, dtype=torch.float32), 3, 0)
    error = (narrow.double() - wide).abs()
    # r = sqrt(-2 log u): an ulp of u near 1 (6e-8) moves r by 6e-8/r, and r goes down to
    # sqrt(2/30000) = 8e-3; the angle's ulp (5e-7 at 2 pi) moves a normal by that times r < 7.
    assert error.max() < 3e-5
    assert error.median() < 2e-7


# --- counter noise: normal and independent -------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 3])
@pytest.mark.parametrize("event", [(), (2,), (7,), (3, 8, 8)])
def test_noise_is_standard_normal(seed: int, event: tuple[int, ...]) -> None:
    n = 100_000 // max(1, math.prod(event))
    noise = CounterNoise(seed)
    x = like(n, *event)
    draws = {
        "prior": noise.prior(x),
        "samples": noise.normal(x, 0, 0),
        "a corrector's": noise.normal(x, 3, 2),
    }
    long = CounterNoise(seed)
    draws["steps of one sample"] = torch.stack([long.normal(like(1, 7), i, 0) for i in range(2000)])
    for name, draw in draws.items():
        z = draw.flatten()
        count = z.numel()
        # Moments of a normal: the mean of z^k has variance (E z^2k - (E z^k)^2)/n.
        for k, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
            excess = (z**k).mean() - expected
            assert abs(excess) < 5 * math.sqrt(variance / count), (name, k)
        assert stats.kstest(z.numpy(), "norm").pvalue > 1e-6, name
        assert z.unique().numel() == count  # float64, of 2^64 values: no repetition


@pytest.mark.parametrize("event", [(2,), (7,), (3, 8, 8)])
def test_elements_ids_steps_slots_and_seeds_are_independent(event: tuple[int, ...]) -> None:
    size = math.prod(event)
    n = 60_000 // size
    x = like(n, *event)
    noise = CounterNoise(4)
    base = noise.normal(x, 0, 0).clone()
    flat = base.reshape(n, size)
    pairs: dict[str, tuple[Tensor, Tensor]] = {
        "ids": (base[:-1], base[1:]),
        "ids, 2 apart": (base[:-2], base[2:]),
        "elements": (flat[:, :-1], flat[:, 1:]),
        "the two of a pair": (flat[:, : size // 2], flat[:, -(size // 2) :]),
        "the two of a pair, odd": (
            flat[:, : size // 2],
            flat[:, (size + 1) // 2 :][:, : size // 2],
        ),
        "prior": (base, noise.prior(x)),
        "seeds": (base, CounterNoise(5).normal(x, 0, 0)),
        "id against step": (base[1:], noise.normal(x, 1, 0)[:-1]),
    }
    for i in (1, 2, 63, 64):
        pairs[f"step {i}"] = (base, noise.normal(x, i, 0))
    for slot in (1, 2, 3):
        pairs[f"slot {slot}"] = (base, noise.normal(x, 0, slot))
        pairs[f"slot against step {slot}"] = (
            noise.normal(x, 0, slot).clone(),
            noise.normal(x, slot, 0).clone(),
        )
    for name, (a, b) in pairs.items():
        assert not torch.equal(a, b), name
        assert abs(correlation(a, b)) < 5, name
        # Independent, not only uncorrelated: Box & Muller's two share a radius.
        assert abs(correlation(a**2, b**2)) < 5, name
        assert abs(correlation(a, b**2)) < 5, name


def test_no_two_places_share_their_noise() -> None:
    # Seeds, ids, steps (the prior's -1 too) and slots, all near each other, where a poor mixing of
    # the counters would give the same key twice: all first elements differ, bit for bit.
    seen = []
    x = like(40, 3)
    for seed in range(10):
        noise = CounterNoise(seed, torch.arange(-3, 37))
        seen.append(noise.prior(x))
        seen += [noise.normal(x, i, slot).clone() for i in range(30) for slot in range(4)]
    values = torch.stack(seen).flatten()
    assert values.unique().numel() == values.numel()


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: CounterNoise(-1), ValueError, "seed must be at least 0"),
        (lambda: CounterNoise(1.5), TypeError, "seed must be a whole number"),  # type: ignore[arg-type]
        (lambda: CounterNoise(0, torch.arange(3)).prior(like(4, 2)), ValueError, "sample_ids"),
    ],
)
def test_a_wrong_argument_is_named(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()
