"""Metrics of features beyond their first two moments: kernel distance and nearest neighbours.

Features are ``(N, F)``; everything is computed in float64 on the CPU. Like every distance here they
depend on the sample sizes, so that each stands beside its floor, of as many held-out samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sde_diffusion.errors import require_count
from sde_diffusion.seeding import generator_for

NEIGHBOUR_METRICS = ("precision", "recall", "density", "coverage")
FEATURE_METRICS = ("kid", *NEIGHBOUR_METRICS)
KID_SUBSETS, KID_SIZE = 50, 1000
PRECISION_K, DENSITY_K = 3, 5  # as the papers have them
_ROWS = 256  # of a distance matrix at a time


def kernel_distance(
    x: Tensor, y: Tensor, *, subsets: int = KID_SUBSETS, size: int = KID_SIZE, seed: int = 0
) -> float:
    """Kernel distance (KID) of features x (N, F) and y (M, F), N and M >= 2.

    The mean over random subsets of torchmetrics' unbiased squared MMD with the kernel ``(x·y / F +
    1)³`` (Binkowski et al. 2018, arXiv:1801.01401, sec. 4). It may be negative: it is 0 on average
    where both have one law.

    Args:
        subsets: how many; one where both sets are taken whole.
        size: of a subset, as far as both sets reach.
        seed: of the choice.
    """
    from torchmetrics.image.kid import poly_mmd

    x, y = _pair(x, y)
    size = min(require_count("size", size, least=2), len(x), len(y))
    if size < 2:
        raise ValueError(f"a kernel distance needs at least 2 of each, got {len(x)} and {len(y)}")
    whole = size == len(x) == len(y)
    generator = generator_for(seed)

    def some(features: Tensor) -> Tensor:
        return features[torch.randperm(len(features), generator=generator)[:size]]

    found = [
        float(poly_mmd(some(y), some(x)))
        for _ in range(1 if whole else require_count("subsets", subsets))
    ]
    return sum(found) / len(found)


class Neighbourhoods:
    """Nearest-neighbour metrics against real features, whose neighbourhoods are found once.

    The neighbourhood of a feature is the closed ball that reaches to its k-th nearest neighbour
    among the others of its set. Precision and recall: the share of samples within a neighbourhood
    of a real one, and of real ones within a neighbourhood of a sample (Kynkäänniemi et al. 2019,
    arXiv:1904.06991, eqs. 1 and 2; k = 3). Density: neighbourhoods of real ones that a sample lies
    in, over k, on average; coverage: the share of real ones with a sample in their neighbourhood
    (Naeem et al. 2020, arXiv:2002.09797, sec. 3; k = 5). Density may exceed 1.

    Args:
        real: (N, F), N above the largest k.
        precision_k, density_k: neighbours.
    """

    def __init__(
        self, real: Tensor, *, precision_k: int = PRECISION_K, density_k: int = DENSITY_K
    ) -> None:
        self._real = _checked("real", real)
        self._ks = require_count("precision_k", precision_k), require_count("density_k", density_k)
        if len(self._real) <= max(self._ks):
            raise ValueError(
                f"real needs more than {max(self._ks)} samples for neighbours, got {len(real)}"
            )
        self._radii = _radii(self._real, self._ks)

    def compare(
        self, features: Tensor, metrics: Sequence[str] = NEIGHBOUR_METRICS
    ) -> dict[str, float]:
        """The ``metrics`` of samples' features (M, F), M above k for recall."""
        fake = _pair(features, self._real)[0]
        near, dense = self._radii
        own = _own_radii(fake, self._ks[0]) if "recall" in metrics else None
        precise = balls = 0
        recalled, covered = (torch.zeros(len(self._real), dtype=torch.bool) for _ in range(2))
        for rows, distances in _tiles(fake, self._real):
            precise += int((distances <= near).any(1).sum())
            within = distances <= dense
            balls += int(within.sum())
            covered |= within.any(0)
            if own is not None:
                recalled |= _reached(distances, own[rows])
        found = {
            "precision": precise / len(fake),
            "recall": float(recalled.double().mean()),
            "density": balls / (self._ks[1] * len(fake)),
            "coverage": float(covered.double().mean()),
        }
        return {name: found[name] for name in metrics}


def recall(real: Tensor, features: Tensor, k: int = PRECISION_K) -> float:
    """Share of ``real`` (N, F) within a neighbourhood of ``features`` (M, F), M above k.

    `Neighbourhoods` without the neighbourhoods of the real ones, which recall does not ask for. It
    grows with the number of samples, so compare figures of equal numbers only.
    """
    fake, true = _pair(features, real)
    own = _own_radii(fake, require_count("k", k))
    found = torch.zeros(len(true), dtype=torch.bool)
    for rows, distances in _tiles(fake, true):
        found |= _reached(distances, own[rows])
    return float(found.double().mean())


def _own_radii(fake: Tensor, k: int) -> Tensor:
    if len(fake) <= k:
        raise ValueError(f"recall needs more than {k} samples, got {len(fake)}")
    return _radii(fake, (k,))[0]


def _reached(distances: Tensor, own: Tensor) -> Tensor:
    """Which columns lie within the radius (rows,) of some row."""
    return (distances <= own[:, None]).any(0)


def _radii(x: Tensor, ks: Sequence[int]) -> tuple[Tensor, ...]:
    """The distance of each to its k-th nearest among the others, ``(N,)``, for each k."""
    found = []
    for rows, distances in _tiles(x, x):
        distances[torch.arange(len(distances)), rows] = torch.inf  # not to itself
        found.append(distances.topk(max(ks), largest=False).values)
    nearest = torch.cat(found)
    return tuple(nearest[:, k - 1] for k in ks)


def _tiles(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Indices of some rows of x, and their distances from all of y."""
    for rows in torch.arange(len(x)).split(_ROWS):
        # By differences: products would give equal features a distance above 0.
        yield rows, torch.cdist(x[rows], y, compute_mode="donot_use_mm_for_euclid_dist")


def _pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    a, b = _checked("x", x), _checked("y", y)
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"x and y must have as many features, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    return a, b


def _checked(name: str, x: Tensor) -> Tensor:
    if x.ndim != 2 or len(x) == 0:
        raise ValueError(f"{name} must be features (N, F), got shape {tuple(x.shape)}")
    wide = x.detach().cpu().double()
    if not bool(wide.isfinite().all()):
        raise ValueError(f"{name} must be finite: it holds NaN or infinity")
    return wide
