"""A network's error by time, and what each solver makes of it.

The score error is weighted as in training, ``sigma² |s_theta - s|² / D = |eps_theta - eps*|² / D``,
its mean over noised data, in ranges of times equally wide in log-SNR. Denoising score matching
measures the same plus what no network can know (the variance of the noise given ``x_t``), so that a
loss is an upper bound of the error and differences of losses are differences of errors.

Amplification: the network's score is used inside one range of times and the exact one outside, and
the solution is compared, sample by sample, with that of the exact score throughout: same solver,
same steps, same noise. Their RMS distance over the RMS error inside the range is how much of an
error there ends up in a sample.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from experiments.metrics import rms_distance
from experiments.spec import spec_of
from sde_diffusion.losses import mean_square, perturbed, simple_loss
from sde_diffusion.prediction import Prediction, ScoreFn
from sde_diffusion.sde import NoiseLevel
from sde_diffusion.validation import Bucket, loss_by_time
from solvers import Integrator, Solver

if TYPE_CHECKING:
    from experiments.budget_problem import Problem


@dataclass(frozen=True)
class Amplified:
    """A solver's answer to the network's error in each range of times.

    Attributes:
        displacement: RMS distance of samples, for each bucket.
        factor: over the RMS error of the network in the bucket; NaN where that is zero.
        whole: RMS distance with the network throughout.
    """

    solver: str
    budget: int
    displacement: tuple[float, ...]
    factor: tuple[float, ...]
    whole: float


@dataclass(frozen=True)
class NetworkError:
    """A network's error by time.

    Attributes:
        loss: denoising score matching by time; empty without data.
        error: against the exact score; empty where that is not known.
        amplified: for each solver and number of evaluations; empty where the exact score is not
            known.
    """

    name: str
    sde: str
    loss: tuple[Bucket, ...]
    error: tuple[Bucket, ...] = ()
    amplified: tuple[Amplified, ...] = ()


@dataclass(frozen=True)
class SwitchedScore:
    """One score in a range of half log-SNR, another outside; sample by sample."""

    inside: ScoreFn
    outside: ScoreFn
    low: float
    high: float

    def __call__(self, x: Tensor, level: NoiseLevel) -> Prediction:
        within = (level.half_log_snr >= self.low) & (level.half_log_snr < self.high)
        if bool(within.all()):
            return self.inside(x, level)
        if not bool(within.any()):
            return self.outside(x, level)
        both = self.inside(x, level).eps, self.outside(x, level).eps
        return Prediction.from_eps(
            x, level, torch.where(within.reshape(-1, *[1] * (x.ndim - 1)), *both)
        )


def score_error_by_time(
    model: Any, exact: Any, x: Tensor, sde: Any, *, buckets: int = 8, seed: int = 0
) -> list[Bucket]:
    """``|eps_theta - eps*|² / D`` on noised samples, by time.

    Args:
        model, exact: called (x, level, label) -> Prediction.
        x: samples of the law that ``exact`` is of, (N, *event).
        sde, buckets, seed: as in `sde_diffusion.validation.loss_by_time`.
    """

    def error(
        model: Any, x0: Tensor, label: Tensor | None, level: NoiseLevel, noise: Tensor
    ) -> Tensor:
        noised = perturbed(x0, level, noise)
        return mean_square(model(noised, level, None).eps - exact(noised, level, None).eps)

    return loss_by_time(model, error, x, None, sde, buckets=buckets, seed=seed)


def error_by_time(problem: Problem, buckets: int) -> tuple[list[Bucket], list[Bucket]]:
    """The loss of a problem's network by time, and its error where the exact score is known.

    Both are of the score without guidance and without classes, and empty without data.
    """
    true = problem.true_samples(0)
    if true is None:
        return [], []
    x, network = true[0].float().to(problem.device), problem.network
    options: dict[str, Any] = {"buckets": buckets, "seed": problem.seed}
    loss = loss_by_time(network, simple_loss, x, None, problem.sde, **options)
    if problem.target is None:
        return loss, []
    exact = problem.target.model(problem.sde)
    return loss, score_error_by_time(network, exact, x, problem.sde, **options)


def displacements(
    problem: Problem, solver: Solver | Integrator, steps: int, error: Sequence[Bucket]
) -> tuple[tuple[float, ...], float]:
    """How far a network's error moves a solver's samples (RMS): in each range of times, and whole.

    Args:
        error: the network's, by time.
    """
    ids, exact = problem.ids(0), functools.partial(problem.score, exact=True)
    truth = problem.solve(solver, steps, ids, score_of=exact).x
    found = []
    for place, bucket in enumerate(error):
        # The ends of the run belong to the first and the last range, whatever rounding says.
        low = -math.inf if place == len(error) - 1 else bucket.half_log_snr_low
        high = math.inf if place == 0 else bucket.half_log_snr_high
        switched = functools.partial(_switched, problem, low, high)
        moved = problem.solve(solver, steps, ids, score_of=switched).x
        found.append(rms_distance(moved, truth))
    return tuple(found), rms_distance(problem.solve(solver, steps, ids).x, truth)


def _switched(problem: Problem, low: float, high: float, ids: Tensor) -> ScoreFn:
    return SwitchedScore(problem.score(ids), problem.score(ids, exact=True), low, high)


def amplified(
    solver: Solver | Integrator,
    budget: int,
    moved: tuple[float, ...],
    whole: float,
    error: Sequence[Bucket],
) -> Amplified:
    """What a solver makes of a network's error; ``moved`` and ``whole`` as of `displacements`."""
    factor = tuple(
        one / math.sqrt(bucket.mean) if bucket.mean > 0 else math.nan
        for one, bucket in zip(moved, error, strict=True)
    )
    return Amplified(spec_of(solver), budget, moved, factor, whole)
