"""Evaluations against RMS: adaptive pairs, and torchdiffeq's dopri5 on the raw equation in t.

RMS distance to the finely solved probability-flow ODE from the same noises, float64 states; where
errors differ, evaluations are interpolated in log-log to the same error. dopri5 gets one sample at
a time, as ``Adaptive`` treats them.

Run: ``python -m benchmarks.adaptive``
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchdiffeq import odeint

from sde_diffusion import SDE, ScoreFn, named_sde, named_target
from solvers import Adaptive, BogackiShampine, CounterNoise, DormandPrince, Tsitouras, sample
from solvers.methods.probability_flow import ProbabilityFlow

SAMPLES = 64
FINE_STEPS = 1500
PEER = "dopri5 in t"
TOLERANCES = tuple(10 ** (-k / 2) for k in range(4, 15))
ERRORS = (1e-2, 1e-3, 1e-4, 1e-5)


def raw_dopri5(score_fn: ScoreFn, sde: SDE, x: Tensor, tolerance: float) -> tuple[Tensor, float]:
    """End states and mean evaluations of ``dx/dt = f x - g^2 score / 2``."""
    calls = 0

    def slope(t: Tensor, state: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        level = sde.at(t.clamp(sde.t_min, sde.t_max))
        return level.f * state - 0.5 * level.g2 * score_fn(state, level).score

    ends = torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64)
    rows = [
        odeint(slope, x[i : i + 1], ends, rtol=tolerance, atol=tolerance, method="dopri5")[-1]
        for i in range(len(x))
    ]
    return torch.cat(rows), calls / len(x)


def evaluations_at(error: float, runs: list[tuple[float, float]]) -> float:
    """Evaluations for an RMS of ``error``, from ``(rms, nfe)`` pairs; NaN outside their range.

    Runs that another one beats in both are left out: the RMS is ruled by a few samples, and now and
    then by luck.
    """
    front = [run for run in runs if not any(a < run[0] and b <= run[1] for a, b in runs)]
    errors, counts = (np.log([run[k] for run in sorted(front)]) for k in (0, 1))
    return float(np.exp(np.interp(math.log(error), errors, counts, math.nan, math.nan)))


def measure(target_name: str, sde_name: str) -> dict[str, Any]:
    """``dopri5`` and each pair: ``[[RMS, evaluations], ...]`` by tolerance."""
    sde, target = named_sde(sde_name), named_target(target_name)
    score_fn = target.score_fn(sde)
    like = torch.empty(SAMPLES, target.dimension, dtype=torch.float64)
    x = CounterNoise(0).prior(like) * sde.prior_std()
    fine = sample(score_fn, sde, ProbabilityFlow("rk4"), x=x, steps=FINE_STEPS, grid="log_snr").x

    def rms(end: Tensor) -> float:
        return float((end - fine).square().mean().sqrt())

    raw = (raw_dopri5(score_fn, sde, x, tolerance) for tolerance in TOLERANCES)
    peer = [(rms(end), nfe) for end, nfe in raw]
    found: dict[str, Any] = {PEER: peer}
    for pair in (BogackiShampine(), DormandPrince(), Tsitouras()):
        runs = (sample(score_fn, sde, pair, x=x, plan=Adaptive(t, t)) for t in TOLERANCES)
        found[type(pair).__name__] = [(rms(run.x), float(run.nfe)) for run in runs]
    return found


def ratios(found: dict[str, Any]) -> dict[str, tuple[float | None, str]]:
    """At each RMS: our evaluations over dopri5's, of the pair that needs fewest, and its name; None
    outside the range."""
    peer = found[PEER]
    return {
        f"{error:.0e}": _least(
            (evaluations_at(error, runs) / evaluations_at(error, peer), name)
            for name, runs in found.items()
            if name != PEER
        )
        for error in ERRORS
    }


def _least(ratios: Iterable[tuple[float, str]]) -> tuple[float | None, str]:
    return min((pair for pair in ratios if math.isfinite(pair[0])), default=(None, "-"))


def main() -> None:
    for target_name in ("ring", "gmm16"):
        for sde_name in ("vp", "ve"):
            found = measure(target_name, sde_name)
            print(target_name, sde_name, ratios(found))
            for name, runs in found.items():
                shown = " ".join(f"{nfe:.0f}:{error:.1e}" for error, nfe in runs)
                print(f"  {name:16} {shown}", flush=True)


if __name__ == "__main__":
    main()
