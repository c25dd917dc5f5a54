"""The one entry point for general SDEs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from sde_diffusion.errors import NonFiniteError, require_count, unknown_name
from sde_diffusion.ito.equations import CHARTS, Charted, Equation, Reverse
from sde_diffusion.ito.sde import COORDINATES, ItoSDE
from solvers import grids
from solvers.base import Step
from solvers.ito.base import Clock, CountedScore, ItoIntegrator, ItoMethod, ItoSolver, steps_on
from solvers.noise import CounterNoise, Noise
from solvers.sample import _initial, _require_instance, _stride
from solvers.solution import Solution

ItoGrid = Callable[[ItoSDE, int], Tensor]
_GRIDS = ("cosine", "quadratic", "time")  # those that read nothing but the two ends
_LOOKS_EVERY = 16


def sample_ito(
    equation: Equation | ItoSDE,
    solver: ItoSolver | ItoIntegrator,
    *,
    shape: Sequence[int] | None = None,
    x: Tensor | None = None,
    steps: int | None = None,
    grid: str | ItoGrid | Sequence[float] | Tensor | None = None,
    seed: int = 0,
    sample_ids: Sequence[int] | Tensor | None = None,
    noise: Noise | None = None,
    coordinates: str | None = None,
    trajectory: bool | int = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    gradients: bool = False,
) -> Solution:
    """Solve a general SDE forward, its reverse, or its probability flow.

    Args:
        equation: ``sde.reverse(score)``, ``sde.flow(score)`` or ``sde.forward()``; an ``ItoSDE``
            itself is its forward equation.
        solver: one of ``solvers.ito``.
        shape: ``(B, *event)``: draw the initial state from the SDE's prior, by ``seed`` and
        ``sample_ids``.
        x: start from this state instead; it keeps its dtype and device.
        steps: number of steps; ``Torchdiffeq`` needs none.
        grid: ``time`` (equal steps, the default), ``quadratic``, ``cosine``, a callable ``(sde,
            steps) -> times``, or times in the order of the run, rising for a forward equation.
        seed, sample_ids: of all randomness; a sample is a function of both, whatever its batch.
        noise: another source than ``CounterNoise``, such as ``brownian_path(equation, seed)``.
        coordinates: ``state``, or for a positive one ``log``, ``sqrt`` or ``reflected``; the SDE's
            own by default. States given and returned are states all the same.
        trajectory: keep every state, or every ``trajectory``-th.
        dtype, device: of a state drawn for ``shape``.
        gradients: record the run for autograd; with native solvers.
    Returns:
        The ``Solution``; ``nfe`` counts calls of the score, a forward equation's is 0.
    Raises:
        ValueError, TypeError: arguments that do not fit, before any work.
        NonFiniteError: the state became NaN or infinite; names the step and time.
    """
    equation = equation.forward() if isinstance(equation, ItoSDE) else equation
    _require_instance("equation", equation, "an Equation or an ItoSDE", Equation)
    _require_instance("solver", solver, "a solver of solvers.ito", ItoMethod)
    if noise is not None:
        _require_instance("noise", noise, "a Noise", Noise)
    if isinstance(solver, ItoIntegrator) and (gradients or trajectory is not False):
        name = "gradients" if gradients else "trajectory"
        raise ValueError(f"{name} does not apply to an adapter, which owns its loop: leave it out")
    chosen = _chosen(equation, coordinates)
    if steps is None and grid is None and solver.adaptive:
        grid = [equation.start, equation.end]
    times = _times(equation, grid, steps)
    stride = _stride(trajectory)
    x, ids = _initial(shape, x, sample_ids, dtype, device)
    drawn = x if shape is not None else None
    counter = CounterNoise(seed, ids)
    noise = counter if noise is None else noise
    if drawn is not None:
        x = _from_prior(equation, drawn, noise, counter)
    _check_state(equation, x, times, chosen)
    counted = None
    if equation.score is not None:
        guided = isinstance(equation, Reverse) and equation.guidance is not None
        counted = CountedScore(equation.score, guided)
        equation = equation.with_score(counted)
    chart = CHARTS.get(chosen)
    if chart is not None:
        equation, x = Charted(equation, chart), chart.of(x)
    solver.check(equation, x)
    clock = Clock(equation.end, equation.start)
    plan = steps_on(times, clock, x.device)
    started = time.perf_counter()
    with torch.set_grad_enabled(gradients):
        if isinstance(solver, ItoIntegrator):
            solution = _carried(equation, solver, x, plan, noise, times)
        else:
            solution = _stepped(equation, solver, x, plan, noise, times, stride)
    if chart is not None:
        solution.x = chart.back(solution.x)
        if solution.trajectory is not None:
            solution.trajectory = chart.back(solution.trajectory)
    if counted is not None and solution.nfe_per_sample is None:
        solution.nfe, solution.network_passes = counted.nfe, counted.network_passes
    solution.stats["seconds"] = time.perf_counter() - started
    return solution


def _stepped(
    equation: Equation,
    solver: ItoSolver,
    x: Tensor,
    steps: Sequence[Step],
    noise: Noise,
    times: Tensor,
    stride: int | None,
) -> Solution:
    kept, kept_at = [x], [0]
    good, since = x, 0
    for done, step in enumerate(steps, 1):
        x = solver.step(equation, x, step, noise)
        if done % _LOOKS_EVERY == 0 or done == len(steps):
            # A look waits for the device, so it is not taken at every step; NaN stays NaN.
            if not bool(x.isfinite().all()):
                _explain(equation, solver, good, steps[since:done], noise)
            good, since = x, done
        if stride is not None and (done % stride == 0 or done == len(steps)):
            kept.append(x)
            kept_at.append(done)
    solution = Solution(x, 0, 0, times, stats={"accepted": len(steps), "rejected": 0})
    if stride is not None:
        solution.trajectory, solution.trajectory_times = torch.stack(kept), times[kept_at]
    return solution


def _explain(
    equation: Equation, solver: ItoSolver, x: Tensor, steps: Sequence[Step], noise: Noise
) -> None:
    """Replay from the last good state, which repeats the run, and name the step at fault."""
    at = steps[0]
    for at in steps:
        x = solver.step(equation, x, at, noise)
        if not bool(x.isfinite().all()):
            break
    raise _not_finite(at)


def _not_finite(step: Step) -> NonFiniteError:
    t = step.start.t.item()
    return NonFiniteError(
        f"the state became NaN or infinite at step {step.index}, t = {t:.6g}: look at the score "
        "and the fields there, or use more steps",
        step.index,
        t,
    )


def _carried(
    equation: Equation,
    solver: ItoIntegrator,
    x: Tensor,
    steps: Sequence[Step],
    noise: Noise,
    times: Tensor,
) -> Solution:
    carried = solver.carry(equation, x, steps, noise)
    if not bool(carried.x.isfinite().all()):
        raise _not_finite(steps[-1])
    nfe = carried.nfe_per_sample
    mean = 0.0 if nfe is None or not len(nfe) else nfe.sum().item() / len(nfe)
    return Solution(
        carried.x,
        mean,
        carried.network_passes,
        times,
        nfe_per_sample=nfe,
        stats={"accepted": carried.accepted, "rejected": carried.rejected},
    )


def _chosen(equation: Equation, coordinates: str | None) -> str:
    if coordinates is None:
        return "state" if isinstance(equation, Charted) else equation.sde.coordinates
    if coordinates not in COORDINATES:
        raise unknown_name("coordinates", coordinates, COORDINATES)
    return coordinates


def _from_prior(equation: Equation, like: Tensor, noise: Noise, counter: CounterNoise) -> Tensor:
    prior = equation.prior
    if prior is None:
        raise ValueError(
            "shape= draws from the prior, which this equation does not have: give "
            "ItoSDE(prior=...), or the state to start from as x="
        )
    place = torch.full((1, len(like)), -1, device=like.device)

    def normal(slot: int) -> Tensor:
        return noise.prior(like) if slot == 0 else counter.normal_at(like, place, slot)[0]

    return prior.sample(normal)


def _check_state(equation: Equation, x: Tensor, times: Tensor, coordinates: str) -> None:
    if coordinates != "state" and not bool((x > 0).all()):
        raise ValueError(
            f"x must be positive, to be solved in coordinates={coordinates!r}; its least element "
            f"is {x.min().item():g}. Give positive states, or coordinates='state'"
        )
    # Halfway, where no field has reason to be singular.
    equation.sde.check(x, 0.5 * float(times[0] + times[-1]))


def _times(
    equation: Equation, grid: str | ItoGrid | Sequence[float] | Tensor | None, steps: int | None
) -> Tensor:
    """The run's times, in its order, float64 on the CPU."""
    if grid is None or isinstance(grid, str) or callable(grid):
        if steps is None:
            raise ValueError("steps is missing: give the number of steps, or times as grid")
        count = require_count("steps", steps)
        name = "time" if grid is None else grid
        if isinstance(name, str) and name not in _GRIDS:
            raise unknown_name("grid", name, _GRIDS)
        ends = _Ends(min(equation.start, equation.end), max(equation.start, equation.end))
        made: Any = grids.GRIDS[name] if isinstance(name, str) else name
        times = torch.as_tensor(made(cast(Any, ends), count), dtype=torch.float64)
        if isinstance(name, str) and not equation.backward:
            times = times.flip(0)
    else:
        times = torch.as_tensor(grid, dtype=torch.float64).detach().cpu()
        count = len(times) - 1 if steps is None else require_count("steps", steps)
    if times.ndim != 1 or len(times) != count + 1 or count < 1:
        raise ValueError(
            f"grid must hold steps + 1 = {count + 1} times, at least two, got shape "
            f"{tuple(times.shape)}"
        )
    rises = not equation.backward
    low, high = min(equation.start, equation.end), max(equation.start, equation.end)
    slack = 1e-6 * high
    if not bool(((times >= 0) & (times <= high + slack)).all()):
        raise ValueError(f"grid must lie in [0, t_max={high:g}], got {times.tolist()}")
    if not bool(((times.diff() > 0) if rises else (times.diff() < 0)).all()):
        raise ValueError(
            f"grid must {'rise' if rises else 'fall'} strictly for this equation, which runs from "
            f"t = {equation.start:g} to {low if not rises else high:g}"
        )
    return times


class _Ends:
    """What the named grids read of an SDE."""

    def __init__(self, t_min: float, t_max: float) -> None:
        self.t_min = t_min
        self.t_max = t_max
