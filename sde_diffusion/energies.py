"""Guidance by an energy: whatever one knows of the samples and can differentiate.

``exp(-scale * E)`` reweights the law. Two forms, because an energy of clean samples and one of
noised states are different things: the first is what domain knowledge usually is, and is
applied to the estimate of x0; the second is exact where it is known how the energy looks at every
noise level.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sde_diffusion.broadcast import expand
from sde_diffusion.gradients import pull_back
from sde_diffusion.parametrization import part_of
from sde_diffusion.prediction import Prediction, ScoreFn, cost_of, select
from sde_diffusion.scales import Scale, check_scale, is_number, weight_of
from sde_diffusion.sde import NoiseLevel

CleanEnergy = Callable[[Tensor], Tensor]
NoisedEnergy = Callable[[Tensor, NoiseLevel], Tensor]


def energy_guided(score_fn: ScoreFn, energy: CleanEnergy, scale: Scale = 1.0) -> ScoreFn:
    """``score - scale * grad_x E(x0(x))``: an energy of the clean sample, at its estimate.

    The estimate of x0 stands for the clean sample, as in Bansal et al. 2023 (arXiv:2302.07121, eq.
    6) and Chung et al. 2023 (arXiv:2209.14687, thm. 1): exact as the noise goes to 0, and for a
    linear energy of a Gaussian everywhere. The gradient goes back through the score: an evaluation
    counts twice the score's network passes.

    Args:
        energy: ``x0 (B, *event) -> (B,)``, differentiable; each sample's from that sample alone.
        scale: a number, a 0-d tensor, ``(B,)``, or a function of the noise level. The number 0
            gives ``score_fn`` itself.
    Raises:
        TypeError, ValueError: an energy that is no function or a scale that is not finite; at the
            first evaluation, an energy of another shape or without a gradient.
    """
    _check(energy, scale)
    return score_fn if is_number(scale, 0) else _EnergyGuided(score_fn, energy, scale)


def noised_energy_guided(score_fn: ScoreFn, energy: NoisedEnergy, scale: Scale = 1.0) -> ScoreFn:
    """``score - scale * grad_x E(x_t, t)``: an energy of the noised state.

    With ``E = -log p(y | x_t)`` this is the exact conditional score. An evaluation counts one
    network pass for the energy.

    Args:
        energy: ``(x (B, *event), level) -> (B,)``, differentiable; each sample's from that sample
            alone.
        scale: as in ``energy_guided``.
    Raises:
        TypeError, ValueError: as ``energy_guided``.
    """
    _check(energy, scale)
    return score_fn if is_number(scale, 0) else _NoisedEnergyGuided(score_fn, energy, scale)


def _check(energy: object, scale: Scale) -> None:
    if not callable(energy):
        raise TypeError(f"energy must be a function of samples, got {energy!r}")
    check_scale(scale)


def _checked(values: Tensor, x: Tensor) -> Tensor:
    if values.shape != (len(x),):
        raise ValueError(
            f"energy must give one number per sample, ({len(x)},), got shape {tuple(values.shape)}"
        )
    if not values.requires_grad:
        raise ValueError(
            "energy must be differentiable: its result does not depend on its argument as far as "
            "autograd sees; write it in torch operations that have a gradient"
        )
    return values


class _EnergyGuided:
    def __init__(self, score_fn: ScoreFn, energy: CleanEnergy, scale: Scale) -> None:
        self.score_fn = score_fn
        self.energy = energy
        self.scale = scale

    def cost_at(self, level: NoiseLevel) -> int:
        return 2 * cost_of(self.score_fn, level)

    def __call__(self, x: Tensor, level: NoiseLevel) -> Prediction:
        def forward(x: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
            prediction = self.score_fn(x, level)
            values = _checked(self.energy(prediction.x0), x)
            return values, torch.ones_like(values), (prediction.eps,)

        gradient, eps = pull_back(x, level, forward)
        weight = expand(level.sigma, x) * weight_of(self.scale, level, x)
        return Prediction.from_eps(x, level, eps + weight * gradient)

    def select(self, indices: Tensor) -> _EnergyGuided:
        scale = part_of(self.scale, indices)
        return _EnergyGuided(select(self.score_fn, indices), self.energy, scale)


class _NoisedEnergyGuided:
    def __init__(self, score_fn: ScoreFn, energy: NoisedEnergy, scale: Scale) -> None:
        self.score_fn = score_fn
        self.energy = energy
        self.scale = scale

    def cost_at(self, level: NoiseLevel) -> int:
        return cost_of(self.score_fn, level) + 1

    def __call__(self, x: Tensor, level: NoiseLevel) -> Prediction:
        def forward(x: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
            values = _checked(self.energy(x, level), x)
            return values, torch.ones_like(values), ()

        (gradient,) = pull_back(x, level, forward)
        weight = expand(level.sigma, x) * weight_of(self.scale, level, x)
        return Prediction.from_eps(x, level, self.score_fn(x, level).eps + weight * gradient)

    def select(self, indices: Tensor) -> _NoisedEnergyGuided:
        scale = part_of(self.scale, indices)
        return _NoisedEnergyGuided(select(self.score_fn, indices), self.energy, scale)
