"""The parts of an error budget, each measured between two sets of samples, in one unit.

The unit is the energy distance, rooted: ``D(p, q) = sqrt(2 E|X-Y| - E|X-X'| - E|Y-Y'|)`` (Székely
and Rizzo 2013, "Energy statistics"). It is a metric on laws, so that the parts of a chain of laws

    data -> data at t_min -> exact solution from the prior -> the same with the network -> sampler

add up to at least the distance from one end to the other: D(data, sampler) <= sum of the parts.
The two sets of a part share their noise (or their data points): sample i of one and sample i of the
other differ by the part alone. With pairs i != j only, the estimate of D² has no bias, and being
near each other makes its spread small: `paired_energy`.

docs/error-budget.md says what each part is, and which of them guided samples have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.budget_problem import Problem
from experiments.intervals import Interval, t_interval
from experiments.metrics import energy_distance
from solvers import Solver

ORDER = ("truncation", "prior_mismatch", "score_error", "rest", "discretisation")
_TILE = 512
Squares = dict[str, float]  # part -> D²


@dataclass(frozen=True)
class Part:
    """One part of an error budget.

    Attributes:
        squared: D² of each repeat, unbiased unless it is the floor; may be negative.
        value: D, the root of their mean; 0 where that is negative.
        interval: 95 % interval of D; None for a single repeat.
    """

    squared: tuple[float, ...]

    @property
    def value(self) -> float:
        return math.sqrt(max(0.0, sum(self.squared) / len(self.squared)))

    @property
    def interval(self) -> Interval | None:
        found = t_interval(self.squared)
        if found is None:
            return None
        return Interval(*(math.sqrt(max(0.0, end)) for end in found))

    @property
    def resolved(self) -> bool:
        """Whether it is above zero beyond Monte Carlo."""
        return self.interval is not None and self.interval.low > 0


def paired_energy(x: Tensor, y: Tensor, classes: Tensor | None = None) -> float:
    """Unbiased ``D²`` of two laws from pairs ``(x_i, y_i)``, independent from pair to pair.

    ``mean over i != j of |x_i - y_j| + |y_i - x_j| - |x_i - x_j| - |y_i - y_j|``: each term has the
    mean D² whatever ties x_i to y_i, and is small where they are near each other.

    Args:
        x, y: (N, *event), N >= 2.
        classes: (N,) of the pairs, where their numbers are given and not drawn: the pairs of pairs
            within a class are then too few, and weigh more.
    """
    if x.shape != y.shape or len(x) < 2:
        raise ValueError(
            f"x and y must be at least two pairs of one shape, got {tuple(x.shape)} and "
            f"{tuple(y.shape)}"
        )
    a, b = (s.detach().cpu().double().flatten(1) for s in (x, y))
    if not bool(a.isfinite().all() and b.isfinite().all()):
        raise ValueError("x and y must be finite: they hold NaN or infinity")
    weights = _within_weights(classes)
    total = 0.0
    for rows in torch.arange(len(a)).split(_TILE):
        for columns in torch.arange(len(a)).split(_TILE):
            # Differences of distances first: they are many digits smaller than the distances.
            apart = _distances(a[rows], b[columns]) + _distances(b[rows], a[columns])
            apart -= _distances(a[rows], a[columns]) + _distances(b[rows], b[columns])
            apart.masked_fill_(rows[:, None] == columns, 0.0)
            if classes is not None and weights is not None:
                alike = classes[rows][:, None] == classes[columns]
                apart *= torch.where(alike, weights[rows][:, None], 1.0)
            total += float(apart.sum())
    return total / (len(a) * (len(a) - 1 if weights is None else len(a)))


def _within_weights(classes: Tensor | None) -> Tensor | None:
    """n / (n - 1) for the n samples of each one's class."""
    if classes is None:
        return None
    _, place, count = classes.unique(return_inverse=True, return_counts=True)
    if int(count.min()) < 2:
        raise ValueError("an unbiased distance needs at least 2 samples of each class, got 1")
    return (count / (count - 1.0)).double()[place]


def law_parts(problem: Problem, repeat: int) -> Squares:
    """What is the same for all solvers: truncation, and what true samples score."""
    found = {}
    if problem.target is not None and problem.law_known:
        found["truncation"] = paired_energy(*problem.truncated(repeat), problem.classes(repeat))
    true = problem.true_samples(repeat)
    if true is not None:
        found["floor"] = energy_distance(*true)
    return found


def reference_parts(
    problem: Problem, reference: Solver, steps: int, repeat: int
) -> tuple[Squares, dict[str, Tensor]]:
    """What is the same for all solvers of one equation, and the fine solution ``x`` of it.

    Args:
        reference, steps: of the fine solution.

    Returns:
        Parts, with ``reference``, how far the fine solution can be off: from one with half its
        steps. Tensors: ``x``, and where no data has the law that is sampled ``true``, samples of
        it.
    """
    ids, classes = problem.ids(repeat), problem.classes(repeat)
    fine = problem.fine(reference, steps, ids)
    exact = fine
    found, tensors = {}, {"x": fine}
    if repeat == 0:
        found["reference"] = paired_energy(problem.fine(reference, steps // 2, ids), fine, classes)
    if problem.target is None:
        true = problem.true_samples(repeat)
        if true is not None:
            found["rest"] = energy_distance(fine, true[0], unbiased=True, classes=(classes, None))
        return found, tensors
    if problem.network is not None:
        exact = problem.fine(reference, steps, ids, exact=True)
        found["score_error"] = paired_energy(fine, exact, classes)
    if problem.law_known:
        noised = problem.start(ids, problem.law_samples(repeat))
        from_law = problem.fine(reference, steps, ids, exact=True, start=noised)
        found["prior_mismatch"] = paired_energy(exact, from_law, classes)
    else:
        true = problem.guided_truth(reference, steps, repeat)
        found["floor"] = energy_distance(*true)
        tensors["true"] = true[0]
    return found, tensors


def solver_parts(
    problem: Problem, x: Tensor, fine: Tensor, true: Tensor | None, repeat: int
) -> Squares:
    """What is a solver's own.

    Args:
        x: its samples.
        fine: the fine solution from the same noise.
        true: samples of the law, where they are not the problem's true samples.
    """
    classes = problem.classes(repeat)
    found = {"discretisation": paired_energy(x, fine, classes)}
    known = problem.true_samples(repeat)
    if true is None and known is not None:
        true = known[0]
    if true is not None:
        # Real samples have the classes they happen to have.
        of_true = classes if problem.target is not None else None
        found["total"] = energy_distance(x, true, unbiased=True, classes=(classes, of_true))
    return found


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # The product form of cdist loses half the digits of small distances.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
