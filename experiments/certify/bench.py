"""Problems with their references, made once for a run over many solvers."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from experiments.certify.problems import (
    AffineRun,
    GaussianProblem,
    IsotropicScore,
    Moments,
    fine_flow,
    uniform_grid,
    warped_grid,
)
from sde_diffusion import SDE, VESDE, VPSDE, NoiseLevel, Prediction, SubVPSDE, named_target
from sde_diffusion.prediction import ScoreFn, select
from solvers import BrownianPath, CounterNoise, Integrator, Noise, Solver, Step, sample

ROUNDING = 1e-13  # of float64, in some hundred steps at states of size 1
REFERENCE_ERROR = 5e-13  # of DOP853 at rtol 1e-12; rtol 1e-10 differs from it by 3e-12 to 4e-11
_MEAN, _VARIANCE = 0.7, 0.4
_GRIDS = {"uniform": uniform_grid, "uneven": warped_grid}
_MIDDLE = 0.5  # of the way in log-SNR
_PATHS, _PATH_STEPS, _PATH_SEED, _PATH_DEPTH = 48, (32, 64, 128, 256), 11, 13


@dataclass(frozen=True)
class FlowProblem:
    """An ODE problem: states ``(B, 2)`` at ``first`` and where the probability flow takes them;
    ``width``: about the law's standard deviation there."""

    sde: SDE
    score_fn: ScoreFn
    first: float
    x: Tensor
    exact: Tensor
    width: float = 1.0

    def grid(self, kind: str, steps: int) -> Tensor:
        return _GRIDS[kind](self.sde, steps, self.first)

    def error(self, end: Tensor) -> float:
        """RMS distance, in standard deviations of the law."""
        return float((end.double() - self.exact).square().mean().sqrt()) / self.width


@dataclass(frozen=True)
class LawProblem:
    """A 1-D Gaussian ``N(0.7, 0.4)``: its marginal at ``first`` is to become that at ``t_min``."""

    sde: SDE
    first: float
    gaussian: GaussianProblem

    score_fn = IsotropicScore(_MEAN, _VARIANCE)

    def grid(self, kind: str, steps: int) -> Tensor:
        return _GRIDS[kind](self.sde, steps, self.first)

    def error(self, run: AffineRun) -> float:
        """Errors of mean and variance, in units of the exact deviation, as one length."""
        return self._length(run.moments(self.gaussian.marginal(self.first)))

    def draw(self, solver: Solver | Integrator, times: Tensor, count: int) -> Tensor:
        """Samples at ``t_min`` from ones of the marginal at ``first``."""
        start = self.gaussian.marginal(self.first)
        noise = CounterNoise(5)
        x = noise.prior(torch.empty(count, 1, dtype=torch.float64))
        x = start.mean + start.covariance.sqrt() * x
        return sample(self.score_fn, self.sde, solver, x=x, grid=times, seed=6).x

    def standardised(self, x: Tensor) -> tuple[float, float]:
        """Errors of the samples' mean and variance, in units of the exact deviation."""
        exact = self.gaussian.marginal(float(self.sde.t_min))
        mean = (x.mean() - exact.mean[0]) / exact.covariance[0, 0].sqrt()
        return float(mean), float(x.var() / exact.covariance[0, 0] - 1)

    def _length(self, found: Moments) -> float:
        exact = self.gaussian.marginal(float(self.sde.t_min))
        mean = (found.mean - exact.mean)[0] / exact.covariance[0, 0].sqrt()
        variance = found.covariance[0, 0] / exact.covariance[0, 0] - 1
        return math.hypot(float(mean), float(variance))


class SummedPath(Noise):
    """A ``BrownianPath`` asked once, on the finest of nested grids; on the others, its sums.

    The increment of a step is the sum of the fine ones in it, in the clock ``(sigma/alpha)^2``, and
    so the same for every solver and number of steps. Other slots are independent of the path.
    """

    def __init__(self, path: BrownianPath, times: Tensor, x: Tensor) -> None:
        self._path = path
        levels = path.sde.at(times)
        self._clock = levels.sigma_over_alpha.square()
        spans = -self._clock.diff()
        total = torch.zeros_like(x)
        values = [total]
        for k, span in enumerate(spans):
            start, end = (levels.map(lambda f, i=i: f[i]) for i in (k, k + 1))  # type: ignore[misc]
            total = total + span.sqrt() * path(x, Step(k, start, end))
            values.append(total)
        self._values = torch.stack(values)

    def __call__(self, x: Tensor, step: Step, slot: int = 0) -> Tensor:
        if slot != 0:
            return self._path(x, step, slot)
        first, last = (self._place(level) for level in (step.start, step.end))
        span = self._clock[first] - self._clock[last]
        return (self._values[last] - self._values[first]) / span.sqrt()

    def _place(self, level: NoiseLevel) -> int:
        clock = float(level.sigma_over_alpha) ** 2
        return int((self._clock / clock).log().abs().argmin())

    def prior(self, x: Tensor) -> Tensor:
        return self._path.prior(x)

    def select(self, indices: Tensor) -> SummedPath:
        part = copy.copy(self)
        part._path, part._values = self._path.select(indices), self._values[:, indices]
        return part


@dataclass(frozen=True)
class PathProblem:
    """Paths of the reverse SDE on a 1-D Gaussian, and nested grids to run them on."""

    sde: SDE
    noise: SummedPath
    x: Tensor
    steps: tuple[int, ...] = _PATH_STEPS

    score_fn = IsotropicScore(_MEAN, _VARIANCE)

    def grid(self, steps: int) -> Tensor:
        return uniform_grid(self.sde, self.steps[-1])[:: self.steps[-1] // steps]


@dataclass
class Bench:
    """Problems by name, kept once made."""

    sdes: dict[str, SDE] = field(
        default_factory=lambda: {"vp": VPSDE(), "ve": VESDE(), "subvp": SubVPSDE()}
    )
    _flows: dict[tuple[str, str, bool], FlowProblem] = field(default_factory=dict)
    _laws: dict[tuple[str, bool], LawProblem] = field(default_factory=dict)
    _paths: dict[str, PathProblem] = field(default_factory=dict)

    def sde(self, name: str) -> SDE:
        return self.sdes[name]

    def middle(self, name: str) -> float:
        """A time half-way in log-SNR, where solutions bend most: a run from there has not had the
        many easy steps in which a poor start is forgotten."""
        sde = self.sdes[name]
        low, high = (float(sde.at(float(t)).half_log_snr) for t in (sde.t_max, sde.t_min))
        place = torch.tensor(low + _MIDDLE * (high - low), dtype=torch.float64)
        return float(sde.time(place))

    def flow(self, target: str, name: str, from_middle: bool = False) -> FlowProblem:
        """``gaussian`` and ``narrow``, in closed form, or a target by name, against DOP853.

        ``narrow`` is the Gaussian scaled to the noise at ``t_min``. Data much wider than that are
        done with before the end: the right-hand side comes from nothing and goes to nothing, and
        the leading terms of the step errors nearly cancel over the run. A method of order 5 then
        comes down to rounding, at 2e-15, before its slope has settled (Dormand-Prince on VE, on the
        uneven grid: 4.59, 4.70, 4.80, 4.87; on the uniform one 6.3, 3.7). Here the run ends where
        the solution bends, nothing cancels, and slopes from 60 steps on are 4.8 to 5.1.
        """
        key = target, name, from_middle
        if key not in self._flows:
            sde = self.sdes[name]
            noise = float(sde.at(float(sde.t_min)).sigma_over_alpha)
            width = noise if target == "narrow" else 1.0
            gaussian = GaussianProblem(sde)
            gaussian = GaussianProblem(sde, width * gaussian.mean, width**2 * gaussian.covariance)
            closed = target in ("gaussian", "narrow")
            exact = gaussian.target if closed else named_target(target)
            score_fn = exact.score_fn(sde)
            first, last = float(sde.t_max), float(sde.t_min)
            generator = torch.Generator().manual_seed(3)
            x = torch.randn(6, 2, generator=generator, dtype=torch.float64) * sde.prior_std()

            def carried(x: Tensor, start: float, end: float) -> Tensor:
                if closed:
                    return gaussian.exact_flow(x, start, end)
                return fine_flow(score_fn, sde, x, start, end, rtol=1e-12)

            if from_middle:
                x, first = carried(x, first, self.middle(name)), self.middle(name)
            self._flows[key] = FlowProblem(sde, score_fn, first, x, carried(x, first, last), width)
        return self._flows[key]

    def law(self, name: str, from_middle: bool = False) -> LawProblem:
        """The marginal's way from ``t_max``, or from the middle, to ``t_min``."""
        key = name, from_middle
        if key not in self._laws:
            sde = self.sdes[name]
            gaussian = GaussianProblem(
                sde,
                torch.tensor([_MEAN], dtype=torch.float64),
                torch.tensor([[_VARIANCE]], dtype=torch.float64),
            )
            first = self.middle(name) if from_middle else float(sde.t_max)
            self._laws[key] = LawProblem(sde, first, gaussian)
        return self._laws[key]

    def paths(self, name: str) -> PathProblem:
        """Shared Brownian paths."""
        if name not in self._paths:
            sde = self.sdes[name]
            path = BrownianPath(sde, _PATH_SEED, depth=_PATH_DEPTH)
            x = path.prior(torch.empty(_PATHS, 1, dtype=torch.float64)) * sde.prior_std()
            noise = SummedPath(path, uniform_grid(sde, _PATH_STEPS[-1]), x)
            self._paths[name] = PathProblem(sde, noise, x)
        return self._paths[name]


class CountedRows:
    """A score function that counts the samples it was called for, those of its parts included."""

    def __init__(self, score_fn: ScoreFn, total: list[int] | None = None) -> None:
        self._score_fn = score_fn
        self._total = [0] if total is None else total

    @property
    def rows(self) -> int:
        return self._total[0]

    def __call__(self, x: Tensor, level: NoiseLevel) -> Prediction:
        self._total[0] += len(x)
        return self._score_fn(x, level)

    def select(self, indices: Tensor) -> CountedRows:
        return CountedRows(select(self._score_fn, indices), self._total)


def counted(score_fn: ScoreFn) -> CountedRows:
    """``score_fn`` with a count of its own, whatever ``sample`` counts."""
    return CountedRows(score_fn)


class _Asked(Noise):
    """Zero, and a list of the slots that were asked for."""

    def __init__(self) -> None:
        self.slots: set[int] = set()

    def __call__(self, x: Tensor, step: Step, slot: int = 0) -> Tensor:
        self.slots.add(slot)
        return torch.zeros_like(x)

    def prior(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def select(self, indices: Tensor) -> Noise:
        return self


def slots_of(solver: Solver | Integrator) -> tuple[int, ...]:
    """The noise slots that a solver draws from."""
    asked, sde = _Asked(), VPSDE()
    score_fn = IsotropicScore(_MEAN, _VARIANCE)
    x = torch.ones(1, 1, dtype=torch.float64)
    sample(score_fn, sde, solver, x=x, grid=uniform_grid(sde, 4), noise=asked)
    return tuple(sorted(asked.slots)) or (0,)
