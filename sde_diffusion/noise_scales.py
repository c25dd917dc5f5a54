"""NCSNv2's choices of noise levels and Langevin steps, from the data (Song & Ermon 2020).

"Improved Techniques for Training Score-Based Generative Models", arXiv:2006.09011: techniques 1, 2
and 4 with the propositions they follow from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from sde_diffusion.errors import require_between, require_count, require_finite
from sde_diffusion.sde import VESDE

__all__ = [
    "NoiseScales",
    "langevin_step",
    "largest_distance",
    "level_ratio",
    "suggest_noise_scales",
    "variance_ratio",
]

OVERLAP = 0.567
COARSEST = 2.0
CHUNK = 1024


class Rows(Protocol):
    """Anything with a length whose slices are float tensors (n, *event)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice, /) -> Tensor: ...


@dataclass(frozen=True)
class NoiseScales:
    """Noise levels for VE training and the Langevin steps to sample it with.

    Attributes:
        dimension: D, numbers in one sample.
        count: samples in the data.
        compared: samples whose pairwise distances were taken.
        sigma_max: the largest of these distances.
        sigma_min: the smallest noise level.
        ratio: gamma, of a level to the next smaller one.
        levels: L, of the geometric ladder from sigma_max to sigma_min.
        overlap: proposition 2's overlap of neighbouring levels, at `ratio`.
        wanted: the overlap asked for.
        steps: T, Langevin steps at each level.
        step_size: epsilon: a step at level i has size ``epsilon sigma_i^2 / sigma_min^2``.
        variance: ``s_T^2 / sigma_i^2`` after T steps, by proposition 3.
    """

    dimension: int
    count: int
    compared: int
    sigma_max: float
    sigma_min: float
    ratio: float
    levels: int
    overlap: float
    wanted: float
    steps: int
    step_size: float
    variance: float

    @property
    def exact(self) -> bool:
        """Whether sigma_max is the maximum over all pairs; else it may fall short of it."""
        return self.compared == self.count

    @property
    def relative_step(self) -> float:
        """``epsilon / sigma_min^2``: `solvers.AnnealedLangevin`'s ``step_size``."""
        return self.step_size / self.sigma_min**2

    @property
    def capped(self) -> bool:
        """Whether the dimension is too low for technique 2, so that the ratio is set to 2."""
        return level_ratio(self.dimension, self.wanted) == COARSEST

    def sigmas(self) -> Tensor:
        """The levels, decreasing, (levels,) float64."""
        ends = math.log(self.sigma_max), math.log(self.sigma_min)
        return torch.linspace(*ends, self.levels, dtype=torch.float64).exp()

    def sde(self) -> VESDE:
        """The VE SDE over these levels."""
        return VESDE(sigma_min=self.sigma_min, sigma_max=self.sigma_max)

    def langevin(self) -> dict[str, Any]:
        """Settings of `solvers.AnnealedLangevin`."""
        return {"step_size": self.relative_step, "steps": self.steps}

    def config(self) -> dict[str, Any]:
        """JSON-able figures."""
        return {
            **{name: getattr(self, name) for name in self.__dataclass_fields__},
            "exact": self.exact,
            "relative_step": self.relative_step,
        }

    def explain(self) -> str:
        """Each number and the proposition it follows from, in plain text."""
        if self.exact:
            source = f"the largest of all pairwise distances between the {self.count} samples"
        else:
            source = (
                f"the largest pairwise distance in a random subsample of {self.compared} of the "
                f"{self.count} samples: the true one may be larger"
            )
        overlap = "Phi(sqrt(2D) (gamma - 1) + 3 gamma) - Phi(sqrt(2D) (gamma - 1) - 3 gamma)"
        variance = "s_T^2 / sigma_i^2 = (1 - epsilon / sigma_min^2)^(2T) (gamma^2 - q) + q"
        q = "2 epsilon / (sigma_min^2 - sigma_min^2 (1 - epsilon / sigma_min^2)^2)"
        if self.capped:
            why = (
                f"technique 2 asks for an overlap of {self.wanted:g}, by a law that holds in high "
                f"dimensions; at D = {self.dimension} that is a ratio above {COARSEST:g}, or none, "
                f"so {COARSEST:g} is taken; L is rounded up"
            )
        else:
            why = (
                "technique 2 with proposition 2: samples of a level fall where the next one is "
                f"trained with probability {self.wanted:g}; L is rounded down"
            )
        lines = (
            f"data: {self.count} samples of D = {self.dimension} numbers",
            f"sigma_max = {self.sigma_max:.5g}",
            f"    technique 1 with proposition 1: {source};",
            "    so Langevin steps at this level can move between any two modes",
            f"sigma_min = {self.sigma_min:g}",
            "    given: too small to be seen in a sample",
            f"gamma = {self.ratio:.5g}, L = {self.levels} levels",
            f"    {why}",
            f"    {overlap} = {self.overlap:.3f}",
            f"    L = 1 + log({self.sigma_max:.5g} / {self.sigma_min:g}) / log gamma",
            f"T = {self.steps} steps at each level",
            f"    given: as many as time allows; T L = {self.steps * self.levels} evaluations",
            f"epsilon = {self.step_size:.3g}, epsilon / sigma_min^2 = {self.relative_step:.4g}",
            f"    technique 4 with proposition 3: q = {q},",
            f"    {variance} = {self.variance:.4f}, as near 1 as T steps come",
        )
        return "\n".join(lines)


def suggest_noise_scales(
    data: Tensor | Rows,
    *,
    sigma_min: float = 0.01,
    steps: int = 5,
    overlap: float = OVERLAP,
    exact_limit: int = 10_000,
    seed: int = 0,
) -> NoiseScales:
    """Noise levels and Langevin steps for a data set, as NCSNv2 chooses them.

    Args:
        data: (N, *event) in the range the model is trained in, as a tensor or anything with a
            length whose slices are float tensors; at least two samples that differ.
        sigma_min: the smallest noise level.
        steps: T, Langevin steps at each level (3 to 5 in the paper).
        overlap: of neighbouring levels, in technique 2. Its text says about 0.5; from 0.567 all
            five ladders that the authors published come out level for level (CIFAR-10: 232).
        exact_limit: up to so many samples all pairs are compared; of more, those of a random
            subsample of this size.
        seed: of the subsample.

    Raises:
        TypeError: the data is not float tensors. ValueError: too few samples or values that are not
            finite, all samples equal or nearer than sigma_min, or a number out of range.
    """
    require_finite("sigma_min", sigma_min, above=0.0)
    require_count("steps", steps)
    require_between("overlap", overlap, 0.01, 0.99)
    require_count("exact_limit", exact_limit, least=2)
    require_count("seed", seed, least=0)
    count = len(data)
    if count < 2:
        raise ValueError(f"data must hold at least 2 samples to tell apart, got {count}")
    first = _rows(data, 0, 1)
    dimension = first[0].numel()
    if count > exact_limit:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(count, generator=generator)[:exact_limit].sort().values.tolist()
        data = torch.cat([_rows(data, i, i + 1) for i in chosen])
    sigma_max = largest_distance(data)
    if sigma_max <= sigma_min:
        raise ValueError(
            f"sigma_min={sigma_min!r} must be below the largest distance in the data, "
            f"{sigma_max:.4g}; give a smaller sigma_min"
        )
    ratio = level_ratio(dimension, overlap)
    exact_levels = 1 + math.log(sigma_max / sigma_min) / math.log(ratio)
    rounded = math.ceil(exact_levels) if ratio == COARSEST else math.floor(exact_levels)
    levels = max(2, rounded)
    ratio = (sigma_max / sigma_min) ** (1 / (levels - 1))
    relative = langevin_step(ratio, steps)
    return NoiseScales(
        dimension=dimension,
        count=count,
        compared=min(count, exact_limit),
        sigma_max=sigma_max,
        sigma_min=sigma_min,
        ratio=ratio,
        levels=levels,
        overlap=_overlap(ratio, dimension),
        wanted=overlap,
        steps=steps,
        step_size=relative * sigma_min**2,
        variance=variance_ratio(relative, ratio, steps),
    )


def largest_distance(data: Tensor | Rows) -> float:
    """The largest Euclidean distance between two samples: all N (N - 1) / 2 pairs, in chunks.

    The farthest pair of each two chunks is found in the data's precision and its distance taken in
    float64.
    """
    count, best = len(data), 0.0
    for start in range(0, count, CHUNK):
        left = _rows(data, start, start + CHUNK)
        for other in range(start, count, CHUNK):
            right = left if other == start else _rows(data, other, other + CHUNK)
            place = int(torch.cdist(left, right).argmax())
            pair = left[place // len(right)].double() - right[place % len(right)].double()
            best = max(best, float(pair.norm()))
    return best


def _rows(data: Tensor | Rows, start: int, stop: int) -> Tensor:
    """Samples start .. stop, flat, (n, D), checked."""
    rows = cast(Rows, data)[start:stop]
    if not isinstance(rows, Tensor) or not rows.is_floating_point():
        kind = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(f"data must be float tensors, got {kind}; convert it with .float()")
    if not bool(rows.isfinite().all()):
        raise ValueError(
            f"data must be finite; a sample in {start}..{start + len(rows) - 1} is not"
        )
    return rows.reshape(len(rows), -1)


def _overlap(ratio: float, dimension: int) -> float:
    shift = math.sqrt(2 * dimension) * (ratio - 1)
    return _normal_cdf(shift + 3 * ratio) - _normal_cdf(shift - 3 * ratio)


def _normal_cdf(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))


def level_ratio(dimension: int, overlap: float = OVERLAP) -> float:
    """gamma with ``Phi(sqrt(2D)(gamma - 1) + 3 gamma) - Phi(sqrt(2D)(gamma - 1) - 3 gamma) =
    overlap``.

    Song & Ermon 2020, proposition 2 and technique 2. At most 2: in low dimensions (below 18 for an
    overlap of 0.5) the equation asks for more, and below 5 every ratio overlaps by its measure, for
    the normal law of a radius that it rests on is one of high dimensions.
    """
    require_count("dimension", dimension)
    require_between("overlap", overlap, 0.01, 0.99)
    if _overlap(COARSEST, dimension) >= overlap:
        return COARSEST
    return _first_beyond(lambda ratio: _overlap(ratio, dimension) < overlap, 1.0, COARSEST)


def variance_ratio(relative_step: float, ratio: float, steps: int) -> float:
    """``s_T^2 / sigma_i^2`` after T Langevin steps at level i, from the level before.

    Song & Ermon 2020, proposition 3, with ``relative_step = epsilon / sigma_L^2``: for data at one
    point, the variance of a sample to that of the level.
    """
    left = (1 - relative_step) ** (2 * steps)
    q = 2 / (2 - relative_step)
    return left * (ratio**2 - q) + q


def langevin_step(ratio: float, steps: int) -> float:
    """``epsilon / sigma_L^2`` for which `variance_ratio` is nearest 1 (technique 4).

    For steps in (0, 1] the ratio stays above 1; it falls first and grows later, and its lowest
    point is where its derivative changes sign.
    """
    require_finite("ratio", ratio, above=1.0)
    require_count("steps", steps)

    def grows(step: float) -> bool:
        q, left = 2 / (2 - step), (1 - step) ** (2 * steps - 1)
        falling = 2 * steps * left * (ratio**2 - q)
        return 0.5 * q**2 * (1 - left * (1 - step)) > falling

    return _first_beyond(grows, 0.0, 1.0)


def _first_beyond(condition: Callable[[float], bool], low: float, high: float) -> float:
    """Where a condition that is false at low and true at high becomes true, by bisection."""
    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if condition(middle) else (middle, high)
    return high
