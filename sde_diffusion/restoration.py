"""Guidance by a measurement ``y = A(x) + noise``: approximations of ``grad log p(y | x_t)``.

Both go back through the score, by one gradient of the estimate of x0: an evaluation counts twice
the score's network passes. Both need the spread of the clean sample around its estimate, and take
that of data of variance ``data_std^2``: ``r^2 = data_std^2 sigma^2 / (data_std^2 alpha^2 +
sigma^2)``, which is exact for ``N(m, data_std^2 I)`` (Song et al. 2023, "Pseudoinverse-guided
diffusion models", has ``data_std = 1``, ``alpha = 1``).

What needs no gradient: ``solvers.Replacement``, ``solvers.RePaint`` for a linear A with a
pseudo-inverse, and ``solvers.smc_sample(..., gradient=False)`` for any A.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sde_diffusion.broadcast import expand, per_sample_norm
from sde_diffusion.errors import require_finite
from sde_diffusion.gradients import pull_back
from sde_diffusion.measurements import LinearMeasurement, Measurement, times
from sde_diffusion.parametrization import part_of
from sde_diffusion.prediction import Prediction, ScoreFn, cost_of, select
from sde_diffusion.scales import Scale, check_scale, is_number, weight_of
from sde_diffusion.sde import NoiseLevel

_NO_GRADIENT = (
    "the measurement is not differentiable, and this method takes its gradient; methods that need "
    "none: smc_sample(..., gradient=False) for any measurement, Replacement and RePaint for a "
    "linear one with a pseudo-inverse"
)


def spread_of_x0(level: NoiseLevel, data_std: float) -> Tensor:
    """``r^2``: the variance of x0 given x_t where the data are ``N(m, data_std^2 I)``."""
    data = data_std**2
    return data * level.sigma**2 / (data * level.alpha**2 + level.sigma**2)


def dps_guided(
    score_fn: ScoreFn,
    measurement: Measurement,
    y: Tensor,
    scale: Scale = 1.0,
    data_std: float = 1.0,
) -> ScoreFn:
    """Diffusion posterior sampling: ``score - zeta_t grad_x ||y - A(x0(x))||``, per sample.

    Chung et al. 2023 (arXiv:2209.14687, alg. 1) add ``-zeta grad ||.||^2 / ||.||`` to each step of
    one sampler of a thousand steps. As a score it must not depend on the steps, so zeta is given in
    units of what the norm should be: ``zeta_t = scale sqrt(m) / sqrt(noise_std^2 + r^2)``, m the
    numbers measured. Where the residual has that size, scale 1 is the gradient of
    ``log N(y; A(x0), noise_std^2 + r^2)``.

    Args:
        score_fn: the unconditional score.
        measurement: any, differentiable.
        y: ``(B, *measured)``, or ``(1, *measured)`` for all samples.
        scale: a number, 0-d, ``(B,)``, or a function of the noise level; 0 gives ``score_fn``.
        data_std: standard deviation of the data, above 0.
    Raises:
        TypeError, ValueError: what does not fit; at the first evaluation, a measurement without a
            gradient or of another shape.
    """
    y = _checked(measurement, y, scale, data_std)
    if is_number(scale, 0):
        return score_fn
    return _DPS(score_fn, measurement, y, scale, data_std)


def pigdm_guided(
    score_fn: ScoreFn,
    measurement: LinearMeasurement,
    y: Tensor,
    scale: Scale = 1.0,
    data_std: float = 1.0,
) -> ScoreFn:
    """Pseudo-inverse guidance, for a linear A, with noise or without.

    ``score + (d x0 / d x)^T A^T (r^2 A A^T + noise_std^2 I)^-1 (y - A x0)`` (Song et al. 2023,
    "Pseudoinverse-guided diffusion models for inverse problems", ICLR, eq. 7).
    The exact conditional score for ``N(m, data_std^2 I)``.

    Args:
        score_fn: the unconditional score.
        measurement: linear.
        y: ``(B, *measured)``, or ``(1, *measured)`` for all samples.
        scale: times the gradient; a number, 0-d, ``(B,)``, or a function of the noise level; 0
            gives ``score_fn``.
        data_std: standard deviation of the data, above 0.
    Raises:
        TypeError, ValueError: what does not fit; a measurement that is not linear.
    """
    if isinstance(measurement, Measurement) and not isinstance(measurement, LinearMeasurement):
        raise TypeError(
            "pigdm_guided needs a linear measurement (Inpainting, Colorization, Downsampling, "
            "Blur, Matrix, LinearMap); dps_guided takes any differentiable one"
        )
    y = _checked(measurement, y, scale, data_std)
    if is_number(scale, 0):
        return score_fn
    return _PiGDM(score_fn, measurement, y, scale, data_std)


def _checked(measurement: Measurement, y: Tensor, scale: Scale, data_std: float) -> Tensor:
    if not isinstance(measurement, Measurement):
        raise TypeError(f"measurement must be a Measurement, got {measurement!r}: wrap a function")
    check_scale(scale)
    require_finite("data_std", data_std, above=0.0)
    return measurement.check(y)


def measured_residual(measurement: Measurement, y: Tensor, x0: Tensor) -> Tensor:
    """``y - A(x0)``.

    Raises:
        ValueError: their shapes differ.
    """
    measured = measurement(x0)
    if measured.shape[1:] != y.shape[1:] or len(y) not in (1, len(x0)):
        raise ValueError(
            f"y has shape {tuple(y.shape)}, and the measurement of samples {tuple(x0.shape)} has "
            f"{tuple(measured.shape)}; give (B, *measured) or (1, *measured)"
        )
    return y.to(measured) - measured


def differentiable_residual(measurement: Measurement, y: Tensor, x0: Tensor) -> Tensor:
    """``y - A(x0)`` for an x0 that autograd follows.

    Raises:
        ValueError: the measurement has no gradient, or shapes differ.
    """
    try:
        residual = measured_residual(measurement, y, x0)
    except RuntimeError as error:  # autograd's own, as for .numpy() inside a function
        raise ValueError(_NO_GRADIENT) from error
    if not residual.requires_grad:
        raise ValueError(_NO_GRADIENT)
    return residual


class _Guided:
    """A score moved by the gradient of ``A(x0(x))`` along a cotangent."""

    def __init__(
        self,
        score_fn: ScoreFn,
        measurement: Measurement,
        y: Tensor,
        scale: Scale,
        data_std: float,
    ) -> None:
        self.score_fn = score_fn
        self.measurement = measurement
        self.y = y
        self.scale = scale
        self.data_std = data_std

    def cost_at(self, level: NoiseLevel) -> int:
        return 2 * cost_of(self.score_fn, level)

    def __call__(self, x: Tensor, level: NoiseLevel) -> Prediction:
        def forward(x: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
            prediction = self.score_fn(x, level)
            residual = differentiable_residual(self.measurement, self.y, prediction.x0)
            return residual, self.cotangent(residual, level), (prediction.eps,)

        gradient, eps = pull_back(x, level, forward)
        weight = expand(level.sigma, x) * weight_of(self.scale, level, x)
        return Prediction.from_eps(x, level, eps + weight * gradient)

    def cotangent(self, residual: Tensor, level: NoiseLevel) -> Tensor:
        """``d (-log p(y | x0)) / d residual``."""
        raise NotImplementedError

    def select(self, indices: Tensor) -> _Guided:
        y = self.y if len(self.y) == 1 else self.y[indices.to(self.y.device)]
        score_fn = select(self.score_fn, indices)
        scale = part_of(self.scale, indices)
        return type(self)(score_fn, self.measurement, y, scale, self.data_std)


class _DPS(_Guided):
    def cotangent(self, residual: Tensor, level: NoiseLevel) -> Tensor:
        norm = per_sample_norm(residual)
        direction = residual / expand(torch.where(norm > 0, norm, 1), residual)
        spread = spread_of_x0(level, self.data_std) + self.measurement.noise_std**2
        return times(math.sqrt(self.measurement.numbers(self.y)) / spread.sqrt(), direction)


class _PiGDM(_Guided):
    measurement: LinearMeasurement

    def cotangent(self, residual: Tensor, level: NoiseLevel) -> Tensor:
        spread = spread_of_x0(level, self.data_std)
        return self.measurement.solve(residual, spread, self.measurement.noise_std**2)
