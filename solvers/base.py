"""What a solver is, and how to write one.

A solver is one file in ``solvers/methods`` with a frozen dataclass of settings::

    @dataclass(frozen=True)
    class EulerODE(Solver):
        \"\"\"One line that the catalogue prints.\"\"\"

        order = 1            # declared; `tests` and users measure it
        stochastic = False   # whether it asks for noise

        def coefficients(self, step):
            ratio = step.end.alpha / step.start.alpha
            return ratio, step.end.sigma - ratio * step.start.sigma

        def step(self, score_fn, x, step, state, noise):
            a, b = self.coefficients_of(step, x)
            eps = score_fn(x, step.start).eps
            return Stepped((a * x).addcmul_(b, eps), state)

The rules:

* A solver sees the schedule through ``step.start`` (noisier) and ``step.end`` (cleaner) and the
  score through ``Prediction``; it never asks which SDE, network or guidance there is.
* What depends on the schedule alone goes into ``coefficients``: it is called once per run with
  fields of shape ``(N,)``, one entry per step, in float64, so that the loop computes no schedule.
  ``step`` reads it by ``coefficients_of``, which also serves a ``Step`` made by hand.
* A method that evaluates inside a step names those levels in ``stages``.
* What evolves from step to step (a multistep history) is ``state``: made by ``init``, returned by
  ``step``, never kept in the object.
* Noise comes from ``noise(x, step, slot)`` alone: standard normal, of ``x``'s shape; a second
  independent draw in the same step takes another slot.
* Nothing may couple the samples of a batch: no norm, mean or maximum over the batch dimension.
* A method with an error estimate returns it in ``Stepped.error`` and declares its ``error_order``:
  ``Adaptive`` can then choose its steps, with levels and coefficients of ``(B,)``.
* Settings are checked in ``__post_init__``; ``step`` raises nothing and never waits for the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sde_diffusion.broadcast import expand
from sde_diffusion.prediction import ScoreFn
from sde_diffusion.sde import SDE, HostedLevel, NoiseLevel

if TYPE_CHECKING:
    from solvers.noise import Noise
    from solvers.solution import Solution

State = Any
Coefficients = tuple[Any, ...]  # of tensors, or of such tuples


class Step(NamedTuple):
    """From a noisier level to a cleaner one.

    Attributes:
        index: position on the grid, from 0.
        start, end: the levels at both ends: 0-d fields, or ``(B,)`` where samples have their own
        times.
        stages: levels inside the step, as the solver's ``stages`` named them.
        coefficients: what the solver's ``coefficients`` made of the above; empty if not prepared.
    """

    index: int  # type: ignore[assignment]
    start: NoiseLevel
    end: NoiseLevel
    stages: tuple[NoiseLevel, ...] = ()
    coefficients: Coefficients = ()


class Stepped(NamedTuple):
    """Result of a step.

    Attributes:
        x: the state at ``step.end``.
        state: what the solver carries on from there.
        error: estimate of the step's error in ``x``, of its shape, where the solver makes one.
    """

    x: Tensor
    state: State
    error: Tensor | None = None


class _Declared(ABC):
    """What a method says of itself, and tests measure."""

    @property
    @abstractmethod
    def order(self) -> int:
        """Declared order: global for a deterministic method, weak for a stochastic one."""

    @property
    @abstractmethod
    def stochastic(self) -> bool:
        """Whether noise is drawn."""

    @property
    def weak_order(self) -> int:
        """Declared order of mean and variance, where ``order`` says something else."""
        return self.order


class Solver(_Declared):
    """A method that advances the state by one step. Subclasses are frozen dataclasses of
    settings."""

    @property
    def error_order(self) -> float | None:
        """The power of the step with which ``Stepped.error`` shrinks; ``None`` without one."""
        return None

    def init(self, x: Tensor) -> State:
        """What the solver carries from step to step, before the first."""
        return ()

    def retried(self, before: State, after: State) -> State:
        """The state for a shorter step from the same ``x``, where the one that led from ``before``
        to ``after`` is rejected: of the structure of ``after``, tensors of ``(B, ...)``."""
        return before

    def stages(self, sde: SDE, start: NoiseLevel, end: NoiseLevel) -> tuple[NoiseLevel, ...]:
        """The levels inside a step at which the score will be evaluated; fields as those of
        ``start``."""
        return ()

    def coefficients(self, step: Step) -> Coefficients:
        """What depends on the schedule alone; fields of ``step`` may be 0-d, ``(B,)`` or
        ``(N,)``."""
        return ()

    def displaced(self, state: State) -> State:
        """What to carry on when something else, such as a corrector, has moved ``x``: less what
        was evaluated at the old one and stands for the new."""
        return state

    @abstractmethod
    def step(self, score_fn: ScoreFn, x: Tensor, step: Step, state: State, noise: Noise) -> Stepped:
        """Advance ``x`` ``(B, *event)`` from ``step.start`` to ``step.end``."""

    def coefficients_of(self, step: Step, x: Tensor) -> Coefficients:
        """The step's coefficients, each ready to multiply ``x``."""
        return step.coefficients or expanded(self.coefficients(step), x)


class Corrector(ABC):
    """A Markov kernel that should leave the law at one noise level as it is. Frozen dataclass of
    settings."""

    def coefficients(self, step: Step, level: NoiseLevel) -> Coefficients:
        """What depends on the schedule alone, for a correction at ``level`` within ``step``."""
        return ()

    def coefficients_of(self, step: Step, level: NoiseLevel, x: Tensor) -> Coefficients:
        """The coefficients that ``step`` carries for this corrector, ready to multiply ``x``."""
        return step.coefficients or expanded(self.coefficients(step, level), x)

    @abstractmethod
    def correct(
        self, score_fn: ScoreFn, x: Tensor, level: NoiseLevel, step: Step, noise: Noise
    ) -> Tensor:
        """Move ``x`` at ``level``, within ``step``; noise slots from 1 on are the corrector's."""


class Integrator(_Declared):
    """A method that owns its loop: an adapter to another library.

    Attributes:
        differentiable: the values of ``sample``'s ``gradients`` that it can serve; ``True``: its
            ``solve`` may be recorded; ``"adjoint"``: it has ``solve_with_adjoint``.
    """

    differentiable: ClassVar[tuple[bool | str, ...]] = ()

    @property
    @abstractmethod
    def adaptive(self) -> bool:
        """Whether the method chooses its own steps, so that a run needs no ``steps``."""

    @abstractmethod
    def solve(
        self, score_fn: ScoreFn, sde: SDE, x: Tensor, times: Tensor, noise: Noise
    ) -> Solution:
        """Carry ``x`` from ``times[0]`` to ``times[-1]``; ``score_fn`` counts its own calls."""

    def solve_with_adjoint(
        self, score_fn: ScoreFn, sde: SDE, x: Tensor, times: Tensor, noise: Noise
    ) -> Solution:
        """``solve``, its gradient by integrating the adjoint equation back."""
        raise NotImplementedError(f"{type(self).__name__} integrates no adjoint equation")


def make_steps(sde: SDE, solver: Solver, times: Tensor, x: Tensor) -> list[Step]:
    """All steps of a grid, evaluated in float64 on the host and moved to ``x``'s device at once.

    Args:
        times: decreasing, ``(N + 1,)`` float64 on the CPU.
        x: a tensor of the state's device, dtype (for the coefficients).
    """
    levels = sde.at(times)
    start, end = levels.map(lambda field: field[:-1]), levels.map(lambda field: field[1:])
    together = Step(0, start, end, solver.stages(sde, start, end))
    coefficients = _rows(solver.coefficients(together), x, len(times) - 1)
    ends = unbound(levels, x.device)
    stages = [unbound(stage, x.device) for stage in together.stages]
    return [
        Step(
            i,
            ends[i],
            ends[i + 1],
            tuple(stage[i] for stage in stages),
            coefficients[i],
        )
        for i in range(len(times) - 1)
    ]


def unbound(levels: NoiseLevel, device: torch.device) -> list[HostedLevel]:
    """Levels with ``(N,)`` fields, on the host, as ``N`` levels with 0-d fields on a device."""
    wide = torch.float32 if device.type == "mps" else torch.float64
    ratios = levels.sigma_over_alpha.tolist()
    rows = torch.stack(tuple(levels)).to(device=device, dtype=wide)
    columns = zip(*(row.unbind() for row in rows), strict=True)
    return [HostedLevel.of(column, ratio) for column, ratio in zip(columns, ratios, strict=True)]


def _rows(coefficients: Coefficients, x: Tensor, count: int) -> list[Coefficients]:
    """Coefficients with ``(count,)`` entries as ``count`` tuples of 0-d ones, in ``x``'s dtype."""
    if not coefficients:
        return [()] * count
    columns = (
        _rows(c, x, count)
        if isinstance(c, tuple)
        else c.to(device=x.device, dtype=x.dtype).unbind()
        for c in coefficients
    )
    return list(zip(*columns, strict=True))


def expanded(coefficients: Coefficients, x: Tensor) -> Coefficients:
    """Coefficients ready to multiply ``x``."""
    return tuple(
        expanded(c, x) if isinstance(c, tuple) else expand(c, x).to(x.dtype) for c in coefficients
    )
