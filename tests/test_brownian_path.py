"""One Brownian path on every grid.

Monte-Carlo bounds are 5 standard errors (1 in 1.7 million by chance; the seeds are fixed besides).
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from scipy import stats
from torch import Tensor

from sde_diffusion import EDMSDE, SDE, VPSDE
from solvers import BrownianPath, EulerMaruyama, sample
from tests.noises import correlation, like, step_of
from tests.problems import SDES, IsotropicScore


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
