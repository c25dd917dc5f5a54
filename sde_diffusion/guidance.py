"""Guidance: score functions made from score functions.

One meaning of ``scale`` throughout: gamma, with 0 unconditional and 1 conditional. Papers that
write ``(1 + w) eps_y - w eps_null`` (Ho & Salimans 2022, arXiv:2207.12598, eq. 6) have ``w = gamma
- 1``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sde_diffusion.broadcast import expand
from sde_diffusion.errors import require_between
from sde_diffusion.gradients import pull_back, usable
from sde_diffusion.parametrization import (
    Model,
    batch_of_labels,
    bind,
    check_label,
    part_of,
)
from sde_diffusion.prediction import Prediction, ScoreFn, cost_of, select
from sde_diffusion.scales import Scale, check_scale, is_number, scale_at, weight_of
from sde_diffusion.sde import NoiseLevel

Classifier = Callable[[Tensor, NoiseLevel], Tensor]


def classifier_guided(
    score_fn: ScoreFn, classifier: Classifier, label: int | Tensor, scale: Scale = 1.0
) -> ScoreFn:
    """``score + scale * grad_x log p(label | x_t, t)`` (Dhariwal & Nichol 2021, arXiv:2105.05233,
    eq. 14).

    The gradient of the batch's summed log-probability is taken once and flows under ``no_grad``
    too; with gradients enabled outside, it can itself be differentiated. It counts as one network
    pass.

    Args:
        score_fn: the unconditional score.
        classifier: ``(x, level) -> logits`` of shape ``(B, C)``, on noised inputs.
        label: one class, or ``(B,)`` classes.
        scale: gamma; a number, a 0-d tensor, ``(B,)``, or a function of the noise level that gives
            one of them. The number 0 gives ``score_fn`` itself.
    Raises:
        ValueError: a label out of range (where the classifier has ``num_classes``), a scale not
        finite.
    """
    if label is None:
        raise ValueError("label=None: classifier guidance needs a class to guide towards")
    check_label(classifier, label)
    check_scale(scale)
    if is_number(scale, 0):
        return score_fn
    return _ClassifierGuided(score_fn, classifier, label, scale)


def classifier_gradient(
    classifier: Classifier, x: Tensor, level: NoiseLevel, label: int | Tensor
) -> Tensor:
    """``grad_x log p(label | x_t)``, of ``x``'s shape."""

    def forward(x: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        log_probs = torch.log_softmax(classifier(x, level), dim=1)
        chosen = log_probs.gather(1, usable(batch_of_labels(label, x))[:, None])
        return chosen, torch.ones_like(chosen), ()

    return pull_back(x, level, forward)[0]


class _ClassifierGuided:
    def __init__(
        self, score_fn: ScoreFn, classifier: Classifier, label: int | Tensor, scale: Scale
    ) -> None:
        self.score_fn = score_fn
        self.classifier = classifier
        self.label = label
        self.scale = scale

    def cost_at(self, level: NoiseLevel) -> int:
        return cost_of(self.score_fn, level) + 1

    def __call__(self, x: Tensor, level: NoiseLevel) -> Prediction:
        gradient = classifier_gradient(self.classifier, x, level, self.label)
        weight = expand(level.sigma, x) * weight_of(self.scale, level, x)
        return Prediction.from_eps(x, level, self.score_fn(x, level).eps - weight * gradient)

    def select(self, indices: Tensor) -> _ClassifierGuided:
        label, scale = part_of(self.label, indices), part_of(self.scale, indices)
        return _ClassifierGuided(select(self.score_fn, indices), self.classifier, label, scale)


def classifier_free_guided(
    model: Model,
    label: int | Tensor,
    scale: Scale = 1.0,
    interval: tuple[float, float] | None = None,
    rescale: float = 0.0,
) -> ScoreFn:
    """``score_null + scale * (score_label - score_null)`` (Ho & Salimans 2022, arXiv:2207.12598).

    Both scores come from one forward pass of twice the batch where the model has a ``null_label``.
    The numbers 0 and 1 need one score only and cost one evaluation.

    Args:
        model: class-conditional, called ``(x, level, label)``; ``label=None`` is the null label.
        label: one class, or ``(B,)`` classes.
        scale: gamma; a number, a 0-d tensor, ``(B,)``, or a function of the noise level that gives
            one of them, as in ``lambda level: 1 + 2 * level.sigma``.
        interval: ``(low, high)`` in sigma/alpha; outside it the conditional score alone is used
            (Kynkaanniemi et al. 2024, arXiv:2404.07724), at the cost of one evaluation within
            ``sample``, which knows the levels beforehand.
        rescale: in [0, 1]: how far the guided x0 is brought back to the standard deviation, per
            sample, of the conditional x0 (Lin et al. 2024, arXiv:2305.08891, eq. 14-16, in x0).
    Raises:
        ValueError: a model without classes, a label out of range, an interval that is not
            ``0 <= low < high``, rescale outside [0, 1].
    """
    if label is None:
        raise ValueError("label=None: classifier-free guidance needs a class to guide towards")
    check_label(model, label)
    if interval is not None:
        _check_interval(interval)
    require_between("rescale", rescale, 0, 1)
    check_scale(scale)
    if is_number(scale, 1):
        return bind(model, label)
    if is_number(scale, 0) and interval is None and rescale == 0:
        return bind(model, None)
    return _ClassifierFreeGuided(model, label, scale, interval, rescale)


def _check_interval(interval: tuple[float, float]) -> None:
    message = f"interval must be (low, high) in sigma/alpha with 0 <= low < high, got {interval!r}"
    try:
        low, high = interval
        ordered = 0 <= low < high
    except (TypeError, ValueError):
        raise ValueError(message) from None
    if not ordered:
        raise ValueError(message)


class _ClassifierFreeGuided:
    def __init__(
        self,
        model: Model,
        label: int | Tensor,
        scale: Scale,
        interval: tuple[float, float] | None,
        rescale: float,
    ) -> None:
        self.model = model
        self.label = label
        self.scale = scale
        self.interval = interval
        self.rescale = rescale
        self.null_label: int | None = getattr(model, "null_label", None)

    def cost_at(self, level: NoiseLevel) -> int:
        cost: int = getattr(self.model, "cost", 1)
        return cost if self._known_outside(level) else 2 * cost

    def __call__(self, x: Tensor, level: NoiseLevel) -> Prediction:
        if self._known_outside(level):
            return self.model(x, level, self.label)
        conditional, null = self._both(x, level)
        guided = torch.lerp(null, conditional, self._weight(x, level))
        prediction = Prediction.from_eps(x, level, guided)
        if self.rescale == 0:
            return prediction
        reference = Prediction.from_eps(x, level, conditional).x0
        return Prediction.from_x0(x, level, _rescaled(prediction.x0, reference, self.rescale))

    def select(self, indices: Tensor) -> _ClassifierFreeGuided:
        label, scale = part_of(self.label, indices), part_of(self.scale, indices)
        return _ClassifierFreeGuided(self.model, label, scale, self.interval, self.rescale)

    def _known_outside(self, level: NoiseLevel) -> bool:
        """Whether the level lies outside the interval, as far as the host can tell without a
        sync."""
        ratio = getattr(level, "host_ratio", None)
        if self.interval is None or ratio is None:
            return False
        return not self.interval[0] <= ratio <= self.interval[1]

    def _both(self, x: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        if self.null_label is None:
            return self.model(x, level, self.label).eps, self.model(x, level, None).eps
        labels = batch_of_labels(self.label, x)
        labels = torch.cat([labels, torch.full_like(labels, self.null_label)])
        twice = level if level.t.ndim == 0 else level.map(lambda field: torch.cat([field, field]))
        conditional, null = self.model(torch.cat([x, x]), twice, labels).eps.chunk(2)
        return conditional, null

    def _weight(self, x: Tensor, level: NoiseLevel) -> float | Tensor:
        if self.interval is None:
            return weight_of(self.scale, level, x)
        ratio = level.sigma_over_alpha
        inside = (ratio >= self.interval[0]) & (ratio <= self.interval[1])
        return expand(torch.where(inside, scale_at(self.scale, level), 1.0), x).to(x.dtype)


def _rescaled(guided: Tensor, reference: Tensor, rescale: float) -> Tensor:
    if guided.ndim < 2 or guided[0].numel() < 2:
        raise ValueError(
            f"rescale needs events of at least two elements, got shape {tuple(guided.shape)}"
        )
    factor = _deviation(reference) / _deviation(guided)
    return guided * expand(1 + rescale * (factor - 1), guided)


def _deviation(x: Tensor) -> Tensor:
    """Per-sample standard deviation times a constant; ``Tensor.std`` rounds by the batch's size."""
    flat = x.flatten(1)
    return (flat - flat.mean(1, keepdim=True)).norm(dim=1)
