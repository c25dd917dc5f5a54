"""What each stage of training builds and learns: networks, batches and losses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sde_diffusion.dataset import Dataset
from sde_diffusion.errors import unknown_name
from sde_diffusion.loop import Batch, Task
from sde_diffusion.losses import classifier_loss, drop_labels
from sde_diffusion.networks import (
    ClassifierNet,
    NoisedClassifier,
    build_network,
    default_score_config,
    sized_score_config,
)
from sde_diffusion.objectives import Objective, even_times, named_objective, parametrized
from sde_diffusion.parametrization import (
    EDMModel,
    ParametrizedModel,
    TimeLabel,
    continuous_time,
    edm_noise_label,
    no_time,
    table_index,
)
from sde_diffusion.sde import SDE
from sde_diffusion.seeding import seeded
from sde_diffusion.tabulated import TabulatedVPSDE
from sde_diffusion.training_settings import TrainSettings

__all__ = ["CLASSIFIER", "JUDGE", "SCORE", "Tasks", "typed"]

Net = TypeVar("Net", bound=nn.Module)
SCORE, CLASSIFIER, JUDGE = "score network", "classifier", "judge"
KEYS = {SCORE: 1, CLASSIFIER: 2, JUDGE: 3}  # of each stage's seeds


class Tasks:
    """The networks of a run and what they learn.

    Args:
        data: what they learn from.
        sde: what the score network and the classifier are trained under.
        settings: of the run.
        seed: of initial weights.

    Raises:
        ValueError: settings that fit neither the data nor the SDE.
    """

    def __init__(self, data: Dataset, sde: SDE, settings: TrainSettings, seed: int) -> None:
        self.data = data
        self.sde = sde
        self.settings = settings
        self.seed = seed
        if settings.conditional:
            data.require_labels("a conditional model (conditional=true)")
        if settings.with_classifier:
            data.require_labels("a classifier (with_classifier=true)")
        # What does not fit is found out here, not when the stage begins.
        self.objective(self.model(self.network(SCORE)))

    @property
    def classes(self) -> int | None:
        """Classes that the score network knows; None for an unconditional one."""
        return self.data.num_classes if self.settings.conditional is not False else None

    def config(self, stage: str) -> dict[str, Any]:
        """Configuration of a stage's network, for `build_network`."""
        shape = list(self.data.event_shape)
        if stage == SCORE:
            return _score_config(shape, self.classes, self.settings.network or {})
        labelled = {"event_shape": shape, "num_classes": self.data.num_classes}
        if stage == CLASSIFIER:
            return _merged({"kind": "classifier", **labelled}, self.settings.classifier_network)
        return _merged({"kind": "judge", **labelled}, self.settings.judge_network)

    def network(self, stage: str) -> nn.Module:
        """A stage's network with its initial weights."""
        return seeded(lambda: build_network(self.config(stage)), self.seed, KEYS[stage])

    def parametrization(self) -> str:
        """The name of the score network's form: as set, else eps where the signal is scaled down
        (VP and its kin) and edm where the noise is scaled up (VE, EDM)."""
        if self.settings.parametrization is not None:
            return self.settings.parametrization
        return "eps" if float(self.sde.at(self.sde.t_max).alpha) < 0.5 else "edm"

    def model(self, net: nn.Module) -> ParametrizedModel:
        """The score network in its parametrization."""
        sigma_data = self.settings.sigma_data or self.data.root_mean_square
        model = parametrized(self.parametrization(), net, self.sde, sigma_data=sigma_data)
        if self.settings.time_label is not None:
            model.time_label = _time_label(self.settings.time_label, self.sde)
        return model

    def objective_name(self) -> str:
        """The name of the objective: as set, else edm for an EDM-preconditioned network, and
        simple for others: at a discrete chain's own steps where there is one."""
        if self.settings.objective is not None:
            return self.settings.objective
        if self.parametrization() == "edm":
            return "edm"
        return "discrete_simple" if isinstance(self.sde, TabulatedVPSDE) else "simple"

    def objective(self, model: ParametrizedModel) -> Objective:
        """What the score network minimises."""
        settings = dict(self.settings.objective_settings)
        if isinstance(model, EDMModel) and self.settings.objective is None and not settings:
            settings["mean"], settings["std"] = self.log_sigma()
        return named_objective(self.objective_name(), model, self.sde, **settings)

    def log_sigma(self) -> tuple[float, float]:
        """Mean and standard deviation of the log noise-to-signal ratio that EDM training draws,
        where the objective does not say: in units of the data's own size."""
        mean = self.settings.log_sigma_mean + _log(self.data.root_mean_square)
        return mean, self.settings.log_sigma_std

    def classifier(self, net: nn.Module) -> NoisedClassifier:
        """The classifier of noised inputs around its network."""
        return NoisedClassifier(typed(ClassifierNet, net))

    def task(self, stage: str, net: nn.Module) -> Task:
        """What a stage's network learns."""
        return {SCORE: self._score, CLASSIFIER: self._classifier, JUDGE: self._judge}[stage](net)

    def _samples(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        index = torch.randint(len(self.data.train_x), (size,), generator=generator)
        return self.data.batch(index, generator)

    def _score(self, net: nn.Module) -> Task:
        model, size = self.model(net), self.settings.score.batch_size
        objective, sde = self.objective(model), self.sde
        classes, p_uncond = self.classes, self.settings.p_uncond

        def draw(generator: torch.Generator) -> Batch:
            x0, label = self._samples(size, generator)
            if classes is None:
                label = None
            if label is not None and classes is not None:
                label = drop_labels(label, classes, p_uncond, generator)
            t = objective.times(size, sde, generator)
            return x0, label, t, torch.randn(x0.shape, generator=generator)

        def loss(trained: nn.Module, batch: Batch) -> Tensor:
            x0, label, t, noise = batch
            _around(model, trained)
            return objective.loss(model, _given(x0), label, sde.at(_given(t)), _given(noise))

        return Task(draw, loss)

    def _classifier(self, net: nn.Module) -> Task:
        classifier, size = self.classifier(net), self.settings.classifier.batch_size
        sde, times = self.sde, even_times(self.sde)

        def draw(generator: torch.Generator) -> Batch:
            x0, label = self._samples(size, generator)
            t = times(size, sde, generator)
            return x0, label, t, torch.randn(x0.shape, generator=generator)

        def loss(trained: nn.Module, batch: Batch) -> Tensor:
            x0, label, t, noise = (_given(part) for part in batch)
            _around(classifier, trained)
            return classifier_loss(classifier, x0, label, sde.at(t), noise)

        return Task(draw, loss)

    def _judge(self, net: nn.Module) -> Task:
        size, strength = self.settings.judge.batch_size, self.settings.judge_noise

        def draw(generator: torch.Generator) -> Batch:
            x0, label = self._samples(size, generator)
            return x0 + strength * torch.randn(x0.shape, generator=generator), label

        def loss(trained: nn.Module, batch: Batch) -> Tensor:
            x, label = (_given(part) for part in batch)
            return nn.functional.cross_entropy(trained(x), label, reduction="none")

        return Task(draw, loss)


def _score_config(
    shape: list[int], classes: int | None, given: Mapping[str, Any]
) -> dict[str, Any]:
    """The default score network, or one of the size asked for, with what else was given."""
    if "size" not in given:
        return _merged(default_score_config(shape, classes), given)
    kind = given.get("kind", "unet")
    shaping = {key: given[key] for key in ("patch_size", "dropout") if key in given}
    config = sized_score_config(shape, classes, given["size"], kind=kind, **shaping)
    return _merged(config, {key: value for key, value in given.items() if key != "size"})


def _merged(default: dict[str, Any], given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The default configuration with what was given; of another kind, only its shape and classes
    are kept."""
    if not given:
        return default
    if given.get("kind", default["kind"]) != default["kind"]:
        default = {key: default[key] for key in ("event_shape", "num_classes")}
    for name in ("event_shape", "num_classes"):
        if name in given:
            raise ValueError(f"{name} of a network is the data's; leave it out of its settings")
    return {**default, **given}


def _time_label(name: str, sde: SDE) -> TimeLabel:
    labels: dict[str, TimeLabel] = {
        "continuous_time": continuous_time,
        "edm_noise_label": edm_noise_label,
        "no_time": no_time,
    }
    if isinstance(sde, TabulatedVPSDE):
        labels["table_index"] = table_index(len(sde.betas))
    elif name == "table_index":
        raise ValueError("time_label='table_index' needs a discrete chain; use SDE kind ddpm")
    if name not in labels:
        raise unknown_name("time_label", name, labels)
    return labels[name]


def _around(model: nn.Module, trained: nn.Module) -> None:
    """Put the network that accelerate prepared (for several processes, say) into its model."""
    if model.net is not trained:
        model.net = trained


def _given(part: Tensor | None) -> Tensor:
    if part is None:
        raise ValueError("this network needs labels, and the data has none")
    return part


def _log(value: float) -> float:
    """In float32, as the shipped models were trained with."""
    return torch.log(torch.tensor(value)).item() if value > 0 else -math.inf


def typed(kind: type[Net], net: nn.Module) -> Net:
    """`net`, known to be of a kind.

    Raises:
        TypeError: it is of another.
    """
    if not isinstance(net, kind):
        raise TypeError(f"expected a {kind.__name__}, got {type(net).__name__}")
    return net
