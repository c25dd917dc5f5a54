"""Grids fitted to a score, an SDE and a solver: local errors made equal, then a search."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
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
from solvers.local_errors import density, equidistributed, finely, solved
from solvers.sample import sample

_FORMAT = "sde-diffusion fitted grid, version 1"
_KNOTS = 6
_JUDGES = 3  # times the pilot
_WORST = 1e30  # what a run that overflows counts as
_STARTS: dict[str, grids.Grid] = {
    "time": grids.time,
    "log_snr": grids.log_snr,
    "karras": grids.karras,
    "arctan": grids.arctan,
    "arctan, fine": partial(grids.arctan, rho=2.0, scale=0.25),
}


@dataclass(frozen=True)
class FittedGrid:
    """Times found by ``fit``; give it to ``sample`` as ``grid``.

    Attributes:
        times: decreasing, from ``t_max`` to ``t_min``.
        error: RMS distance to the fine solution that it left on noises that the search did not see.
        untuned_error: the same of the best fixed grid.
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
    evaluations: int = 200,
    fine_steps: int = 200,
) -> FittedGrid:
    """The grid of ``steps`` steps that leaves the least error, judged by a pilot batch.

    First the local errors are measured along the finely solved ODE, and times put where they come
    out equal (``solvers.local_errors``). That is right for small steps; for few of them, and for
    multistep methods, whose local errors do not add up, the grid is then searched: the logarithms
    of the step sizes in half_log_snr are a smooth curve through six values, too few to fit the
    pilot's noise, and those are moved (Powell's method) for the least RMS distance to the fine
    solution, from the best of that grid and the fixed ones. Three times as many other noises then
    decide between what was found and where it started.

    Args:
        score_fn, sde, solver: as for ``sample``; the solver draws no noise.
        steps: number of steps of the grid.
        pilot: samples to search on; three times as many more judge. Where the RMS is ruled by few
            samples (those that end in another mode), more are worth their cost: 256 in
            ``benchmarks/accuracy.py``.
        shape: of one event, ``(D,)`` or ``(C, H, W)``; ``score_fn.event_shape``, which exact
            targets have, where not given.
        seed: of the pilot's noises.
        evaluations: runs of the solver that the search may take; 0 for none.
        fine_steps: steps of order 4 for the fine solution, at least 8.
    Raises:
        ValueError: a stochastic solver, counts below their least, no event shape.
    """
    if solver.stochastic:
        raise ValueError(f"solver must draw no noise to have a grid fitted, got {solver!r}")
    require_count("steps", steps)
    require_count("pilot", pilot)
    require_count("evaluations", evaluations, least=0)
    require_count("fine_steps", fine_steps, least=8)
    event = _event_shape(score_fn, shape)
    batch = solved(score_fn, sde, (pilot, *event), seed, fine_steps)
    low, high = (float(batch.half_log_snr[place]) for place in (0, -1))
    judges = range(pilot, (1 + _JUDGES) * pilot)
    fine = finely(score_fn, sde, (len(judges), *event), seed, fine_steps, judges)
    searched, judged = (range(pilot), batch.end), (judges, fine.x)

    def times_of(curve: NDArray[np.float64]) -> Tensor:
        return _pinned(sde.time(_half_log_snrs(curve, steps, low, high)), sde)

    def error_of(times: Tensor, part: tuple[range, Tensor]) -> float:
        ids, end = part
        shape = (len(ids), *event)
        x = sample(score_fn, sde, solver, shape=shape, seed=seed, sample_ids=ids, grid=times).x
        error = float((x - end).double().square().mean().sqrt())
        return error if np.isfinite(error) else _WORST

    weight = density(batch, solver.order)
    spread = sde.time(equidistributed(batch.half_log_snr, weight, steps))
    fixed = [grid(sde, steps) for grid in _STARTS.values()]
    starts = sorted((*fixed, _pinned(spread, sde)), key=lambda times: error_of(times, searched))
    candidates = [*starts]
    if evaluations:
        found = minimize(  # type: ignore[call-overload]
            lambda curve: float(np.log(error_of(times_of(curve), searched) + 1e-300)),
            _curve_of(sde.at(starts[0]).half_log_snr, min(_KNOTS, steps)),
            method="Powell",
            options={"maxfev": evaluations, "xtol": 1e-3, "ftol": 1e-4},
        )
        candidates.append(times_of(found.x))
    untuned = min(error_of(times, judged) for times in fixed)
    error, best = min(
        ((error_of(times, judged), times) for times in candidates), key=lambda pair: pair[0]
    )
    return FittedGrid(tuple(best.tolist()), error, untuned, f"{sde!r}, {solver!r}")


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
