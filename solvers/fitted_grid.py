"""Grids fitted to a score, an SDE and a solver, by the error they leave on a pilot batch."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator
from scipy.optimize import minimize
from torch import Tensor

from sde_diffusion.errors import require_count
from sde_diffusion.prediction import ScoreFn
from sde_diffusion.sde import SDE
from solvers import grids
from solvers.base import Solver
from solvers.methods.probability_flow import ProbabilityFlow
from solvers.sample import sample

_FORMAT = "sde-diffusion fitted grid, version 1"
_START_GRIDS = ("log_snr", "karras", "time")
_KNOTS = 6


@dataclass(frozen=True)
class FittedGrid:
    """Times found by ``fit``; give it to ``sample`` as ``grid``.

    Attributes:
        times: decreasing, from ``t_max`` to ``t_min``.
        error: RMS distance to the fine solution that it left on the pilot batch.
        untuned_error: the same of the best grid that the search started from.
        fitted_to: the SDE and the solver, for the reader.
    """

    times: tuple[float, ...]
    error: float
    untuned_error: float
    fitted_to: str

    def __call__(self, sde: SDE, steps: int) -> Tensor:
        if steps != len(self.times) - 1:
            raise ValueError(
                f"grid was fitted for {len(self.times) - 1} steps, and steps={steps} were asked for"
            )
        return torch.tensor(self.times, dtype=torch.float64)

    def save(self, path: str | Path) -> None:
        """Write the grid as JSON, whole or not at all."""
        path = Path(path)
        content = {"format": _FORMAT, **self.__dict__}
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            json.dump(content, file, indent=1)
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | Path) -> FittedGrid:
        """Read what ``save`` wrote; a ``ValueError`` names a file that is something else."""
        try:
            content = json.loads(Path(path).read_text())
            if content.pop("format") != _FORMAT:
                raise ValueError("another format")
            return cls(times=tuple(content.pop("times")), **content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"path {str(path)!r} holds no fitted grid: {error}") from None


def fit(
    score_fn: ScoreFn,
    sde: SDE,
    solver: Solver,
    steps: int,
    pilot: int = 64,
    *,
    shape: Sequence[int] | None = None,
    seed: int = 0,
    evaluations: int = 400,
    fine_steps: int = 200,
) -> FittedGrid:
    """The grid of ``steps`` steps that leaves the least error on a pilot batch.

    The logarithms of the step sizes in half_log_snr are a smooth curve through a few values, and
    those are searched (Powell's method) for the least RMS distance between the solver's samples and
    the finely solved ODE from the same noises, starting from the best of the fixed grids. The error
    that is minimised is the one that is wanted: for a multistep solver, local errors do not add up
    to it.

    Args:
        score_fn, sde, solver: as for ``sample``; the solver draws no noise.
        steps: number of steps of the grid.
        pilot: samples in the pilot batch.
        shape: of one event, ``(D,)`` or ``(C, H, W)``; ``score_fn.event_shape``, which exact
            targets have, where not given.
        seed: of the pilot's noises.
        evaluations: runs of the solver that the search may take.
        fine_steps: steps of order 4 for the fine solution.
    Raises:
        ValueError: a stochastic solver, counts below 1, no event shape.
    """
    if solver.stochastic:
        raise ValueError(f"solver must draw no noise to have a grid fitted, got {solver!r}")
    require_count("steps", steps)
    batch = (require_count("pilot", pilot), *_event_shape(score_fn, shape))
    exact = sample(
        score_fn,
        sde,
        ProbabilityFlow("rk4"),
        shape=batch,
        steps=fine_steps,
        grid="log_snr",
        seed=seed,
    ).x
    low, high = (sde.at(float(t)).half_log_snr.item() for t in (sde.t_max, sde.t_min))

    def times_of(curve: NDArray[np.float64]) -> Tensor:
        return _pinned(sde.time(_half_log_snrs(curve, steps, low, high)), sde)

    def error_of(times: Tensor) -> float:
        end = sample(score_fn, sde, solver, shape=batch, grid=times, seed=seed).x
        return float((end - exact).square().mean().sqrt())

    starts = [grids.GRIDS[name](sde, steps) for name in _START_GRIDS]
    untuned, best = min(((error_of(times), times) for times in starts), key=lambda pair: pair[0])

    def objective(curve: NDArray[np.float64]) -> float:
        return float(np.log(error_of(times_of(curve)) + 1e-300))

    found = minimize(
        objective,
        _curve_of(sde.at(best).half_log_snr, min(_KNOTS, steps)),
        method="Powell",
        options={"maxfev": require_count("evaluations", evaluations), "xtol": 1e-3, "ftol": 1e-4},
    )
    times = times_of(found.x)
    error = error_of(times)
    if error > untuned:
        times, error = best, untuned
    return FittedGrid(tuple(times.tolist()), error, untuned, f"{sde!r}, {solver!r}")


def _half_log_snrs(curve: NDArray[np.float64], steps: int, low: float, high: float) -> Tensor:
    """A grid from the logarithms of its step sizes at evenly spread knots."""
    knots = np.linspace(0, 1, len(curve))
    middles = (np.arange(steps) + 0.5) / steps
    sizes = curve if len(curve) == 1 else PchipInterpolator(knots, curve)(middles)
    sizes = np.exp(np.clip(sizes - np.max(sizes), -12, 0)) * np.ones(steps)
    position = np.concatenate([[0.0], np.cumsum(sizes)]) / np.sum(sizes)
    return torch.from_numpy(low + (high - low) * position)


def _curve_of(half_log_snr: Tensor, knots: int) -> NDArray[np.float64]:
    """The knots whose curve comes nearest to a grid."""
    sizes = np.log(half_log_snr.diff().numpy())
    middles = (np.arange(len(sizes)) + 0.5) / len(sizes)
    return np.interp(np.linspace(0, 1, knots), middles, sizes)


def _pinned(times: Tensor, sde: SDE) -> Tensor:
    times[0], times[-1] = sde.t_max, sde.t_min
    return times


def _event_shape(score_fn: ScoreFn, shape: Sequence[int] | None) -> tuple[int, ...]:
    known = shape if shape is not None else getattr(score_fn, "event_shape", None)
    if known is None:
        raise ValueError("shape is missing: give the shape of one event, such as (3, 32, 32)")
    return tuple(known)
