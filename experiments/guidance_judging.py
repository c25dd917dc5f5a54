"""What guidance does to samples: alignment, fidelity, diversity, saturation, and solver error.

Samples are compared with the classes that were asked for, whatever the scale: data, not the law of
the guided equation, is what a user of guidance wants.

* ``accuracy``: share taken for their class, and ``posterior``: mean probability of it. By the exact
  posterior of an exact target at ``t_min``, else by the judge, a classifier that no guidance sees.
* ``energy``, ``frechet``: distance from real samples of the classes; the energy distance is the
  mean over classes, the Fréchet distance is in the judge's features, classes in equal parts.
* ``variance``: mean variance within classes over that of real data (networks: of training data,
  after clipping to the data's range, so that saturation does not count as variety).
* ``recall``: share of real samples near a sample (Kynkäänniemi et al. 2019), as many of each.
* ``saturation``: share of values beyond the data's range by more than 5 % of its width.
* ``relative``: RMS distance to the fine guided ODE from the same noise, over the RMS distance of
  real data from its mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.conditions import Condition
from experiments.diversity import within_class_variance
from experiments.draw import Machine
from experiments.feature_metrics import recall
from experiments.judging import Cell, ExactJudge, Judge, ModelJudge, block_ids
from experiments.metrics import energy_distance, label_accuracy
from experiments.subjects import ExactSubject, ModelSubject, Subject
from solvers import UniPC

__all__ = ["GuidanceJudge", "make_guidance_judge", "saturation"]

MARGIN = 0.05  # of the range's width: a sample at t_min still carries some noise
_NEAR = 500  # samples of each that recall is taken of: its cost is their square


class GuidanceJudge(Judge):
    """Judges by the classes asked for.

    Attributes:
        deviation: RMS distance of real data from its mean, in units of x.
    """

    deviation: float

    def paired_metrics(self, distances: Tensor) -> dict[str, float]:
        found = super().paired_metrics(distances)
        return {**found, "relative": found["rms"] / self.deviation}


class ExactGuidanceJudge(GuidanceJudge, ExactJudge):
    """On a mixture: exact samples of the classes, and the exact posterior."""

    fine_steps = 200

    def __init__(self, subject: ExactSubject, samples: int, seed: int, machine: Machine) -> None:
        super().__init__(subject, samples, seed, machine)
        self.paired = min(256, samples)
        target = subject.target
        self.deviation = float(target.covariance().trace().sqrt())
        parts = [target.conditional(c) for c in range(target.num_classes)]
        self._variances = torch.stack([part.covariance().trace() for part in parts])

    def metrics(self, cell: Cell, x: Tensor, repeat: int) -> dict[str, float]:
        true = self.true_samples(cell, repeat)
        labels = self._labels(cell, repeat)
        process = self.subject.sdes[cell.sde]
        logits = self.subject.target.classifier(process)(x.double(), process.at(process.t_min))
        energies = [
            energy_distance(x[labels == c], true[labels == c]) for c in labels.unique().tolist()
        ]
        variance = self._variances[labels.unique()].mean()
        return {
            **_alignment(logits, labels),
            "energy": sum(energies) / len(energies),
            "variance": within_class_variance(x, labels) / float(variance),
            "recall": recall(true[:_NEAR].flatten(1), x[:_NEAR].flatten(1)),
            "saturation": saturation(x, true.amin(0), true.amax(0)),
        }

    def floor(self, cell: Cell, repeat: int) -> dict[str, float]:
        asked = _asked(cell)
        other = ExactJudge(self.subject, self.samples, self._seed + 1, self._machine)
        return self.metrics(asked, other.true_samples(asked, repeat), repeat)

    def law(self, cell: Cell) -> object:
        return cell.condition.label, cell.sde

    def truth(self, cell: Cell) -> str:
        return "exact samples of the classes"

    def true_samples(self, cell: Cell, repeat: int) -> Tensor:
        return super().true_samples(_asked(cell), repeat)

    def _labels(self, cell: Cell, repeat: int) -> Tensor:
        ids = block_ids(self.samples, repeat)
        return cell.condition.class_of(ids, self.subject.target.num_classes)


class ModelGuidanceJudge(GuidanceJudge, ModelJudge):
    """On a network: real data, and the judge that no guidance sees."""

    # Of digits at scales of 1 to 8 within 1.3e-3 deviations of 150 steps of rk4, as 50 of them are,
    # at half the evaluations: 100.
    fine_solver = UniPC(order=3)
    fine_steps = 100

    def __init__(self, subject: ModelSubject, samples: int) -> None:
        super().__init__(subject, samples)
        self.paired = min(24, samples)
        self._train, self._y = _labelled(subject)
        offset = (self._train - self._train.mean(0)).flatten(1)
        self.deviation = float(offset.square().sum(1).mean().sqrt())

    def metrics(self, cell: Cell, x: Tensor, repeat: int) -> dict[str, float]:
        labels = cell.condition.class_of(
            block_ids(self.samples, repeat), self.subject.num_classes or 1
        )
        found = {"frechet": self.space.distance(x, cell.condition.label)}
        return found | self._of(x, labels, self._real(cell, repeat))

    def floor(self, cell: Cell, repeat: int) -> dict[str, float]:
        found = self.space.floor(self.samples, repeat, cell.condition.label)
        if not found:
            return {}
        held = self._real(cell, repeat)
        ids = torch.arange(len(held))
        labels = cell.condition.class_of(ids, self.subject.num_classes or 1)
        chosen = torch.isin(self._y, labels.unique()).nonzero()[:, 0]
        order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(repeat))
        others = self._train[chosen[order[: len(held)]]]
        return found | self._of(held, labels, others)

    def _of(self, x: Tensor, labels: Tensor, real: Tensor) -> dict[str, float]:
        inside = x.float().clamp(-1.0, 1.0)
        classes = labels.unique()
        of_classes = torch.isin(self._y, classes)
        own = within_class_variance(self._train[of_classes], self._y[of_classes])
        count = min(len(real), len(x), _NEAR)
        features = self.space.features
        found = {
            "variance": within_class_variance(inside, labels) / own,
            "recall": recall(features(real[:count]).flatten(1), features(x[:count]).flatten(1)),
            "saturation": saturation(x, torch.tensor(-1.0), torch.tensor(1.0)),
        }
        if self.space.can_classify:
            found |= _alignment(self.space.logits(x), labels)
        return found

    def _real(self, cell: Cell, repeat: int) -> Tensor:
        """A block of held-out samples, the classes in turn as those of the samples."""
        held = self.space.real_samples(cell.condition.label, self.samples, repeat)
        if held is None:
            raise RuntimeError("the data has gone")  # found out when the judge was made
        return held


def make_guidance_judge(subject: Subject, samples: int, seed: int, machine: Machine) -> Judge:
    """The judge of a subject's repeats of ``samples`` samples.

    Raises:
        ValueError: a network whose data is not at hand, or has no labels.
    """
    if isinstance(subject, ExactSubject):
        return ExactGuidanceJudge(subject, samples, seed, machine)
    if isinstance(subject, ModelSubject):
        return ModelGuidanceJudge(subject, samples)
    raise TypeError(f"no judge of guidance for {type(subject).__name__}")


def saturation(x: Tensor, low: Tensor, high: Tensor) -> float:
    """Share of the values of ``x`` beyond ``low .. high`` by more than 5 % of the width."""
    margin = MARGIN * (high - low)
    return float(((x < low - margin) | (x > high + margin)).double().mean())


def _alignment(logits: Tensor, labels: Tensor) -> dict[str, float]:
    posterior = logits.double().softmax(1).gather(1, labels[:, None])
    return {"accuracy": label_accuracy(logits, labels), "posterior": float(posterior.mean())}


def _asked(cell: Cell) -> Cell:
    """The classes without guidance."""
    return Cell(cell.sde, Condition(label=cell.condition.label), cell.solver)


def _labelled(subject: ModelSubject) -> tuple[Tensor, Tensor]:
    data = subject.data
    if data is None or data.train_y is None:
        what = "is not at hand" if data is None else "has no labels"
        raise ValueError(
            f"guidance is judged by real samples of the classes, and the data of {subject.name!r} "
            f"{what}; name labelled data of the model's classes with --data"
        )
    x = data.train_x
    return (x if isinstance(x, Tensor) else x[torch.arange(len(x))]).float(), data.train_y
