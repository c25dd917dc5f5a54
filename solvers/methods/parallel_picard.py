"""Parallel-in-time sampling by Picard iteration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from sde_diffusion.broadcast import expand, per_sample_norm
from sde_diffusion.errors import NonFiniteError, require_count, require_finite
from sde_diffusion.prediction import ScoreFn
from sde_diffusion.sde import SDE
from solvers.base import Coefficients, Integrator, Solver, Step, expanded, unbound
from solvers.counting import CountedScoreFn
from solvers.methods.ddim import DDIM
from solvers.noise import Noise
from solvers.solution import Solution


@dataclass(frozen=True)
class ParallelPicard(Integrator):
    """A window of steps evaluated at once and iterated to the sequential result (ParaDiGMS).

    In ``y = x / alpha`` a one-step method says ``y_(j+1) = y_j + D_j(y_j)``; Picard iteration puts
    in all D of the last iterate: ``y_(j+1) <- y_0 + D_0 + .. + D_j`` (Shih et al. 2023,
    arXiv:2305.16317, alg. 1). The window slides over the leading steps that no longer change. Every
    sample has a window of its own, so that it does not depend on its batch.

    More evaluations in all (``nfe``), fewer one after another (``stats["sequential_depth"]``).

    Args:
        solver: a one-step solver for a fixed grid.
        window: steps evaluated at once.
        tolerance: largest root-mean-square change, over ``sqrt(alpha^2 + sigma^2)``, of a state
            that is taken to have converged; at 0 the result is the sequential one.
    """

    solver: Solver = field(default_factory=DDIM)
    window: int = 16
    tolerance: float = 1e-3
    adaptive = False

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Solver):
            raise TypeError(f"solver must be a Solver, got {self.solver!r}")
        if self.solver.init(torch.zeros(1)) != ():
            raise ValueError(
                f"solver must be a one-step method, without a history: {self.solver!r}"
            )
        require_count("window", self.window)
        require_finite("tolerance", self.tolerance)
        if self.tolerance < 0:
            raise ValueError(f"tolerance must be at least 0, got {self.tolerance!r}")

    @property
    def order(self) -> int:
        return self.solver.order

    @property
    def stochastic(self) -> bool:
        return self.solver.stochastic

    def solve(
        self, score_fn: ScoreFn, sde: SDE, x: Tensor, times: Tensor, noise: Noise
    ) -> Solution:
        run = _Run(self, score_fn, sde, x, times, noise)
        while run.unfinished():
            run.iterate()
        return run.solution()


class _Run:
    """One solve: every sample's window of states, and where it stands."""

    def __init__(
        self,
        settings: ParallelPicard,
        score_fn: ScoreFn,
        sde: SDE,
        x: Tensor,
        times: Tensor,
        noise: Noise,
    ) -> None:
        self.settings = settings
        self.score_fn = (
            score_fn if isinstance(score_fn, CountedScoreFn) else CountedScoreFn(score_fn)
        )
        self.x = x
        self.times = times
        self.steps = len(times) - 1
        self.width = min(settings.window, self.steps)
        self.schedule = _Schedule(settings.solver, sde, times, x)
        self.noise = _AllSteps(noise, x, _bare_steps(sde, times, x))
        # y at the window's start and behind each of its steps: (B, width + 1, *event).
        start = x / self.schedule.alphas[0]
        self.y = start[:, None].repeat(1, self.width + 1, *(1,) * (x.ndim - 1))
        self.position = torch.zeros(len(x), dtype=torch.long, device=x.device)
        self.offsets = torch.arange(self.width, device=x.device)
        self.nfe = torch.zeros(len(x), dtype=torch.long, device=x.device)
        self.depth = self.passes = 0

    def unfinished(self) -> bool:
        return bool((self.position < self.steps).any())

    def iterate(self) -> None:
        """Evaluate all windows, move their states, slide past what has converged."""
        at = self.position[:, None] + self.offsets  # the step behind each state of a window
        inside = at < self.steps
        sample, place = inside.nonzero(as_tuple=True)
        step = at[sample, place]
        alphas = self.schedule.alphas
        x = self.y[sample, place] * expand(alphas[step], self.x)
        end = self._step(x, sample, step)
        self._refuse_non_finite(end[place == 0], step[place == 0])
        moved = end / expand(alphas[step + 1], self.x)
        change = torch.zeros_like(self.y[:, 1:])
        change[sample, place] = moved - self.y[sample, place]
        y = self.y[:, :1] + change.cumsum(1)
        settled = self._settled(y - self.y[:, 1:], at + 1) | ~inside
        leading = settled.long().cumprod(1).sum(1)
        # The first state behind the window's start is exact: its D was taken at the final state.
        stride = torch.minimum(leading.clamp_min(1), self.steps - self.position)
        self._slide(torch.cat([self.y[:, :1], y], 1), stride)

    def _step(self, x: Tensor, sample: Tensor, step: Tensor) -> Tensor:
        score_fn = self.score_fn.select(sample)
        moved = self.settings.solver.step(
            score_fn, x, self.schedule.at(step, x), (), self.noise.of(sample, step)
        )
        self.depth += score_fn.nfe
        self.passes += score_fn.network_passes * len(x)
        self.nfe += score_fn.nfe * torch.bincount(sample, minlength=len(self.x))
        return moved.x

    def _refuse_non_finite(self, first: Tensor, step: Tensor) -> None:
        """Of the windows' first steps, whose starts are final; later ones are guesses still."""
        bad = ~first.reshape(len(first), -1).isfinite().all(1)
        if bool(bad.any()):
            index = int(step[bad].min())
            time = self.times[index].item()
            what = "the score or the state became NaN or infinite"
            raise NonFiniteError(f"{what} at step {index}, t = {time:.6g}", index, time)

    def _settled(self, change: Tensor, at: Tensor) -> Tensor:
        """Which states, ``(B, width)``, changed by no more than the tolerance."""
        size = per_sample_norm(change.flatten(0, 1)).reshape(at.shape) / self.x[0].numel() ** 0.5
        scale = self.schedule.scales[at.clamp(max=self.steps)]
        return size <= self.settings.tolerance * scale

    def _slide(self, y: Tensor, stride: Tensor) -> None:
        """Move windows on; the last state stands in for those not yet reached."""
        place = (stride[:, None] + torch.arange(self.width + 1, device=y.device)).clamp(
            max=self.width
        )
        index = place.reshape(*place.shape, *(1,) * (y.ndim - 2)).expand(-1, -1, *y.shape[2:])
        self.y = y.gather(1, index)
        self.position = self.position + stride

    def solution(self) -> Solution:
        x = self.y[:, 0] * self.schedule.alphas[-1]
        count = self.nfe.double().mean().item()
        solution = Solution(x, count, self.passes / len(x), self.times, nfe_per_sample=self.nfe)
        solution.stats.update(accepted=self.steps, rejected=0, sequential_depth=self.depth)
        return solution


class _Schedule:
    """All steps of the grid, to be picked from by index."""

    def __init__(self, solver: Solver, sde: SDE, times: Tensor, x: Tensor) -> None:
        levels = sde.at(times)
        start, end = levels.map(lambda f: f[:-1]), levels.map(lambda f: f[1:])
        together = Step(0, start, end, solver.stages(sde, start, end))
        self._place: Callable[[Tensor], Tensor] = lambda field: field.to(x.device)
        self._levels = [level.map(self._place) for level in (start, end, *together.stages)]
        self._coefficients = _mapped(solver.coefficients(together), self._place)
        self.alphas = levels.alpha.to(x)
        self.scales = (levels.alpha**2 + levels.sigma**2).sqrt().to(x)

    def at(self, step: Tensor, x: Tensor) -> Step:
        """A step with ``(len(step),)`` fields, each sample's own."""
        start, end, *stages = (level.map(lambda field: field[step]) for level in self._levels)
        picked = _mapped(self._coefficients, lambda field: field[step])
        return Step(0, start, end, tuple(stages), expanded(picked, x))


class _AllSteps:
    """The noise of every step, drawn once: iterations ask for the same again and again."""

    def __init__(self, noise: Noise, x: Tensor, steps: list[Step]) -> None:
        self._noise = noise
        self._x = x
        self._steps = steps
        self._draws: dict[int, Tensor] = {}

    def of(self, sample: Tensor, step: Tensor) -> Noise:
        """The noise of samples that are each at a step of their own."""
        return _Picked(self, sample, step)

    def draws(self, slot: int) -> Tensor:
        """``(steps, B, *event)``."""
        if slot not in self._draws:
            self._draws[slot] = torch.stack([self._noise(self._x, s, slot) for s in self._steps])
        return self._draws[slot]


def _bare_steps(sde: SDE, times: Tensor, x: Tensor) -> list[Step]:
    """Steps as a source of noise knows them."""
    levels = unbound(sde.at(times), x.device)
    return [Step(i, *pair) for i, pair in enumerate(pairwise(levels))]


class _Picked(Noise):
    def __init__(self, steps: _AllSteps, sample: Tensor, step: Tensor) -> None:
        self._steps = steps
        self._sample = sample
        self._step = step

    def __call__(self, x: Tensor, step: Step, slot: int = 0) -> Tensor:
        return self._steps.draws(slot)[self._step, self._sample]

    def prior(self, x: Tensor) -> Tensor:
        raise ValueError("noise within a step gives no initial state")

    def select(self, indices: Tensor) -> Noise:
        return _Picked(self._steps, self._sample[indices], self._step[indices])


def _mapped(coefficients: Coefficients, function: Callable[[Tensor], Tensor]) -> Coefficients:
    return tuple(
        _mapped(c, function) if isinstance(c, tuple) else function(c) for c in coefficients
    )
