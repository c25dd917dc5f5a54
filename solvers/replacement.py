"""Keep what is known: after every step the measured part of the state is put back, noised."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sde_diffusion.measurements import LinearMeasurement
from sde_diffusion.prediction import ScoreFn
from sde_diffusion.restoration import dps_guided
from sde_diffusion.scales import Scale
from sde_diffusion.sde import SDE, NoiseLevel
from solvers.base import Coefficients, Solver, State, Step, Stepped, expanded
from solvers.noise import Noise

_KNOWN, _FIRST = 1_000_001, 1_000_002  # slots that no solver or corrector comes near


@dataclass(frozen=True, eq=False)
class Replacement(Solver):
    """A solver whose state's measured part is replaced, from the first state on.

    After a step, at the level it *ends* at, ``x <- x + A^+ (alpha y + sigma A z - A x)`` with fresh
    noise z: the measured part is that of the data, noised to the same level as the rest; before the
    first step the same is done at the level where that starts (Song et al. 2021, arXiv:2011.13456,
    app. I.2).
    The last noise is that of ``t_min``: with ``denoise=True`` none is left.

    Where the measurement is noisy, y brings noise along: ``alpha noise_std / s`` in the direction
    of a singular value s of A. Only the rest of sigma is added there, and where it is more than
    sigma nothing is replaced any more.

    A multistep solver keeps no memory here: every step is taken as the first of a run. No gradient
    and no evaluation is needed. The law it samples is not the posterior: the score does not know
    what was measured, only the state does.

    Args:
        solver: any that steps here.
        measurement: linear.
        y: ``(B, *measured)``, or ``(1, *measured)`` for all samples.
    Raises:
        TypeError, ValueError: what does not fit.
    """

    solver: Solver
    measurement: LinearMeasurement
    y: Tensor
    order = 0  # of convergence to the posterior, none is claimed
    stochastic = True

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Solver):
            raise TypeError(
                f"solver must be a Solver that steps here (an adapter owns its loop), got "
                f"{self.solver!r}"
            )
        if not isinstance(self.measurement, LinearMeasurement):
            raise TypeError(
                "measurement must be linear, for its pseudo-inverse: Inpainting, Colorization, "
                f"Downsampling, Blur, Matrix or LinearMap, got {self.measurement!r}"
            )
        object.__setattr__(self, "y", self.measurement.check(self.y))
        if self.measurement.noise_std > 0:  # refused now rather than in a step
            self.measurement.spectral(self.y, torch.ones_like)

    def init(self, x: Tensor) -> State:
        event = self.measurement.event_shape(tuple(self.y.shape[1:]))
        if tuple(x.shape[1:]) != event or len(self.y) not in (1, len(x)):
            raise ValueError(
                f"y of shape {tuple(self.y.shape)} measures samples (B, *{event}), and these have "
                f"shape {tuple(x.shape)}"
            )
        return self.solver.init(x)

    def stages(self, sde: SDE, start: NoiseLevel, end: NoiseLevel) -> tuple[NoiseLevel, ...]:
        return self.solver.stages(sde, start, end)

    def coefficients(self, step: Step) -> Coefficients:
        return self._each_alone(step), self._noised(step.start), self._noised(step.end)

    def step(self, score_fn: ScoreFn, x: Tensor, step: Step, state: State, noise: Noise) -> Stepped:
        if step.coefficients:
            inner, before, after = step.coefficients
        else:  # made by hand: the solver sees to its own
            inner = ()
            before, after = (expanded(self._noised(level), x) for level in (step.start, step.end))
        if step.index == 0:
            x = self._replaced(x, before, noise(x, step, _FIRST))
        mine = Step(step.index, step.start, step.end, step.stages, inner)
        x = self.solver.step(score_fn, x, mine, state, noise).x
        x = self._replaced(x, after, noise(x, step, _KNOWN))
        # Every step puts in fresh noise, so that differences between evaluations, which a multistep
        # method extrapolates, are noise in the measured part: it begins anew.
        return Stepped(x, self.solver.init(x))

    def _each_alone(self, step: Step) -> Coefficients:
        """The solver's coefficients, of every step as if it were a run of its own."""
        count = step.start.t.numel()
        rows = []
        for i in range(count):
            start, end, *stages = (
                level.map(lambda field, i=i: field[i : i + 1])  # type: ignore[misc]
                for level in (step.start, step.end, *step.stages)
            )
            rows.append(self.solver.coefficients(Step(0, start, end, tuple(stages))))
        return _stacked(rows)

    def _noised(self, level: NoiseLevel) -> Coefficients:
        return level.alpha, level.sigma

    def _replaced(self, x: Tensor, coefficients: Coefficients, z: Tensor) -> Tensor:
        alpha, sigma = coefficients
        measurement = self.measurement
        offset = alpha * self.y.to(x) - measurement(x)
        if measurement.noise_std == 0:
            return x + measurement.pseudo_inverse(offset + measurement(sigma * z))
        variance = (alpha * measurement.noise_std) ** 2

        def left(power: Tensor) -> Tensor:
            """Of the level's variance, what y's own noise leaves to be added."""
            return sigma**2 - variance / power

        pulled = measurement.spectral(offset, lambda power: (left(power) >= 0) / power)
        added = measurement.spectral(
            measurement(z), lambda power: left(power).clamp_min(0).sqrt() / power
        )
        return x + measurement.adjoint(pulled + added)


def _stacked(rows: list[Coefficients]) -> Coefficients:
    """Coefficients with ``(1,)`` entries, one set per step, as one set with ``(N,)`` entries."""
    return tuple(
        _stacked(list(column)) if isinstance(column[0], tuple) else torch.cat(column)
        for column in zip(*rows, strict=True)
    )


def manifold_constrained(
    score_fn: ScoreFn,
    solver: Solver,
    measurement: LinearMeasurement,
    y: Tensor,
    scale: Scale = 1.0,
    data_std: float = 1.0,
) -> tuple[ScoreFn, Solver]:
    """The manifold-constrained gradient (Chung et al. 2022, arXiv:2206.00941, alg. 1-3).

    The gradient of the residual's norm through the estimate of x0, as ``dps_guided`` takes it, and
    then the measured part replaced: the gradient moves what the replacement leaves free.

    Returns:
        The score and the solver for ``sample``.
    """
    guided = dps_guided(score_fn, measurement, y, scale, data_std)
    return guided, Replacement(solver, measurement, y)
