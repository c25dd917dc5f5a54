"""Steps chosen by their errors, for every sample on its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from sde_diffusion.broadcast import expand
from sde_diffusion.errors import require_between, require_count, require_finite, unknown_name
from sde_diffusion.sde import SDE, NoiseLevel
from solvers.base import Solver, State, Step, Stepped
from solvers.guard import explain
from solvers.noise import BrownianPath, CounterNoise, Noise
from solvers.plans import Plan, Run
from solvers.progress import reporting
from solvers.solution import Solution

_FIRST = 0.15  # of the span, at most: the first step
_LEAST_ERROR = 1e-10
# A step that ends this near to the end goes to it: a short last step would cost as much as another,
# and the solution is smooth there. After a rejection the step is as asked for, but for rounding.
_STRETCH, _STRETCH_AGAIN = 1.3, 1.01
_NON_FINITE_LIMIT = 16


@dataclass(frozen=True)
class Adaptive(Plan):
    """Every sample takes the steps that keep its own error within its tolerance.

    The solver's error estimate and the state, both in units of ``sqrt(alpha^2 + sigma^2)``, give
    ``e``, the root mean square over the event of ``error / (atol + rtol max(|x_before|,
    |x_after|))`` (Hairer, Norsett & Wanner 1993, sec. II.4, eq. 4.11). A step with ``e <= 1`` is
    kept; steps, measured in ``half_log_snr``, are then multiplied by ``safety e^(-integral/k)
    e_before^(proportional/k)`` (PI control: Gustafsson 1991; Hairer & Wanner 1996, sec. IV.2), with
    k the solver's ``error_order``, within ``[shrink, grow]``; after a rejection by at most 1. A
    rejected step shrinks by ``safety e^(-1/k)``. The first is ``min(0.15, (rtol + atol)^(1/k))``
    of the whole range: at its noisy end the solution is smooth, and a step too long costs one
    rejection.

    Finished samples leave the batch. A stochastic solver is driven by a ``BrownianPath``, of which
    a rejected step asks for a finer view. Of a grid the two ends are taken.

    Args:
        rtol, atol: tolerances, above 0.
        max_steps: attempts, kept or rejected, that any sample may make.
        safety: in (0, 1].
        integral, proportional: the controller's exponents; 1 and 0 make the plain controller.
        shrink, grow: bounds of the step's factor.
        unfinished: what becomes of samples that have not arrived after ``max_steps``, or whose
            score is not finite: ``raise`` an error for the run, or mark them: ``nan`` states and
            ``False`` in ``Solution.reached``, while the others go on as if alone.
    """

    rtol: float = 1e-4
    atol: float = 1e-4
    max_steps: int = 10_000
    safety: float = 0.9
    integral: float = 0.7
    proportional: float = 0.4
    shrink: float = 0.2
    grow: float = 10.0
    unfinished: Literal["raise", "nan"] = "raise"
    chooses_steps = True

    def __post_init__(self) -> None:
        require_finite("rtol", self.rtol, above=0.0)
        require_finite("atol", self.atol, above=0.0)
        require_count("max_steps", self.max_steps)
        require_finite("safety", self.safety, above=0.0)
        require_between("safety", self.safety, 0, 1)
        require_finite("integral", self.integral, above=0.0)
        require_between("proportional", self.proportional, 0, self.integral)
        require_finite("shrink", self.shrink, above=0.0)
        require_between("shrink", self.shrink, 0, self.safety)
        require_finite("grow", self.grow, above=1.0)
        if self.unfinished not in ("raise", "nan"):
            raise unknown_name("unfinished", self.unfinished, ("raise", "nan"))

    def check(self, solver: Solver, trajectory: bool, compile: bool, gradients: bool) -> None:
        if solver.error_order is None:
            raise ValueError(
                f"{type(solver).__name__} estimates no error, which plan=Adaptive needs; "
                f"these do: {', '.join(_estimating())}"
            )
        asked = {"trajectory": trajectory, "compile": compile, "gradients": gradients}
        for name, given in asked.items():
            if given:
                raise ValueError(
                    f"{name} does not apply to plan=Adaptive, whose samples take steps of their "
                    "own in a batch that shrinks: leave it out"
                )

    def noise(self, sde: SDE, stochastic: bool, seed: int, sample_ids: Tensor | None) -> Noise:
        kind = BrownianPath(sde, seed, sample_ids, depth=20) if stochastic else None
        return kind or CounterNoise(seed, sample_ids)

    def run(self, run: Run) -> Solution:
        if run.solver.stochastic and not isinstance(run.noise, BrownianPath):
            raise ValueError(
                f"noise must be a BrownianPath under plan=Adaptive, got {type(run.noise).__name__}:"
                " fresh noise for a rejected step would bias the variance"
            )
        walk = _Walk(self, run)
        total = len(run.x)
        with reporting(run.progress, total) as report:
            while len(walk.active.indices):
                walk.attempt()
                if report is not None:
                    report(total - len(walk.active.indices), total)
        return walk.solution()


@dataclass
class _Active:
    """The samples still on their way, ``(A, ...)`` each.

    Attributes:
        indices: in the whole batch.
        x, level, state: where they are, and what the solver carries.
        span: the next step, in ``half_log_snr``.
        error: of the last step kept.
        rejected: whether the last attempt was.
        non_finite: attempts so far that were not finite.
    """

    indices: Tensor
    x: Tensor
    level: NoiseLevel
    state: State
    span: Tensor
    error: Tensor
    rejected: Tensor
    non_finite: Tensor

    def select(self, kept: Tensor) -> _Active:
        return _Active(
            self.indices[kept],
            self.x[kept],
            self.level.map(lambda field: field[kept]),
            _mapped(lambda part: part[kept], self.state),
            self.span[kept],
            self.error[kept],
            self.rejected[kept],
            self.non_finite[kept],
        )


class _Walk:
    """One run."""

    def __init__(self, plan: Adaptive, run: Run) -> None:
        x, device = run.x, run.x.device
        self._plan, self._run = plan, run
        self._order = float(run.solver.error_order or 1.0)
        wide = torch.float32 if device.type == "mps" else torch.float64
        start, self._end = (
            run.sde.at(run.times[place]).map(lambda field: field.to(device=device, dtype=wide))
            for place in (0, -1)
        )
        count = len(x)
        ones = torch.ones(count, device=device, dtype=wide)
        first = min(_FIRST, (plan.rtol + plan.atol) ** (1 / self._order))
        self.active = _Active(
            torch.arange(count, device=device),
            x,
            start.per_sample(count),
            run.solver.init(x),
            ones * first * (self._end.half_log_snr - start.half_log_snr),
            ones,
            torch.zeros(count, device=device, dtype=torch.bool),
            torch.zeros(count, device=device, dtype=torch.long),
        )
        self._score_fn = run.score_fn.apart()
        self._noise = run.noise
        self._attempts = 0
        self._accepted, self._nfe, self._passes, self._tried = (
            torch.zeros(count, device=device, dtype=torch.long) for _ in range(4)
        )
        self._result = torch.empty_like(x)
        self._reached = torch.ones(count, device=device, dtype=torch.bool)

    def attempt(self) -> None:
        """Try one step of every active sample; those that arrive leave."""
        active, solver = self.active, self._run.solver
        if self._attempts >= self._plan.max_steps:
            if self._plan.unfinished == "raise":
                raise self._too_many()
            self._mark(torch.ones_like(active.rejected))
            return
        step = self._step()
        calls, passes = self._score_fn.nfe, self._score_fn.network_passes
        stepped = solver.step(self._score_fn, active.x, step, active.state, self._noise)
        self._nfe[active.indices] += self._score_fn.nfe - calls
        self._passes[active.indices] += self._score_fn.network_passes - passes
        self._attempts += 1
        error = self._error(step, stepped)
        finite = error.isfinite()
        accepted = finite & (error <= 1)
        active.non_finite = active.non_finite + ~finite
        failed = active.non_finite >= _NON_FINITE_LIMIT
        if self._plan.unfinished == "raise":
            self._refuse_non_finite(step, failed)
        self._tried[active.indices] += 1
        self._accepted[active.indices] += accepted
        self._move(step, stepped, error, accepted)
        arrived = accepted & (step.end.half_log_snr >= self._end.half_log_snr)
        if bool(failed.any()):
            arrived = arrived[self._mark(failed)]
        self._dismiss(arrived)

    def solution(self) -> Solution:
        share = max(1, len(self._nfe))
        counts = (self._nfe, self._passes, self._accepted, self._tried - self._accepted)
        nfe, passes, accepted, rejected = (count.sum().item() / share for count in counts)
        solution = Solution(
            self._result, nfe, passes, self._run.times, nfe_per_sample=self._nfe.cpu()
        )
        if self._plan.unfinished == "nan":
            solution.reached = self._reached.cpu()
        solution.stats.update(accepted=accepted, rejected=rejected)
        return solution

    def _step(self) -> Step:
        """The step that every active sample tries next."""
        sde, start, last = self._run.sde, self.active.level, self._end
        remaining = last.half_log_snr - start.half_log_snr
        stretch = torch.where(self.active.rejected, _STRETCH_AGAIN, _STRETCH)
        arrives = self.active.span * stretch >= remaining
        place = torch.where(arrives, last.half_log_snr, start.half_log_snr + self.active.span)
        reached = sde.at(sde.time(place))._replace(half_log_snr=place)
        end = NoiseLevel(*(torch.where(arrives, a, b) for a, b in zip(last, reached, strict=True)))
        return Step(self._attempts, start, end, self._run.solver.stages(sde, start, end))

    def _error(self, step: Step, stepped: Stepped) -> Tensor:
        """``e`` of each sample; a step is kept where it is at most 1."""
        if stepped.error is None:
            raise ValueError(f"{self._run.solver!r} declares error_order but returned no error")
        before, after = (
            expand(torch.sqrt(level.alpha**2 + level.sigma**2), stepped.x)
            for level in (step.start, step.end)
        )
        size = torch.maximum((self.active.x / before).abs(), (stepped.x / after).abs())
        weighted = stepped.error / after / (self._plan.atol + self._plan.rtol * size)
        flat = weighted.reshape(len(weighted), -1)
        return (flat.norm(dim=1) / math.sqrt(max(1, flat.shape[1]))).to(step.end.t.dtype)

    def _move(self, step: Step, stepped: Stepped, error: Tensor, accepted: Tensor) -> None:
        """Go on where accepted; choose the next steps."""
        plan, active, k = self._plan, self.active, self._order
        bounded = torch.where(error.isfinite(), error, torch.inf).clamp_min(_LEAST_ERROR)
        ahead = bounded ** (-plan.integral / k) * active.error ** (plan.proportional / k)
        factor = plan.safety * torch.where(accepted, ahead, bounded ** (-1 / k))
        factor = factor.clamp(plan.shrink, plan.grow)
        factor = torch.where(active.rejected | ~accepted, factor.clamp(max=1.0), factor)
        tried = step.end.half_log_snr - step.start.half_log_snr
        ends = (torch.where(accepted, a, b) for a, b in zip(step.end, step.start, strict=True))
        retry = self._run.solver.retried(active.state, stepped.state)
        self.active = replace(
            active,
            x=torch.where(_against(accepted, active.x), stepped.x, active.x),
            level=NoiseLevel(*ends),
            state=_merged(accepted, stepped.state, retry),
            span=tried * factor,
            error=torch.where(accepted, bounded, active.error),
            rejected=~accepted,
        )

    def _dismiss(self, arrived: Tensor) -> None:
        if not bool(arrived.any()):
            return
        self._result[self.active.indices[arrived]] = self.active.x[arrived]
        self._keep(~arrived)

    def _mark(self, failed: Tensor) -> Tensor:
        """Give samples up; which of the active ones remain."""
        indices = self.active.indices[failed]
        self._result[indices] = math.nan
        self._reached[indices] = False
        self._keep(~failed)
        return ~failed

    def _keep(self, kept: Tensor) -> None:
        (kept,) = torch.nonzero(kept, as_tuple=True)
        self.active = self.active.select(kept)
        if len(kept):
            self._score_fn = self._score_fn.select(kept)
            self._noise = self._noise.select(kept)

    def _refuse_non_finite(self, step: Step, failed: Tensor) -> None:
        if bool(failed.any()):
            active, solver = self.active, self._run.solver
            # Less what was evaluated before: a slope that is not finite would pass for the state's.
            state = solver.displaced(active.state)
            raise explain(solver, self._score_fn, active.x, step, state, self._noise)

    def _too_many(self) -> RuntimeError:
        active = self.active
        times = active.level.t
        return RuntimeError(
            f"max_steps={self._plan.max_steps} attempts were not enough: {len(times)} of "
            f"{len(self._nfe)} samples are still between t = {times.max().item():.6g} and "
            f"t = {times.min().item():.6g}, with steps down to {active.span.min().item():.3g} in "
            "half_log_snr; loosen rtol and atol, use float64 states, or raise max_steps"
        )


def _estimating() -> list[str]:
    from solvers.catalogue import catalogue

    types = (entry.type for entry in catalogue().values())
    return [t.__name__ for t in types if issubclass(t, Solver) and t().error_order is not None]


def _mapped(function: Callable[[Tensor], Tensor], state: State) -> State:
    if isinstance(state, Tensor):
        return function(state)
    return tuple(_mapped(function, part) for part in state)


def _merged(accepted: Tensor, state: State, retry: State) -> State:
    """``state`` where accepted, ``retry`` elsewhere: tensors of ``(A, ...)``, or tuples of
    them."""
    if isinstance(state, Tensor):
        return torch.where(_against(accepted, state), state, retry)
    return tuple(_merged(accepted, a, b) for a, b in zip(state, retry, strict=True))


def _against(mask: Tensor, x: Tensor) -> Tensor:
    return mask.reshape(mask.shape + (1,) * (x.ndim - 1))
