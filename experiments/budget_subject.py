"""What an error budget is of: an exact target, a network, or a network trained on its samples."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from experiments.budget_problem import Problem
from experiments.conditions import ALL, Condition
from experiments.draw import ScoreOf
from experiments.subjects import (
    ExactSubject,
    ModelSubject,
    Subject,
    SubjectOptions,
    make_subjects,
)
from sde_diffusion import GaussianMixture
from sde_diffusion.data import Dataset
from sde_diffusion.scaling import Scaling


class BudgetSubject(Subject):
    """A target, a network, or both; at least one.

    Attributes:
        exact: the target, in the scaling and under the SDE of the network where there is one; None:
            the law of the data is not known.
        network: whose samples are looked at; None: the exact target's own.
    """

    def __init__(self, exact: ExactSubject | None, network: ModelSubject | None) -> None:
        sampled = network or exact
        if sampled is None:
            raise ValueError("name what the budget is of: --target, --model, or both")
        self.exact, self.network, self.sampled = exact, network, sampled
        self.name = f"{exact.name} by {network.name}" if exact and network else sampled.name
        self.sdes, self.event_shape = sampled.sdes, sampled.event_shape
        self.num_classes, self.suggested = sampled.num_classes, sampled.suggested
        self._known_data: dict[Condition, tuple[Tensor, Tensor] | None] = {}

    @property
    def unguided(self) -> Literal["all"] | None:
        """A target's law is of all its classes, in their proportions; see `Subject`."""
        return self.sampled.unguided if self.exact is None else None

    def score_of(self, sde: str, condition: Condition) -> ScoreOf:
        return self.sampled.score_of(sde, condition)

    def to(self, device: torch.device) -> None:
        self.sampled.to(device)

    def check(self, condition: Condition) -> None:
        self.sampled.check(condition)
        data = self._real()
        if data is not None and condition.law != "guided":
            _places(data, self.name, condition)
        if self.network is None or self.exact is None or condition.label is None:
            return
        if self.exact.num_classes != self.num_classes:
            raise ValueError(
                f"{_option(condition)} compares classes, and --model has {self.num_classes} where "
                f"--target {self.exact.name} has {self.exact.num_classes}; name the target whose "
                "labelled samples it was trained on, or leave the option out"
            )

    def problem(self, sde: str, condition: Condition, **numbers: Any) -> Problem:
        """What its parts are measured on.

        Args:
            numbers: samples, repeats, seed, grid, denoise, machine.
        """
        network = None if self.network is None else self.network.models[sde]
        return Problem(
            name=self.name,
            sde_name=sde,
            sde=self.sdes[sde],
            event_shape=self.event_shape,
            target=None if self.exact is None else self.exact.target,
            network=None if network is None else network.model,
            num_classes=self.num_classes,
            data=self._data(condition),
            suggested=self.suggested,
            condition=condition,
            classifier=None if network is None else network.classifier,
            **numbers,
        )

    def has_truth(self, condition: Condition) -> bool:
        """Whether there is anything true to compare samples with."""
        return self.exact is not None or (condition.law != "guided" and self._real() is not None)

    def _real(self) -> Dataset | None:
        """Real samples, where nothing better is known of their law."""
        return None if self.exact is not None or self.network is None else self.network.data

    def _data(self, condition: Condition) -> tuple[Tensor, Tensor] | None:
        """Held-out and training samples of the law, shuffled; read once for each condition."""
        if condition not in self._known_data:
            self._known_data[condition] = self._read_data(condition)
        return self._known_data[condition]

    def _read_data(self, condition: Condition) -> tuple[Tensor, Tensor] | None:
        data = self._real()
        if data is None or condition.law == "guided":
            return None
        held_out, training = _places(data, self.name, condition)
        order = torch.Generator().manual_seed(0)
        held_out = held_out[torch.randperm(len(held_out), generator=order)]
        training = training[torch.randperm(len(training), generator=order)]
        return data.test_x[held_out], data.train_x[training[: 4 * len(held_out)]]

    def _identity(self, sde: str) -> dict[str, Any]:
        parts = {"exact": self.exact, "network": self.network}
        return {name: part.identity(sde) for name, part in parts.items() if part is not None}


def make_budget_subject(options: SubjectOptions) -> BudgetSubject:
    """What --target, --model, --sde and --data name.

    Raises:
        ValueError: neither or unfitting target and model, unknown names.
    """
    if len(options.targets) > 1 or len(options.models) > 1:
        raise ValueError("an error budget is of one --target, one --model, or one of each")
    network = _network(options) if options.models else None
    exact = _exact(options, network) if options.targets else None
    if exact is None or network is None:
        return BudgetSubject(exact, network)
    (model,) = network.models.values()
    if model.event_shape != exact.event_shape:
        raise ValueError(
            f"--model {str(model.path)!r} makes samples of shape {model.event_shape}, and "
            f"--target {exact.name} has {exact.event_shape}; name the target whose samples it "
            "was trained on"
        )
    placed = copy.copy(exact)
    placed.target = scaled(exact.target, model.data.scaling)
    placed.sdes = network.sdes
    return BudgetSubject(placed, network)


def scaled(target: GaussianMixture, scaling: Scaling) -> GaussianMixture:
    """The law of ``scaling.to_model(x)`` for x of the target."""
    factor = float(
        scaling.to_model(torch.ones((), dtype=torch.float64))
        - scaling.to_model(torch.zeros((), dtype=torch.float64))
    )
    variances = target.variances * factor**2
    if target.rotation is not None:
        variances = target.rotation @ torch.diag_embed(variances) @ target.rotation.mT
    return GaussianMixture(
        scaling.to_model(target.means),
        variances,
        target.weights,
        target.labels,
        event_shape=target.event_shape,
    )


def _exact(options: SubjectOptions, network: ModelSubject | None) -> ExactSubject:
    # A network has an SDE of its own, under which the target is placed.
    sdes = () if network is not None else options.sdes
    (subject,) = make_subjects(SubjectOptions(options.targets, (), sdes))
    if not isinstance(subject, ExactSubject):
        name = options.targets[0]
        raise ValueError(
            f"--target {name} has no exact score; give its network alone: --model {name}-vp"
        )
    return subject


def _network(options: SubjectOptions) -> ModelSubject:
    (subject,) = make_subjects(replace(options, targets=()))
    if not isinstance(subject, ModelSubject):
        raise ValueError(f"--model {options.models[0]!r} is not a model folder")
    return subject


def _places(data: Dataset, name: str, condition: Condition) -> tuple[Tensor, Tensor]:
    """Which held-out and training samples are of the class that is asked for, or all of them.

    Raises:
        ValueError: the data has no labels, or no two samples of the class.
    """
    if condition.law == "whole" or condition.label == ALL:
        return torch.arange(len(data.test_x)), torch.arange(len(data.train_x))
    if data.test_y is None or data.train_y is None:
        raise ValueError(
            f"{_option(condition)} needs labelled samples to compare with, and the data of "
            f"{name!r} has no labels; leave the option out"
        )
    found = [y.eq(int(condition.label or 0)).nonzero()[:, 0] for y in (data.test_y, data.train_y)]
    if min(map(len, found)) < 2:
        raise ValueError(
            f"{_option(condition)}: the data of {name!r} has no two held-out samples of that "
            "class; give another, or all"
        )
    return found[0], found[1]


def _option(condition: Condition) -> str:
    if condition.guidance != "none":
        return f"--guidance {condition.guidance}"
    return f"--label {condition.label}"
