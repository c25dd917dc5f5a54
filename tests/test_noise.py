"""Noise as a function of (seed, sample, step, slot); one Brownian path on every grid.

Monte-Carlo bounds are 5 standard errors (1 in 1.7 million by chance; the seeds are fixed besides).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from sde_diffusion import EDMSDE, SDE, VPSDE
from solvers import BrownianPath, CounterNoise, EulerMaruyama, Noise, RecordedNoise, Step, sample
from tests.problems import SDES, IsotropicScore

EVENTS = [(), (1,), (2,), (7,), (3, 5, 5), (16, 16)]


def step_of(index: int, sde: SDE | None = None, start: float = 0.6, end: float = 0.5) -> Step:
    sde = sde or VPSDE()
    return Step(index, sde.at(start), sde.at(end))


def like(samples: int, *event: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.zeros(samples, *event, dtype=dtype)


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


def correlation(a: Tensor, b: Tensor) -> float:
    """In units of its standard error."""
    a, b = a.flatten() - a.mean(), b.flatten() - b.mean()
    return float((a * b).mean() / (a.std() * b.std()) * math.sqrt(a.numel()))


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


# --- a Brownian path -----------------------------------------------------------------------------


def clock(sde: SDE, t: float) -> float:
    level = sde.at(t)
    return float(level.sigma / level.alpha) ** 2


def increment(path: BrownianPath, x: Tensor, start: float, end: float, index: int = 0) -> Tensor:
    """W(clock(start)) - W(clock(end)), not normalised."""
    width = math.sqrt(clock(path.sde, start) - clock(path.sde, end))
    return width * path(x, step_of(index, path.sde, start, end))


def splits(sde: SDE, steps: int = 7) -> list[float]:
    """Decreasing times from end to end, spread over the log-SNR, none at a dyadic point."""
    low, high = (float(sde.at(float(t)).half_log_snr) for t in (sde.t_max, sde.t_min))
    u = torch.linspace(0, 1, steps + 1, dtype=torch.float64) ** 1.3
    times = sde.time(low + (high - low) * u).tolist()
    return [float(sde.t_max), *times[1:-1], float(sde.t_min)]


@pytest.mark.parametrize("name", SDES)
def test_increments_add_up(name: str) -> None:
    sde = SDES[name]
    path = BrownianPath(sde, 0)
    x = like(5, 3)
    times = splits(sde)
    parts = [increment(path, x, a, b, i) for i, (a, b) in enumerate(pairwise(times))]
    for first, last in ((0, 7), (0, 3), (2, 6), (6, 7), (1, 2)):
        whole = increment(path, x, times[first], times[last])
        # Differences of path values of size sqrt(clock): ulps of the largest.
        scale = math.sqrt(clock(sde, times[first]))
        torch.testing.assert_close(
            sum(parts[first:last], like(5, 3)), whole, rtol=0, atol=1e-13 * max(1.0, scale)
        )


@pytest.mark.parametrize("name", ["vp", "ve", "edm"])
def test_increments_are_standard_normal_and_independent(name: str) -> None:
    sde = SDES[name]
    n = 20_000
    path = BrownianPath(sde, 1)
    x = like(n, 1)
    times = splits(sde)
    steps = [step_of(i, sde, a, b) for i, (a, b) in enumerate(pairwise(times))]
    # Levels that fall on the tree's own points and between them, and a refinement of the last.
    draws = [path(x, step).clone() for step in steps]
    for z in draws:
        flat = z.flatten()
        for k, expected, variance in ((1, 0, 1), (2, 1, 2), (4, 3, 96)):
            assert abs((flat**k).mean() - expected) < 5 * math.sqrt(variance / n)
        assert stats.kstest(flat.numpy(), "norm").pvalue > 1e-6
    for i in range(len(draws)):
        for j in range(i):
            assert abs(correlation(draws[i], draws[j])) < 5
    for other in (path.prior(x), path(x, steps[2], 1), path(x, steps[3], 1)):
        for z in draws:
            assert abs(correlation(z, other)) < 5
    assert abs(correlation(path(x, steps[2], 1), path(x, steps[3], 1))) < 5
    assert abs(correlation(path(x, steps[2], 1), path(x, steps[2], 2))) < 5


def test_short_steps_keep_variance_one_down_to_the_resolution() -> None:
    sde, n = VPSDE(), 20_000
    path = BrownianPath(sde, 2)
    for width in (1e-2, 1e-4, 1e-5):  # the tree resolves 1e-9 of the range of log-SNR
        z = path(like(n, 1), step_of(0, sde, 0.5, 0.5 - width)).flatten()
        assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)


@pytest.mark.parametrize("name", SDES)
def test_the_path_does_not_depend_on_what_was_asked_before(name: str) -> None:
    sde = SDES[name]
    times = splits(sde)
    x = like(3, 2)
    places = [(a, b) for k, a in enumerate(times) for b in times[k + 1 :]]
    fresh = {p: BrownianPath(sde, 0)(x, step_of(0, sde, *p)) for p in places}
    one = BrownianPath(sde, 0)
    for index, place in enumerate(reversed(places)):  # nor on the step's index
        assert torch.equal(one(x, step_of(index, sde, *place)), fresh[place])
    for place in places:
        assert torch.equal(one(x, step_of(7, sde, *place)), fresh[place])


def test_a_samples_path_is_its_own_in_any_batch() -> None:
    sde = VPSDE()
    ids = torch.arange(50, 63)
    x = like(13, 2, 3)
    whole = BrownianPath(sde, 3, ids)
    steps = [step_of(0, sde, 1.0, 0.4), step_of(1, sde, 0.4, 1e-3)]
    expected = [whole.prior(x), *(whole(x, s) for s in steps), whole(x, steps[0], 2)]
    for sizes in ([1] * 13, [6, 7]):
        for make in (lambda c: BrownianPath(sde, 3, ids[c]), whole.select):
            parts = []
            for chosen in torch.arange(13).split(sizes):
                path, part = make(chosen), x[chosen]
                parts.append([path.prior(part), *(path(part, s) for s in steps)])
                parts[-1].append(path(part, steps[0], 2))
            for k, value in enumerate(expected):
                assert torch.equal(torch.cat([p[k] for p in parts]), value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("start", [1.0, 0.7])
def test_path_has_the_states_dtype(dtype: torch.dtype, start: float) -> None:
    path = BrownianPath(VPSDE(), 0)
    for slot in (0, 1):
        z = path(like(3, 2, dtype=dtype), step_of(0, VPSDE(), start, 1e-3), slot)
        assert z.dtype == dtype
        assert z.shape == (3, 2)
    # Computed in float64 and rounded once: near points of the path would cancel in float32.
    step = step_of(0, VPSDE(), start, start - 1e-4)
    assert torch.equal(path(like(3, 2, dtype=dtype), step), path(like(3, 2), step).to(dtype))


def test_refining_a_run_on_one_path_converges_pathwise() -> None:
    # With another path per grid the distance would stay of the order of the spread, 0.7.
    sde, score_fn = VPSDE(), IsotropicScore()
    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ends = {
        n: sample(
            score_fn, sde, EulerMaruyama(), x=x, steps=n, grid="log_snr",
            noise=BrownianPath(sde, 9),
        ).x
        for n in (32, 64, 128)
    }  # fmt: skip
    coarse = (ends[32] - ends[64]).square().mean().sqrt()
    fine = (ends[64] - ends[128]).square().mean().sqrt()
    assert coarse < 0.1
    assert fine < 0.65 * coarse  # strong order 1 on additive noise: half, with a margin


def test_other_seeds_and_ids_have_other_paths() -> None:
    sde, x = EDMSDE(), like(2000, 1)
    step = step_of(0, sde, 5.0, 0.5)
    one, other = BrownianPath(sde, 0)(x, step), BrownianPath(sde, 1)(x, step)
    assert abs(correlation(one, other)) < 5
    assert abs(correlation(one[1:], one[:-1])) < 5


def test_steps_below_t_min_get_noise_or_an_error() -> None:
    sde = VPSDE()
    try:
        z = BrownianPath(sde, 0)(like(20_000, 1), step_of(0, sde, 1.1e-3, 5e-4))
    except ValueError:
        return
    assert abs(z.var() - 1) < 0.05


# --- recorded noise ------------------------------------------------------------------------------


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
