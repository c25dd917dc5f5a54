"""Distances between two sets of samples, and how sure we are of them.

Samples are tensors ``(N, *event)``; events are flattened, so ``D`` below is the size of one event.
Distances are computed in float64 on the CPU. Each is biased upwards at finite N, which is why every
one of them is shown beside its *floor*: the same code, at the same sample sizes, on two independent
sets of true samples.

Where POT and torchmetrics do it, they do it: exact Wasserstein, Fréchet. Sliced Wasserstein takes
POT's projections but sorts with NumPy: POT's general one-dimensional solver needs 50 ms for 2,000
samples and 128 projections, sorting 2 ms. Nothing of size (N, M) is kept: 20,000 samples against
20,000 in the plane take about a second and 30 MiB for the energy distance, 0.1 s and 60 MiB for the
sliced one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sde_diffusion.errors import require_count, unknown_name

BLOCK = 512  # rows per tile of a distance matrix: 2 MiB in float64, stays in a core's cache
WORTH_THREADS = 64  # tiles that make up for starting threads
PROJECTIONS = 128
W2_SAMPLES = 500


class MetricInfo(NamedTuple):
    """What a metric's number means: axis label, unit and which direction is better."""

    label: str
    unit: str
    lower_is_better: bool = True


METRICS: dict[str, MetricInfo] = {
    "energy": MetricInfo("Energy distance (squared)", "units of x"),
    "sliced_w2": MetricInfo("Sliced Wasserstein-2", "units of x"),
    "w2": MetricInfo("Wasserstein-2", "units of x"),
    "rms": MetricInfo("RMS distance to the fine solution", "units of x"),
    "median": MetricInfo("Median distance to the fine solution", "units of x"),
    "frechet": MetricInfo("Fréchet distance", "features squared"),
    "kid": MetricInfo("Kernel distance (KID)", "squared"),
    "precision": MetricInfo("Precision", "fraction", lower_is_better=False),
    "density": MetricInfo("Density", "neighbourhoods over k", lower_is_better=False),
    "coverage": MetricInfo("Coverage", "fraction", lower_is_better=False),
    "error": MetricInfo("ODE: RMS distance to the fine solution", "SDE: |mean log p − true|, nats"),
    "posterior": MetricInfo("Posterior of the class", "probability", lower_is_better=False),
    "variance": MetricInfo("Variance within classes", "real data is 1", lower_is_better=False),
    "recall": MetricInfo("Recall", "share of real data", lower_is_better=False),
    "saturation": MetricInfo("Saturation", "share beyond the range"),
    "relative": MetricInfo("Error against the fine ODE", "deviations of the data"),
    "accuracy": MetricInfo("Label accuracy", "fraction", lower_is_better=False),
}
SET_METRICS = ("energy", "sliced_w2", "w2")


Classes = tuple[Tensor | None, Tensor | None]


def energy_distance(
    x: Tensor, y: Tensor, *, unbiased: bool = False, classes: Classes = (None, None)
) -> float:
    """Squared energy distance ``2 E|X-Y| - E|X-X'| - E|Y-Y'|``, in the units of x.

    Székely and Rizzo 2013, "Energy statistics", eq. (5.1). Not rooted (SciPy's one-dimensional
    ``energy_distance`` is its square root).

    Args:
        x, y: (N, *event) and (M, *event).
        unbiased: False: V-statistic; never negative, about ``E|X-X'| (1/N + 1/M)`` when both
            laws are the same. True: U-statistic; zero on average then, and sometimes negative.
        classes: of x (N,) and of y (M,), where their numbers are given and not drawn: pairs within
            a class are then too few, and an unbiased distance must weigh them more.
    """
    a, b = _pair(x, y)
    across = 2 * _mean_distance(a, b)
    if not unbiased:
        return across - _spread(a, unbiased) - _spread(b, unbiased)
    return across - _unbiased_spread(a, classes[0]) - _unbiased_spread(b, classes[1])


def sliced_w2(
    x: Tensor, y: Tensor, *, projections: int | np.ndarray = PROJECTIONS, seed: int = 0
) -> float:
    """Sliced Wasserstein-2 distance (rooted), in the units of x.

    ``sqrt(mean over directions of W2²)``, Bonneel et al. 2015, eq. (6).

    Args:
        x, y: (N, *event) and (M, *event).
        projections: how many directions to draw from ``seed``, or the directions (D, P).
    """
    a, b = (s.numpy() for s in _pair(x, y))
    directions = _directions(a.shape[1], projections, seed)
    return _sorted_w2(_sorted_projections(a, directions), _sorted_projections(b, directions))


def w2(x: Tensor, y: Tensor, *, samples: int | None = W2_SAMPLES) -> float:
    """Exact Wasserstein-2 distance (rooted) between the first ``samples`` of each, in units of x.

    POT's network simplex on squared Euclidean cost. Its time grows as N² to N³ (15 ms for 500,
    70 ms for 1,000, 0.4 s for 2,000 in two dimensions), hence the limit.

    Args:
        x, y: (N, *event) and (M, *event).
        samples: at most so many samples of each; None: all.
    """
    import ot

    a, b = (s[:samples].numpy() for s in _pair(x, y))
    cost = ot.dist(a, b, metric="sqeuclidean")
    return math.sqrt(max(float(ot.emd2([], [], cost, numItermax=10_000_000)), 0.0))


def paired_distances(x: Tensor, reference: Tensor) -> Tensor:
    """Euclidean distance of each sample from its own reference: (N,), in the units of x.

    For a deterministic sampler, with the finely solved ODE from the same noise as reference.
    """
    if x.shape != reference.shape:
        raise ValueError(
            f"reference must pair with x sample by sample: shapes {tuple(reference.shape)} "
            f"and {tuple(x.shape)}"
        )
    a, b = _pair(x, reference)
    return (a - b).norm(dim=1)


def rms_distance(x: Tensor, reference: Tensor) -> float:
    """Root of the mean squared distance between paired samples, in the units of x."""
    return math.sqrt(float(paired_distances(x, reference).square().mean()))


def median_distance(x: Tensor, reference: Tensor) -> float:
    """Median distance between paired samples: blind to the few that ended in another mode."""
    return float(paired_distances(x, reference).median())


def frechet_from_moments(mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor) -> float:
    """Fréchet distance ``|μ_x - μ_y|² + tr(Σ_x + Σ_y - 2 (Σ_x Σ_y)^½)`` of two Gaussians.

    Dowson and Landau 1982. Means (D,), covariances (D, D), singular ones too (fewer samples than
    features; POT's and SciPy's matrix roots give NaN there); in squared units of the features.
    """
    mean_x, cov_x, mean_y, cov_y = (
        m.detach().cpu().double() for m in (mean_x, cov_x, mean_y, cov_y)
    )
    values, vectors = torch.linalg.eigh(cov_x)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_y @ root).clamp_min(0).sqrt().sum()
    distance = (mean_x - mean_y).square().sum() + cov_x.trace() + cov_y.trace() - 2 * cross
    return max(float(distance), 0.0)


class FrechetReference:
    """Fréchet distance between Gaussians fitted to features, the real ones fitted once.

    torchmetrics' ``FrechetInceptionDistance`` with features that are already computed, in place of
    an Inception network. Squared, as FID is.

    Args:
        features: (N, F) features of real data, N >= 2.
    """

    def __init__(self, features: Tensor) -> None:
        from torchmetrics.image.fid import FrechetInceptionDistance

        real = _samples("features", features)
        self._metric = FrechetInceptionDistance(
            feature=_Features(real.shape[1]), reset_real_features=False
        ).set_dtype(torch.float64)
        self._width = real.shape[1]
        self._metric.update(self._checked(real), real=True)

    def distance(self, features: Tensor) -> float:
        """Fréchet distance of ``features`` (M, F), M >= 2, from the real ones."""
        self._metric.reset()
        self._metric.update(self._checked(_samples("features", features)), real=False)
        return float(self._metric.compute())

    def _checked(self, features: Tensor) -> Tensor:
        if features.shape[1] != self._width or len(features) < 2:
            raise ValueError(
                f"features must have shape (N >= 2, {self._width}), got {tuple(features.shape)}"
            )
        return features


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to features ``x`` (N, F) and ``y`` (M, F)."""
    return FrechetReference(y).distance(x)


def label_accuracy(logits: Tensor, labels: Tensor | int) -> float:
    """Share of samples whose largest logit is at their label.

    Args:
        logits: (N, C), or predicted labels (N,) of an integer dtype.
        labels: (N,) or one label for all.
    """
    predicted = logits.argmax(dim=1) if logits.ndim == 2 else logits
    if predicted.ndim != 1 or predicted.is_floating_point() or len(predicted) == 0:
        raise ValueError(
            "logits must have shape (N, C), or (N,) with an integer dtype, "
            f"got {tuple(logits.shape)} of {logits.dtype}"
        )
    wanted = torch.as_tensor(labels, device=predicted.device)
    if wanted.ndim and wanted.shape != predicted.shape:
        raise ValueError(
            f"labels must be one label or have shape ({len(predicted)},), got {tuple(wanted.shape)}"
        )
    return float((predicted == wanted).double().mean())


class Reference:
    """A block of true samples, with all that comparisons with it share computed once.

    Every sampler meets the same true samples and projections, so that differences between samplers
    are less noisy than each.

    Args:
        true: (N, *event), independent of what is compared.
        metrics: which of ``SET_METRICS``.
        w2_samples: so many samples of each are used by the exact Wasserstein distance.
        projections: directions of the sliced one, drawn from ``seed``.
    """

    def __init__(
        self,
        true: Tensor,
        *,
        metrics: Sequence[str] = SET_METRICS,
        w2_samples: int | None = W2_SAMPLES,
        projections: int = PROJECTIONS,
        seed: int = 0,
    ) -> None:
        for name in metrics:
            if name not in SET_METRICS:
                raise unknown_name("metric", name, SET_METRICS)
        self.metrics = tuple(metrics)
        self._w2_samples = w2_samples
        self._true = _samples("true", true)
        self._directions = _directions(self._true.shape[1], projections, seed)
        self._spread = _spread(self._true, unbiased=False) if "energy" in metrics else 0.0
        self._sorted: np.ndarray | None = None
        if "sliced_w2" in metrics:
            self._sorted = _sorted_projections(self._true.numpy(), self._directions)

    def compare(self, sampled: Tensor) -> dict[str, float]:
        """Every metric of samples (M, *event); of other true samples, M = N, the floor."""
        return {name: self._one(name, sampled) for name in self.metrics}

    def _one(self, name: str, x: Tensor) -> float:
        a, b = _pair(x, self._true)
        if name == "energy":
            return 2 * _mean_distance(a, b) - _spread(a, unbiased=False) - self._spread
        if name == "w2":
            return w2(a, b, samples=self._w2_samples)
        if self._sorted is None:
            return sliced_w2(a, b, projections=self._directions)
        return _sorted_w2(_sorted_projections(a.numpy(), self._directions), self._sorted)


class _Features(torch.nn.Module):
    """Stands where torchmetrics expects a network: its input is already the features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def _samples(name: str, x: Tensor) -> Tensor:
    if not isinstance(x, Tensor) or x.ndim < 1 or x.numel() == 0:
        found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must be a tensor of samples (N, *event), got {found}")
    flat = x.detach().reshape(len(x), -1).cpu().double()
    if not bool(flat.isfinite().all()):
        raise ValueError(f"{name} must be finite: it holds NaN or infinity")
    return flat


def _pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    a, b = _samples("x", x), _samples("y", y)
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            "x and y must hold events of one size, "
            f"got shapes {tuple(x.shape)} and {tuple(y.shape)}"
        )
    return a, b


def _mean_distance(a: Tensor, b: Tensor) -> float:
    if a.shape[1] == 1:
        return _sorted_distances(a[:, 0], b[:, 0]) / (len(a) * len(b))
    columns = b.split(BLOCK)
    return _distances([(x, y) for x in a.split(BLOCK) for y in columns]) / (len(a) * len(b))


def _spread(a: Tensor, unbiased: bool) -> float:
    """Mean distance within one set: over all pairs, or (unbiased) over pairs of two samples."""
    n = len(a)
    if unbiased and n < 2:
        raise ValueError("an unbiased energy distance needs at least 2 samples of each, got 1")
    if a.shape[1] == 1:
        # In order, the i-th of n is the larger one of i pairs and the smaller one of n - 1 - i.
        ordered = a[:, 0].sort().values
        ranks = torch.arange(n, dtype=torch.float64)
        total = 2 * float((2 * ranks - (n - 1)) @ (ordered - ordered.mean()))
    else:
        tiles = a.split(BLOCK)
        pairs = [(x, y) for i, x in enumerate(tiles) for y in tiles[i + 1 :]]
        total = _distances([(x, x) for x in tiles]) + 2 * _distances(pairs)
    return total / (n * (n - 1) if unbiased else n * n)


def _unbiased_spread(a: Tensor, classes: Tensor | None) -> float:
    """Mean distance of two independent samples of a law, whose classes have the shares they have
    here."""
    if classes is None:
        return _spread(a, unbiased=True)
    parts = [a[classes == label] for label in classes.unique()]
    # Over all pairs, those of a sample with itself too; these are made up for class by class.
    whole = _spread(a, unbiased=False)
    for part in parts:
        share = len(part) / len(a)
        whole += share**2 * (_spread(part, unbiased=True) - _spread(part, unbiased=False))
    return whole


def _sorted_distances(a: Tensor, b: Tensor) -> float:
    """The sum of |a_i - b_j| over all pairs of numbers, (N,) and (M,), in N log M operations."""
    centre = b.mean()
    b = (b - centre).sort().values
    a = a - centre
    below = torch.searchsorted(b, a)
    sums = torch.cat([b.new_zeros(1), b.cumsum(0)])
    return float((a * (2 * below - len(b)) + sums[-1] - 2 * sums[below]).sum())


def _distances(tiles: list[tuple[Tensor, Tensor]]) -> float:
    """The sum of all distances in pairs of blocks.

    Torch on one thread, and as many tiles at a time as it had threads: a tile takes a millisecond,
    and two threads in one tile wait for each other for many on a busy machine. Summed without
    rounding, so that how it was done changes nothing.
    """
    threads = torch.get_num_threads()
    if threads > 1 and len(tiles) >= WORTH_THREADS:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return math.fsum(pool.map(_tile, tiles))
    torch.set_num_threads(1)
    try:
        return math.fsum(map(_tile, tiles))
    finally:
        torch.set_num_threads(threads)


def _tile(pair: tuple[Tensor, Tensor]) -> float:
    distances = torch.cdist(*pair)
    if pair[0] is pair[1]:
        distances.fill_diagonal_(0)  # exactly, whatever rounding left there
    return float(distances.sum())


def _directions(width: int, projections: int | np.ndarray, seed: int) -> np.ndarray:
    if isinstance(projections, np.ndarray):
        return projections
    count = require_count("projections", projections)
    drawn = np.random.RandomState(seed).normal(size=(width, count))  # as POT draws them
    return np.asarray(drawn / np.linalg.norm(drawn, axis=0), dtype=np.float64)


def _sorted_projections(samples: np.ndarray, directions: np.ndarray) -> np.ndarray:
    return np.sort(directions.T @ samples.T, axis=1)


def _sorted_w2(a: np.ndarray, b: np.ndarray) -> float:
    """Of sorted projections (P, N) and (P, M): quantile functions are steps, so that their
    difference changes at multiples of 1/N and of 1/M only."""
    n, m = a.shape[1], b.shape[1]
    if n == m:
        return math.sqrt(float(np.mean((a - b) ** 2)))
    ends = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)  # in units of 1 / (N M)
    apart = (a[:, (ends - 1) // m] - b[:, (ends - 1) // n]) ** 2
    return math.sqrt(float(np.mean(apart @ np.diff(ends, prepend=0))) / (n * m))
