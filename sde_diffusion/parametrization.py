"""Networks in the form they were trained in, made into one kind of model.

A model is called ``(x, level, label=None) -> Prediction``. The network inside is called
``net(x, time_label)``, or ``net(x, time_label, label)`` with ``time_label`` and ``label`` of shape
``(B,)``. What the time label is (t, an integer step, log sigma) belongs to the network's training,
so only the wrapper knows it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from sde_diffusion.broadcast import expand
from sde_diffusion.errors import require_count, require_finite
from sde_diffusion.prediction import Prediction, ScoreFn
from sde_diffusion.sde import SDE, NoiseLevel

Label = int | Tensor | None
TimeLabel = Callable[[NoiseLevel], Tensor]
Model = Callable[..., Prediction]
Value = TypeVar("Value")


def continuous_time(level: NoiseLevel) -> Tensor:
    """The SDE's own t."""
    return level.t


def scaled_time(scale: float) -> TimeLabel:
    """``scale * t``: networks trained continuously on, say, ``999 t`` (score_sde)."""
    require_finite("scale", scale, above=0.0)
    return lambda level: scale * level.t


@dataclass(frozen=True)
class TableIndex:
    """The integer step ``i`` of a chain of ``n`` steps whose times are ``(i + 1) / n``, by
    rounding."""

    n: int

    def __post_init__(self) -> None:
        require_count("n", self.n)

    def __call__(self, level: NoiseLevel) -> Tensor:
        return (level.t * self.n).round().long().sub(1).clamp(0, self.n - 1)


def table_index(n: int) -> TimeLabel:
    """The `TableIndex` of a chain of ``n`` steps."""
    return TableIndex(n)


def edm_noise_label(level: NoiseLevel) -> Tensor:
    """``log(sigma / alpha) / 4`` (Karras et al. 2022, table 1)."""
    return -0.25 * level.half_log_snr


def no_time(level: NoiseLevel) -> Tensor:
    """Always 0: networks blind to the noise level (NCSNv2)."""
    return torch.zeros_like(level.t)


class ParametrizedModel(nn.Module, ABC):
    """A network and the reading of its output.

    Args:
        net: called ``net(x, time_label)`` or ``net(x, time_label, label)``.
        sde: the SDE it was trained under.
        time_label: from the noise level to the label the network was trained on; a 0-d result is
            repeated for the batch.
        null_label: the class index that stands for "no class"; ``net.null_label`` by default. A
            network without one is called without a label where there is none.
    """

    cost = 1

    def __init__(
        self,
        net: nn.Module,
        sde: SDE,
        *,
        time_label: TimeLabel = continuous_time,
        null_label: int | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.sde = sde
        self.time_label = time_label
        self.null_label: int | None = (
            getattr(net, "null_label", None) if null_label is None else null_label
        )

    @property
    def num_classes(self) -> int | None:
        """Number of classes the network knows; ``None`` where it does not say."""
        return getattr(self.net, "num_classes", None)

    def forward(self, x: Tensor, level: NoiseLevel, label: Label = None) -> Prediction:
        """The estimate at ``x`` ``(B, *event)``, ``level`` 0-d or ``(B,)``, for one label, ``(B,)``
        labels or none."""
        return self._predict(x, level, label)

    @abstractmethod
    def _predict(self, x: Tensor, level: NoiseLevel, label: Label) -> Prediction: ...

    def _call(self, x: Tensor, level: NoiseLevel, label: Label) -> Tensor:
        time = self.time_label(level).expand(len(x))
        if time.is_floating_point():
            time = time.to(x.dtype)
        label = self.null_label if label is None else label
        if label is None:
            output: Tensor = self.net(x, time)
        else:
            output = self.net(x, time, batch_of_labels(label, x))
        return output


def batch_of_labels(label: int | Tensor, x: Tensor) -> Tensor:
    """``label`` as ``(B,)`` long on ``x``'s device."""
    if isinstance(label, Tensor):
        if label.ndim == 1 and len(label) != len(x):
            raise ValueError(f"label must have one entry per sample, {len(x)}, got {len(label)}")
        return label.to(device=x.device, dtype=torch.long).expand(len(x))
    return torch.full((len(x),), label, dtype=torch.long, device=x.device)


class EpsModel(ParametrizedModel):
    """The network predicts the noise (Ho et al. 2020, arXiv:2006.11239, eq. 11)."""

    def _predict(self, x: Tensor, level: NoiseLevel, label: Label) -> Prediction:
        return Prediction.from_eps(x, level, self._call(x, level, label))


class X0Model(ParametrizedModel):
    """The network predicts the clean sample."""

    def _predict(self, x: Tensor, level: NoiseLevel, label: Label) -> Prediction:
        return Prediction.from_x0(x, level, self._call(x, level, label))


class VModel(ParametrizedModel):
    """The network predicts ``v = alpha eps - sigma x0`` (Salimans & Ho 2022, arXiv:2202.00512)."""

    def _predict(self, x: Tensor, level: NoiseLevel, label: Label) -> Prediction:
        return Prediction.from_v(x, level, self._call(x, level, label))


class ScoreModel(ParametrizedModel):
    """The network predicts the score.

    Args:
        divide_by_sigma: ``score = F(x) / sigma``, F the network, as in NCSNv2 (Song & Ermon 2020,
            arXiv:2006.09011, technique 3). There F is blind to sigma: give ``time_label=no_time``.
    """

    def __init__(
        self, net: nn.Module, sde: SDE, *, divide_by_sigma: bool = False, **settings: Any
    ) -> None:
        super().__init__(net, sde, **settings)
        self.divide_by_sigma = divide_by_sigma

    def _predict(self, x: Tensor, level: NoiseLevel, label: Label) -> Prediction:
        output = self._call(x, level, label)
        if self.divide_by_sigma:
            return Prediction.from_eps(x, level, -output)
        return Prediction.from_score(x, level, output)


class EDMModel(ParametrizedModel):
    """EDM's preconditioning (Karras et al. 2022, arXiv:2206.00364, eq. 7 and table 1).

    ``x0 = c_skip y + c_out F(c_in y, c_noise)`` in the scaled coordinates ``y = x / alpha``,
    ``s = sigma / alpha``, so that it serves every SDE; on VE and EDM these are x and sigma.

    Args:
        sigma_data: standard deviation of the data, above 0.
    """

    def __init__(
        self,
        net: nn.Module,
        sde: SDE,
        *,
        sigma_data: float = 0.5,
        time_label: TimeLabel = edm_noise_label,
        null_label: int | None = None,
    ) -> None:
        super().__init__(net, sde, time_label=time_label, null_label=null_label)
        require_finite("sigma_data", sigma_data, above=0.0)
        self.sigma_data = sigma_data

    def _predict(self, x: Tensor, level: NoiseLevel, label: Label) -> Prediction:
        ratio = level.sigma_over_alpha
        total = ratio**2 + self.sigma_data**2
        scale_in = expand(total.rsqrt() / level.alpha, x)
        skip = expand(self.sigma_data**2 / (total * level.alpha), x)
        scale_out = expand(ratio * self.sigma_data * total.rsqrt(), x)
        return Prediction.from_x0(
            x, level, skip * x + scale_out * self._call(scale_in * x, level, label)
        )


def check_label(model: object, label: Label) -> None:
    """Raise ``ValueError`` if ``label`` does not fit what ``model`` says of its classes.

    Checked where the model has ``num_classes``: an int, or ``None`` for a network without classes.
    """
    if label is None:
        return
    if isinstance(label, Tensor):
        if label.is_floating_point() or label.is_complex() or label.ndim > 1 or not label.numel():
            raise ValueError(
                "label must be an int or a 1-d integer tensor, got "
                f"{label.dtype} {tuple(label.shape)}"
            )
    elif isinstance(label, bool) or not isinstance(label, int):
        raise TypeError(f"label must be an int, a (B,) integer tensor or None, got {label!r}")
    inner = getattr(model, "net", model)
    if not hasattr(inner, "num_classes"):
        return
    num_classes = inner.num_classes
    if not num_classes:
        raise ValueError(
            f"label={label!r} needs a class-conditional model, and this one has no classes"
        )
    low, high = (
        (int(label.min()), int(label.max())) if isinstance(label, Tensor) else (label, label)
    )
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        raise ValueError(
            f"label must lie in 0..{num_classes - 1} ({num_classes} classes), got {wrong}"
        )


class _Bound:
    """A model with its label filled in."""

    def __init__(self, model: Model, label: Label) -> None:
        self.model = model
        self.label = label
        self.cost: int = getattr(model, "cost", 1)

    def __call__(self, x: Tensor, level: NoiseLevel) -> Prediction:
        return self.model(x, level, self.label)

    def select(self, indices: Tensor) -> _Bound:
        return _Bound(self.model, part_of(self.label, indices))


def part_of(value: Value, indices: Tensor) -> Value:
    """A label or scale for a part of the batch: ``(B,)`` values are picked, one for all stays."""
    if isinstance(value, Tensor) and value.ndim == 1:
        return cast(Value, value[indices.to(value.device)])
    return value


def bind(model: Model, label: Label) -> ScoreFn:
    """A score function from a conditional model and its label.

    Args:
        model: called ``(x, level, label)``.
        label: one class for all samples, a ``(B,)`` integer tensor, or ``None`` for the null label.
    Raises:
        ValueError: a label outside the model's classes, or a label for a model without classes.
    """
    check_label(model, label)
    return _Bound(model, label)
