"""The one loop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from sde_diffusion.errors import NonFiniteError, require_count, unknown_name
from sde_diffusion.prediction import ScoreFn
from sde_diffusion.sde import SDE
from solvers import grids
from solvers.base import Integrator, Solver
from solvers.counting import CountedScoreFn
from solvers.noise import Noise
from solvers.plans import FixedGrid, Plan, Run
from solvers.progress import Report
from solvers.solution import Solution

_GRADIENTS = (False, True, "checkpoint", "adjoint")


def sample(
    score_fn: ScoreFn,
    sde: SDE,
    solver: Solver | Integrator,
    *,
    shape: Sequence[int] | None = None,
    x: Tensor | None = None,
    steps: int | None = None,
    grid: str | grids.Grid | Sequence[float] | Tensor | None = None,
    seed: int = 0,
    sample_ids: Sequence[int] | Tensor | None = None,
    plan: Plan | None = None,
    noise: Noise | None = None,
    denoise: bool = False,
    trajectory: bool | int = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    compile: bool = False,
    progress: bool | Report = False,
    gradients: bool | Literal["checkpoint", "adjoint"] = False,
) -> Solution:
    """Draw samples: carry noise from ``t_max`` to ``t_min`` with a solver.

    Args:
        score_fn: ``(x, level) -> Prediction``: a wrapped network, a guided one, an exact target.
        sde: the SDE the score belongs to.
        solver: what makes a step, or an adapter that owns its loop.
        shape: ``(B, *event)``: draw the initial state from the prior, by ``seed`` and
        ``sample_ids``.
        x: start from this state at the grid's first time instead; it keeps its dtype and device.
        steps: number of steps, at least 1; ``Adaptive`` and an adaptive adapter need none.
        grid: a name from ``solvers.grids``, a callable ``(sde, steps) -> times``, or decreasing
            times; the SDE's default grid if not given.
        seed: of all randomness in the run, a whole number from 0.
        sample_ids: ``(B,)`` whole numbers; a sample is a function of ``seed`` and its id, whatever
            batch it is drawn in. ``0..B-1`` by default.
        plan: the strategy over the grid; every step once by default; ``Adaptive(rtol, atol)``,
            ``Restart(intervals)``.
        noise: another source of noise than ``CounterNoise(seed, sample_ids)``.
        denoise: finish with the estimate of x_0 at the last time (Tweedie; one more evaluation).
        trajectory: keep every state, or every ``trajectory``-th.
        dtype: of the state drawn for ``shape``.
        device: where that state is drawn.
        compile: run the solver's step through ``torch.compile``.
        progress: show a bar, or call ``progress(done, total)`` after each step.
        gradients: record the run for autograd, so that a loss on ``Solution.x`` can be
            differentiated with respect to ``x``, a guidance scale and network parameters.
            ``True``: the whole graph stays in memory. ``"checkpoint"``: the same gradient with the
            memory of about ``2 sqrt(steps)`` steps, for every step taken once more (which
            ``Solution.nfe`` does not count); native solvers on a fixed grid or with ``Restart``.
            ``"adjoint"``: the adjoint equation, memory of one evaluation; ``TorchdiffeqODE``,
            ``TorchsdeSDE``.
    Returns:
        The ``Solution``: samples, evaluations counted, times and trajectory.
    Raises:
        ValueError, TypeError: arguments that do not fit, before any work.
        NonFiniteError: the state or the score became NaN or infinite; names the step and time.
    """
    if not callable(score_fn):
        raise TypeError(f"score_fn must be callable, (x, level) -> Prediction, got {score_fn!r}")
    _require_instance("sde", sde, "an SDE", SDE)
    _require_instance("solver", solver, "a Solver or an Integrator", Solver, Integrator)
    if plan is not None:
        _require_instance("plan", plan, "a Plan", Plan)
    if noise is not None:
        _require_instance("noise", noise, "a Noise", Noise)
    if gradients not in _GRADIENTS:
        raise unknown_name("value of gradients", gradients, map(str, _GRADIENTS))
    if isinstance(solver, Integrator):
        _refuse_for_integrators(solver, plan, compile, trajectory, gradients)
        chooses_steps = solver.adaptive
        plan = FixedGrid()
    else:
        plan = FixedGrid() if plan is None else plan
        if gradients == "adjoint":
            raise ValueError(
                f"gradients='adjoint' integrates an adjoint equation, and {solver!r} has steps to "
                "record: use True, 'checkpoint', or TorchdiffeqODE or TorchsdeSDE"
            )
        plan.check(solver, trajectory is not False, compile, gradients is not False)
        chooses_steps = plan.chooses_steps
    if chooses_steps and steps is None and grid is None:
        grid = [float(sde.t_max), float(sde.t_min)]
    times = grids.resolve(grid, sde, steps)
    stride = _stride(trajectory)
    x, sample_ids = _initial(shape, x, sample_ids, dtype, device)
    if noise is None:
        noise = plan.noise(sde, solver.stochastic, seed, sample_ids)
    if shape is not None:
        x = noise.prior(x) * sde.prior_std().to(device=x.device, dtype=x.dtype)
    counted = CountedScoreFn(score_fn)
    started = time.perf_counter()
    with torch.set_grad_enabled(gradients is not False):
        if isinstance(solver, Integrator):
            solve = solver.solve_with_adjoint if gradients == "adjoint" else solver.solve
            solution = solve(counted, sde, x, times, noise)
        else:
            checkpoint = gradients == "checkpoint"
            run = Run(counted, sde, solver, x, times, noise, stride, compile, progress, checkpoint)
            solution = plan.run(run)
        if denoise:
            solution = _denoised(solution, counted, sde)
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    solution.stats["seconds"] = time.perf_counter() - started
    return solution


def _denoised(solution: Solution, score_fn: CountedScoreFn, sde: SDE) -> Solution:
    before = score_fn.nfe, score_fn.network_passes
    x = solution.x
    level = sde.at(solution.times[-1]).map(lambda field: field.to(x.device))
    denoised = score_fn(x, level).x0
    if not bool(denoised.isfinite().all()):
        at = solution.times[-1].item()
        raise NonFiniteError(
            f"score_fn returned NaN or infinity in the final denoise, t = {at:.6g}",
            len(solution.times) - 1,
            at,
        )
    return replace(
        solution,
        x=denoised,
        nfe=solution.nfe + score_fn.nfe - before[0],
        network_passes=solution.network_passes + score_fn.network_passes - before[1],
        nfe_per_sample=None if solution.nfe_per_sample is None else solution.nfe_per_sample + 1,
    )


def _initial(
    shape: Sequence[int] | None,
    x: Tensor | None,
    sample_ids: Sequence[int] | Tensor | None,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> tuple[Tensor, Tensor | None]:
    """A tensor of the state's shape, dtype and device (the state itself where given), and the
    ids."""
    if (shape is None) == (x is None):
        raise ValueError(
            "give either shape=(B, *event), to start from the prior, or x=, the state to start from"
        )
    if x is not None:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 1:
            raise TypeError(f"x must be a floating tensor of shape (B, *event), got {_describe(x)}")
        if device is not None and torch.device(device) != x.device:
            x = x.to(device)
        if not bool(x.isfinite().all()):
            raise ValueError("x holds NaN or infinite values; the initial state must be finite")
    else:
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating dtype such as torch.float32, got {dtype!r}")
        if shape is not None and not isinstance(shape, Sequence):
            raise TypeError(f"shape must be a sequence (B, *event), got {shape!r}")
        sizes = [require_count(f"shape[{i}]", size) for i, size in enumerate(shape or ())]
        if not sizes:
            raise ValueError("shape must be (B, *event) with at least the batch size, got ()")
        x = torch.empty(sizes, dtype=dtype, device=device)
    if sample_ids is None:
        return x, None
    ids = torch.as_tensor(sample_ids)
    if ids.is_floating_point() or ids.shape != (len(x),):
        raise ValueError(
            f"sample_ids must be {len(x)} whole numbers, one per sample, got {_describe(ids)}"
        )
    return x, ids.long()


def _require_instance(name: str, value: object, expected: str, *kinds: type) -> None:
    if not isinstance(value, kinds):
        hint = f": give an instance, {value.__name__}()" if isinstance(value, type) else ""
        raise TypeError(f"{name} must be {expected}, got {value!r}{hint}")


def _stride(trajectory: bool | int) -> int | None:
    if trajectory is False:
        return None
    return require_count("trajectory", 1 if trajectory is True else trajectory)


def _refuse_for_integrators(
    solver: Integrator,
    plan: Plan | None,
    compile: bool,
    trajectory: bool | int,
    gradients: bool | str,
) -> None:
    given = [
        ("plan", plan is not None),
        ("compile", compile),
        ("trajectory", trajectory is not False),
    ]
    for name, is_given in given:
        if is_given:
            raise ValueError(
                f"{name} does not apply to an adapter, which owns its loop: leave it out"
            )
    if gradients is not False and gradients not in solver.differentiable:
        can = " or ".join(map(repr, solver.differentiable))
        raise ValueError(
            f"gradients={gradients!r} does not apply to {type(solver).__name__}, which owns its "
            + (f"loop: use {can}" if can else "loop: use a native solver, or TorchdiffeqODE")
        )


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r:.60}"
