"""Where along the probability-flow ODE steps are needed: local errors measured on a pilot batch.

A method of order p replaces x0, as a function of ``l = half_log_snr``, by a polynomial; a step of
length h adds an error of about ``h^(p+1) |d^p x0 / dl^p|`` to ``y = x / alpha``, of which the
factor ``G(l)`` is left at the end of the run. A sum of ``w h^(p+1)`` over a given number of steps
is least where the steps' terms are equal, that is for a density of times ``w^(1/(p+1))`` (the
equidistribution principle: de Boor 1974; Ascher, Mattheij & Russell 1995, sec. 9.1.1).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sde_diffusion.prediction import ScoreFn
from sde_diffusion.sde import SDE
from solvers.methods.dpm_solver_pp import DPMSolverPP
from solvers.methods.probability_flow import ProbabilityFlow
from solvers.sample import sample
from solvers.solution import Solution

Curve = NDArray[np.float64]

_PROBES = 8  # places where the growth of a deviation is measured
_PROBE_STEPS = 24  # of a run over the whole range
_DEVIATION = 1e-3  # in units of sqrt(alpha^2 + sigma^2)
# Of the mean, added everywhere: where nothing was seen to happen there are steps as well, and
# neighbouring ones, which a multistep method extrapolates over, are of comparable length.
_EVEN_SHARE = 0.4
_HIGHEST_DERIVATIVE = 2  # stands for those above: with the third, grids were worse on the mixtures


class Pilot(NamedTuple):
    """A batch solved finely.

    Attributes:
        end: states at ``t_min``.
        half_log_snr: increasing, evenly spaced.
        x0: the estimates there, ``(len(half_log_snr), B, D)``.
        growth: RMS deviation at the end for an RMS deviation of ``x / alpha`` of 1 there.
    """

    end: Tensor
    half_log_snr: Curve
    x0: Tensor
    growth: Curve


def finely(
    score_fn: ScoreFn,
    sde: SDE,
    batch: tuple[int, ...],
    seed: int,
    steps: int,
    sample_ids: range,
    trajectory: bool = False,
) -> Solution:
    """The probability-flow ODE in ``steps`` steps of order 4, uniform in log-SNR."""
    return sample(
        score_fn,
        sde,
        ProbabilityFlow("rk4"),
        shape=batch,
        steps=steps,
        grid="log_snr",
        seed=seed,
        sample_ids=sample_ids,
        trajectory=trajectory,
    )


def solved(score_fn: ScoreFn, sde: SDE, batch: tuple[int, ...], seed: int, steps: int) -> Pilot:
    """``batch`` is the shape; ``steps`` are of order 4."""
    run = finely(score_fn, sde, batch, seed, steps, range(batch[0]), trajectory=True)
    states = _states(run)
    levels = [sde.at(t) for t in run.times.tolist()]
    x0 = torch.stack(
        [score_fn(x, level).x0.flatten(1) for x, level in zip(states, levels, strict=True)]
    )
    places = np.array([level.half_log_snr.item() for level in levels])
    return Pilot(run.x, places, x0, _growth(score_fn, sde, run, seed))


def density(pilot: Pilot, order: int) -> Curve:
    """Of times over ``pilot.half_log_snr``, for a method of ``order``; mean 1."""
    derivative = min(order, _HIGHEST_DERIVATIVE)
    spacing = pilot.half_log_snr[1] - pilot.half_log_snr[0]
    change = pilot.x0.numpy()
    for _ in range(derivative):
        change = np.gradient(change, spacing, axis=0)
    error = np.sqrt(np.mean(change**2, axis=(1, 2))) * pilot.growth
    wanted = error ** (1 / (order + 1))
    wanted = wanted / max(_mean(wanted, pilot.half_log_snr), 1e-300) + _EVEN_SHARE
    found: Curve = wanted / _mean(wanted, pilot.half_log_snr)
    return found


def equidistributed(half_log_snr: Curve, weight: Curve, steps: int) -> Tensor:
    """``(steps + 1,)`` values of ``half_log_snr`` with equal integrals of ``weight`` between
    them."""
    middles = 0.5 * (weight[1:] + weight[:-1]) * np.diff(half_log_snr)
    mass = np.concatenate([[0.0], np.cumsum(middles)])
    places = np.linspace(0, mass[-1], steps + 1)
    return torch.from_numpy(np.interp(places, mass, half_log_snr))


def _growth(score_fn: ScoreFn, sde: SDE, fine: Solution, seed: int) -> Curve:
    """By runs from states put off by a little, at a few places; between them log-linear."""
    states = _states(fine)
    generator = torch.Generator().manual_seed(seed)
    count = len(fine.times) - 1
    probes = np.unique(np.linspace(0, count, _PROBES + 1).astype(int)[:-1])
    found = []
    for k in probes:
        x, level = states[k].double(), sde.at(fine.times[k].item())
        radius = (level.alpha**2 + level.sigma**2).sqrt()
        signs = torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1
        steps = max(2, round(_PROBE_STEPS * (1 - k / count)))
        times = fine.times[np.linspace(k, count, min(steps, count - k) + 1).astype(int)]
        ends = [
            sample(score_fn, sde, DPMSolverPP(2), x=start, grid=times, dtype=torch.float64).x
            for start in (x, x + _DEVIATION * radius * signs)
        ]
        deviation = (_DEVIATION * radius / level.alpha).item()
        found.append((ends[1] - ends[0]).square().mean().sqrt().item() / deviation)
    logs = np.log(np.maximum([*found, 1.0], 1e-12))  # nothing is left to grow at the end
    curve: Curve = np.exp(np.interp(np.arange(count + 1), [*probes, count], logs))
    return curve


def _states(run: Solution) -> Tensor:
    if run.trajectory is None:
        raise RuntimeError("the fine solution kept no trajectory")
    return run.trajectory


def _mean(values: Curve, places: Curve) -> float:
    return float(np.trapezoid(values, places) / (places[-1] - places[0]))
