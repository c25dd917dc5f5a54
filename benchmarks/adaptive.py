"""Evaluations against RMS: adaptive pairs, and torchdiffeq's dopri5 on the raw equation in t.

RMS distance to the finely solved probability-flow ODE from the same noises, float64 states; where
errors differ, evaluations are interpolated in log-log to the same error. dopri5 gets one sample at
a time, as ``Adaptive`` treats them.

Run: ``python -m benchmarks.adaptive``
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torchdiffeq import odeint

from sde_diffusion import SDE, ScoreFn, named_sde, named_target
from solvers import Adaptive, BogackiShampine, CounterNoise, DormandPrince, Tsitouras, sample
from solvers.methods.probability_flow import ProbabilityFlow

SAMPLES = 32
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
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
    """Evaluations for an RMS of ``error``, from ``(rms, nfe)`` pairs; NaN outside their range."""
    runs = sorted(runs)
    errors, counts = (np.log([run[k] for run in runs]) for k in (0, 1))
    return float(np.exp(np.interp(math.log(error), errors, counts, math.nan, math.nan)))


def main() -> None:
    pairs = (BogackiShampine(), DormandPrince(), Tsitouras())
    for target_name in ("ring", "gmm16"):
        for sde_name in ("vp", "ve"):
            sde, target = named_sde(sde_name), named_target(target_name)
            score_fn = target.score_fn(sde)
            like = torch.empty(SAMPLES, target.dimension, dtype=torch.float64)
            x = CounterNoise(0).prior(like) * sde.prior_std()
            fine = sample(score_fn, sde, ProbabilityFlow("rk4"), x=x, steps=1500, grid="log_snr").x

            def rms(end: Tensor, fine: Tensor = fine) -> float:
                return float((end - fine).square().mean().sqrt())

            raw = [raw_dopri5(score_fn, sde, x, tolerance) for tolerance in TOLERANCES]
            peer = [(rms(end), nfe) for end, nfe in raw]
            print(f"{target_name} {sde_name}: dopri5 in t " + _list(peer))
            for pair in pairs:
                mine = []
                for tolerance in TOLERANCES:
                    run = sample(score_fn, sde, pair, x=x, plan=Adaptive(tolerance, tolerance))
                    mine.append((rms(run.x), float(run.nfe)))
                ratios = (evaluations_at(e, mine) / evaluations_at(e, peer) for e in ERRORS)
                print(f"  {type(pair).__name__:16} " + _list(mine))
                print(
                    "    evaluations over dopri5's at equal RMS: "
                    + ", ".join(f"{e:.0e} {r:.2f}" for e, r in zip(ERRORS, ratios, strict=True)),
                    flush=True,
                )


def _list(runs: list[tuple[float, float]]) -> str:
    return " ".join(f"{nfe:.0f}:{error:.1e}" for error, nfe in runs)


if __name__ == "__main__":
    main()
