"""NCSNv2's choices against the published ladders, brute force and simulation."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from typer.testing import CliRunner

from experiments.cli import app
from sde_diffusion.noise_scales import (
    langevin_step,
    largest_distance,
    level_ratio,
    suggest_noise_scales,
    variance_ratio,
)
from solvers import AnnealedLangevin

# Song & Ermon 2020, table 1 of the appendix and the authors' configurations: side of the image,
# sigma_1, L, T, epsilon; sigma_L = 0.01.
PUBLISHED = {
    "cifar10": (32, 50, 232, 5, 6.2e-6),
    "celeba": (64, 90, 500, 5, 3.3e-6),
    "church": (96, 140, 788, 4, None),  # its epsilon, 4.9e-6, is not what proposition 3 gives
    "bedroom": (128, 190, 1086, 3, 1.8e-6),
    "ffhq": (256, 348, 2311, 3, 0.9e-6),
}


def two_points(distance: float, dimension: int) -> Tensor:
    data = torch.zeros(2, dimension)
    data[1, 0] = distance
    return data


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_ladders_come_out_level_for_level(name: str) -> None:
    side, sigma_max, levels, steps, epsilon = PUBLISHED[name]
    scales = suggest_noise_scales(two_points(sigma_max, 3 * side**2), steps=steps)
    assert scales.sigma_max == sigma_max
    assert scales.levels == levels
    if epsilon is not None:
        assert scales.step_size == pytest.approx(epsilon, abs=0.05e-6)  # published to two digits
    sigmas = scales.sigmas()
    torch.testing.assert_close(
        sigmas[[0, -1]], torch.tensor([sigma_max, 0.01], dtype=torch.float64)
    )
    torch.testing.assert_close(
        sigmas[:-1] / sigmas[1:], torch.full((levels - 1,), scales.ratio, dtype=torch.float64)
    )


@pytest.mark.parametrize("dimension", [20, 64, 784, 3072])
@pytest.mark.parametrize("overlap", [0.3, 0.5, 0.567])
def test_the_ratio_solves_proposition_2(dimension: int, overlap: float) -> None:
    gamma = level_ratio(dimension, overlap)
    if gamma == 2:
        assert dimension == 20
        return
    shift, cdf = math.sqrt(2 * dimension) * (gamma - 1), stats.norm.cdf
    assert cdf(shift + 3 * gamma) - cdf(shift - 3 * gamma) == pytest.approx(overlap, abs=1e-9)


def test_the_overlap_is_the_share_of_radii_that_fall_in_the_next_level() -> None:
    """What the proposition means, on norms of Gaussian vectors in 3072 dimensions (chi law): the
    mass of one level's radii within three deviations of the next larger one's."""
    dimension, gamma = 3072, level_ratio(3072)
    centre, width = math.sqrt(dimension) * gamma, 3 * gamma / math.sqrt(2)
    law = stats.chi(dimension)
    # The normal law of a radius is good to 1/sqrt(D) = 0.018.
    assert law.cdf(centre + width) - law.cdf(centre - width) == pytest.approx(0.567, abs=0.018)


@pytest.mark.parametrize("dimension", [1, 2, 4, 5, 12])
def test_low_dimensions_get_a_ratio_of_at_most_2_and_say_so(dimension: int) -> None:
    scales = suggest_noise_scales(two_points(6.0, dimension))
    assert scales.capped
    assert scales.ratio <= 2
    assert scales.levels == 1 + math.ceil(math.log2(600))
    assert f"at D = {dimension} that is a ratio above 2" in scales.explain()


@pytest.mark.parametrize(("ratio", "steps"), [(1.0376, 5), (1.35, 3), (1.9, 1), (1.01, 20)])
def test_the_step_brings_the_variance_as_near_1_as_it_comes(ratio: float, steps: int) -> None:
    """Against a scan over a million steps."""
    scan = np.linspace(1e-6, 1, 1_000_001)
    values = np.abs([variance_ratio(scan, ratio, steps)] - np.float64(1))[0]
    assert langevin_step(ratio, steps) == pytest.approx(scan[values.argmin()], abs=2e-6)


def test_the_variance_is_that_of_langevin_steps_at_one_point() -> None:
    """The recursion of a step on data at 0, where the score is ``-x / sigma^2``."""
    ratio, steps, step = 1.3, 5, 0.2
    variance = ratio**2
    for _ in range(steps):
        variance = (1 - step) ** 2 * variance + 2 * step
    assert variance_ratio(step, ratio, steps) == pytest.approx(variance, rel=1e-12)


def test_the_largest_distance_is_brute_forces() -> None:
    x = torch.randn(2500, 1, 3, 2, generator=torch.Generator().manual_seed(0))
    flat = x.reshape(2500, -1).double()
    brute = max(float((flat - row).norm(dim=1).max()) for row in flat)
    assert largest_distance(x) == pytest.approx(brute, rel=1e-12)
    scales = suggest_noise_scales(x)
    assert scales.exact
    assert scales.sigma_max == largest_distance(x)
    assert f"all pairwise distances between the {2500}" in scales.explain()


class OnDisk:
    """Rows that are only ever sliced, as a memory-mapped array's are."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.largest = 0

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: slice) -> Tensor:
        assert isinstance(index, slice)
        rows = self.x[index]
        self.largest = max(self.largest, len(rows))
        return rows


def test_what_can_only_be_sliced_gives_the_same_and_is_never_read_whole() -> None:
    x = torch.randn(3000, 2, 2, generator=torch.Generator().manual_seed(1))
    rows = OnDisk(x)
    assert suggest_noise_scales(rows) == suggest_noise_scales(x)
    assert rows.largest < 3000
    part = suggest_noise_scales(OnDisk(x), exact_limit=500, seed=3)
    assert part == suggest_noise_scales(x, exact_limit=500, seed=3)


def test_a_subsample_is_stated_and_set_by_its_seed() -> None:
    x = torch.randn(3000, 4, generator=torch.Generator().manual_seed(1))
    whole = suggest_noise_scales(x)
    parts = [suggest_noise_scales(x, exact_limit=400, seed=seed) for seed in (0, 0, 1)]
    assert parts[0] == parts[1]
    assert parts[0].sigma_max != parts[2].sigma_max
    assert not parts[0].exact
    assert parts[0].sigma_max < whole.sigma_max
    assert "random subsample of 400 of the 3000" in parts[0].explain()


def test_the_scales_become_an_sde_and_langevin_settings() -> None:
    scales = suggest_noise_scales(two_points(12.0, 64), steps=4)
    sde = scales.sde()
    assert (sde.sigma_min, sde.sigma_max) == (0.01, 12.0)
    langevin = AnnealedLangevin(**scales.langevin())
    assert langevin.steps == 4
    # d = step_size sigma_i^2 = epsilon sigma_i^2 / sigma_L^2 (their algorithm 1).
    assert langevin.step_size * 3.0**2 == pytest.approx(scales.step_size * (3.0 / 0.01) ** 2)
    json.dumps(scales.config(), allow_nan=False)


@pytest.mark.parametrize(
    ("data", "settings", "error", "message"),
    [
        (torch.zeros(1, 3), {}, ValueError, "at least 2 samples to tell apart, got 1"),
        (torch.zeros(5, 3), {}, ValueError, "below the largest distance in the data, 0"),
        (torch.tensor([[0.0], [math.nan]]), {}, ValueError, "data must be finite"),
        (torch.zeros(5, 3).long(), {}, TypeError, r"convert it with .float\(\)"),
        (np.zeros((5, 3)), {}, TypeError, "got ndarray"),
        (torch.eye(3), {"sigma_min": 2.0}, ValueError, "give a smaller sigma_min"),
        (torch.eye(3), {"steps": 0}, ValueError, "steps must be at least 1"),
        (torch.eye(3), {"overlap": 1.0}, ValueError, "overlap must lie in"),
        (torch.eye(3), {"exact_limit": 1}, ValueError, "exact_limit must be at least 2"),
    ],
)
def test_what_does_not_fit_is_refused(data, settings, error, message) -> None:
    with pytest.raises(error, match=message):
        suggest_noise_scales(data, **settings)


def test_the_command_prints_the_derivation_and_what_to_do_with_it(tmp_path) -> None:
    x = np.random.default_rng(0).normal(size=(60, 3, 4, 4)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    arguments = ["noise-scales", str(tmp_path / "x.npy"), "--steps", "3", "--limit", "40"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "proposition 3" in result.stdout
    assert "random subsample of 40" in result.stdout
    assert "annealed_langevin(step_size=" in result.stdout
    missing = CliRunner().invoke(app, ["noise-scales", "digist"])
    assert missing.exit_code == 2
    assert "Did you mean 'digits'" in missing.stderr
