"""How far samples are from what they should be: one judge for exact targets, one for networks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from experiments.conditions import ALL, Condition
from experiments.draw import Machine
from experiments.features import FeatureSpace
from experiments.metrics import Reference
from experiments.subjects import ExactSubject, ModelSubject, Subject
from sde_diffusion import GaussianMixture
from sde_diffusion.loop import generator_for
from solvers import Ancestral, EulerMaruyama, Integrator, ProbabilityFlow, Solver

FINE_SDE_STEPS = 500
_TRUTH_SEED, _FLOOR_SEED = 0x5EED_0001, 0x5EED_0002
_TRUTH_IDS, _FLOOR_IDS = 1 << 40, 1 << 41  # beyond the ids of what is judged


def block_ids(samples: int, repeat: int) -> Tensor:
    """Ids of the samples of a repeat: ``repeat * samples ..``."""
    return torch.arange(repeat * samples, (repeat + 1) * samples)


@dataclass(frozen=True)
class Cell:
    """What was sampled: under which SDE, guided how, and by what."""

    sde: str
    condition: Condition
    solver: Solver | Integrator


class Judge(ABC):
    """Metrics of a repeat's samples, and what true samples score by them.

    A repeat is a block of ``samples`` samples, judged by itself: no figure of it depends on how
    many repeats there are.

    Attributes:
        primary: the metric that stands for quality.
        fine_solver, fine_steps: of the fine ODE solution.
        samples: in a repeat.
        paired: samples of a repeat that are compared with the fine ODE from the same noise.
    """

    primary: str
    fine_solver: ClassVar[Solver] = ProbabilityFlow("rk4")
    fine_steps: ClassVar[int]
    samples: int
    paired: int

    @abstractmethod
    def metrics(self, cell: Cell, x: Tensor, repeat: int) -> dict[str, float]:
        """Of the samples (n, *event) of a repeat."""

    @abstractmethod
    def floor(self, cell: Cell, repeat: int) -> dict[str, float]:
        """The same of true samples, as many where there are as many; empty where there are none."""

    def paired_metrics(self, distances: Tensor) -> dict[str, float]:
        """Of the distances (paired,) to the fine ODE from the same noise."""
        return {
            "rms": float(distances.square().mean().sqrt()),
            "median": float(distances.median()),
        }

    @abstractmethod
    def law(self, cell: Cell) -> object:
        """Cells with the same law share their true samples and their floor."""

    @abstractmethod
    def truth(self, cell: Cell) -> str:
        """What the samples are compared with, in a few words."""

    @abstractmethod
    def true_samples(self, cell: Cell, repeat: int) -> Tensor | None:
        """Some true samples, for pictures."""


class ExactJudge(Judge):
    """Distances to fresh samples of the law that exact solution of the same equation would give.

    Unguided, and at γ = 0 and 1, that law is the target or its classes, and the samples are exact.
    At other γ the guided ODE, the guided SDE and ``p(x|c)^γ p(x)^(1-γ)`` are three laws (and every
    η of the reverse family another), so the truth is the same equation, solved finely.
    """

    primary = "energy"
    fine_steps = 100

    def __init__(self, subject: ExactSubject, samples: int, seed: int, machine: Machine) -> None:
        self.subject = subject
        self.samples = self.paired = samples
        self._seed = seed
        self._machine = machine
        self._references: dict[object, tuple[Reference, Tensor]] = {}

    def metrics(self, cell: Cell, x: Tensor, repeat: int) -> dict[str, float]:
        return self._reference(cell, repeat)[0].compare(x)

    def floor(self, cell: Cell, repeat: int) -> dict[str, float]:
        other = self._true(cell, repeat, _FLOOR_IDS, self._seed + _FLOOR_SEED)
        return self._reference(cell, repeat)[0].compare(other)

    def truth(self, cell: Cell) -> str:
        law = cell.condition.law
        if law == "whole":
            return "exact samples"
        if law == "conditional":
            return "exact samples of the classes"
        return (
            "the guided ODE, finely solved"
            if reverse_eta(cell.solver) == 0
            else ("the guided SDE, finely solved")
        )

    def true_samples(self, cell: Cell, repeat: int) -> Tensor:
        return self._reference(cell, repeat)[1]

    def density(self, cell: Cell) -> GaussianMixture | None:
        """The law as a mixture, where it is one."""
        condition, target = cell.condition, self.subject.target
        if condition.law == "whole" or condition.label == ALL:
            uniform = torch.allclose(_class_weights(target), _class_weights(target).mean())
            known = condition.law == "whole" or (condition.law == "conditional" and uniform)
            return target if known else None
        if condition.law == "conditional" and condition.label is not None:
            return target.conditional(int(condition.label))
        return None

    def law(self, cell: Cell) -> object:
        condition = cell.condition
        if condition.law == "guided":
            return cell.sde, condition, reverse_eta(cell.solver)
        return condition.law, None if condition.law == "whole" else condition.label

    def _reference(self, cell: Cell, repeat: int) -> tuple[Reference, Tensor]:
        key = self.law(cell), repeat
        if key not in self._references:
            true = self._true(cell, repeat, _TRUTH_IDS, self._seed + _TRUTH_SEED)
            self._references[key] = Reference(true, seed=self._seed), true
        return self._references[key]

    def _true(self, cell: Cell, repeat: int, first_id: int, seed: int) -> Tensor:
        condition, target = cell.condition, self.subject.target
        ids = block_ids(self.samples, repeat)
        seed = generator_for(seed, repeat).initial_seed()
        if condition.law == "whole":
            return target.sample(len(ids), seed)[0]
        if condition.law == "conditional":
            return class_samples(target, condition.class_of(ids, target.num_classes), seed)
        eta = reverse_eta(cell.solver)
        fine: Solver = ProbabilityFlow("rk4")
        steps = self.fine_steps
        if eta > 0:
            fine = Ancestral(eta=eta) if eta <= 1 else EulerMaruyama(eta=eta)
            steps = FINE_SDE_STEPS
        return self._machine.draw(
            self.subject.score_of(cell.sde, condition),
            self.subject.sdes[cell.sde],
            fine,
            event_shape=self.subject.event_shape,
            # Ids that keep the class of the samples they stand for.
            ids=ids + first_id // target.num_classes * target.num_classes,
            steps=steps,
            seed=self._seed,
            suggested=self.subject.suggested,
        ).x


class ModelJudge(Judge):
    """Fréchet distance to real data, and label accuracy, by a classifier that no guidance sees; or
    the metrics asked for, of which the first stands for quality."""

    fine_steps = 40

    def __init__(self, subject: ModelSubject, samples: int) -> None:
        self.subject = subject
        self.samples = samples
        self.paired = min(16, samples)
        self.space = FeatureSpace(subject.judge, subject.data, subject.metrics)
        self.primary = subject.metrics[0]

    def metrics(self, cell: Cell, x: Tensor, repeat: int) -> dict[str, float]:
        labels = cell.condition.labels(block_ids(self.samples, repeat), self.subject.num_classes)
        return self.space.evaluate(x, cell.condition.label, labels)

    def floor(self, cell: Cell, repeat: int) -> dict[str, float]:
        return self.space.floor(self.samples, repeat, cell.condition.label)

    def law(self, cell: Cell) -> object:
        return cell.condition.label

    def truth(self, cell: Cell) -> str:
        label = cell.condition.label
        part = "real data" if label in (None, ALL) else f"real data of class {label}"
        return f"{part}, in the judge's features"

    def true_samples(self, cell: Cell, repeat: int) -> Tensor | None:
        return self.space.real_samples(cell.condition.label, self.samples, repeat)


def make_judge(subject: Subject, samples: int, seed: int, machine: Machine) -> Judge:
    """The judge of a subject's repeats of ``samples`` samples."""
    if isinstance(subject, ExactSubject):
        return ExactJudge(subject, samples, seed, machine)
    if isinstance(subject, ModelSubject):
        return ModelJudge(subject, samples)
    raise TypeError(f"no judge for {type(subject).__name__}")


def reverse_eta(solver: Solver | Integrator) -> float:
    """Which member of the reverse family a solver solves: 0 the ODE, 1 Anderson's SDE."""
    inner = getattr(solver, "predictor", solver)
    return float(getattr(inner, "eta", 1.0)) if solver.stochastic else 0.0


def class_samples(
    target: GaussianMixture, labels: Tensor, seed: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """A true sample (*event) of each of the classes (B,)."""
    x = torch.empty(len(labels), *target.event_shape, dtype=dtype)
    for label in range(target.num_classes):
        chosen = torch.eq(labels, label)
        x[chosen] = target.sample(int(chosen.sum()), seed + label, label, dtype)[0]
    return x


def _class_weights(target: GaussianMixture) -> Tensor:
    return torch.zeros(target.num_classes, dtype=target.weights.dtype).index_add(
        0, target.labels, target.weights
    )
