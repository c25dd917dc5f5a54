"""Every sampler under every SDE and every guidance reaches its target.

The statistics are means of functions of one sample: the coordinates, their products, and which
component is nearest. Their exact values and standard errors are the target's own, so a tolerance
needs nothing from the sampler:

* Monte Carlo: 5 standard errors of a mean over N = 800 samples (one in 1.7 million by chance, and
  the seed is fixed);
* discretisation: 0.05 of the statistic's own deviation, above a standard error and far below the
  tolerance. Each sampler gets the steps that this takes: 60 for the ODE methods of order 2 and 4,
  150 for those of order 1, 100 with a corrector; the adaptive one chooses its own. Measured once
  with 20,000 samples (standard error 0.007): at most 0.013 for the former, 0.035 for ancestral and
  0.042 with a corrector, on EDM.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from sde_diffusion import (
    SDE,
    GaussianMixture,
    ScoreFn,
    classifier_free_guided,
    classifier_guided,
)
from solvers import (
    DDIM,
    AdaptiveSDE,
    Ancestral,
    AnnealedLangevin,
    EulerMaruyama,
    Integrator,
    Langevin,
    PredictorCorrector,
    ProbabilityFlow,
    ReverseDiffusion,
    Solver,
    sample,
)
from tests.problems import SDES

N = 800
LABEL = 1
TARGET = GaussianMixture(
    torch.tensor([[-1.2, -0.4], [-0.3, 1.1], [0.4, -0.9], [1.3, 0.6]]),
    torch.tensor([0.05, 0.12, 0.08, 0.2]),
    torch.tensor([0.2, 0.3, 0.35, 0.15]),
    torch.tensor([0, 1, 0, 1]),
)

SAMPLERS: dict[str, tuple[Solver | Integrator, int | None]] = {
    "ancestral": (Ancestral(), 150),
    "ancestral-large": (Ancestral(variance="large"), 150),
    "ancestral-0.5": (Ancestral(0.5), 150),
    "ddim": (DDIM(), 150),
    "euler_maruyama": (EulerMaruyama(), 150),
    "euler_maruyama-0.5": (EulerMaruyama(0.5), 150),
    "reverse_diffusion": (ReverseDiffusion(), 150),
    "midpoint": (ProbabilityFlow("midpoint"), 60),
    "heun": (ProbabilityFlow("heun"), 60),
    "rk4": (ProbabilityFlow("rk4"), 60),
    "predictor_corrector": (PredictorCorrector(), 100),
    "corrector-first": (PredictorCorrector(Ancestral(), Langevin(0.1), first="corrector"), 100),
    "annealed": (PredictorCorrector(Ancestral(), AnnealedLangevin()), 100),
    "adaptive_sde": (AdaptiveSDE(rtol=0.1, atol=0.1), None),
}

# gamma = 1; a tensor, because the number takes the conditional score alone.
GUIDANCES: dict[str, Callable[[SDE], ScoreFn]] = {
    "none": lambda sde: TARGET.score_fn(sde),
    "classifier": lambda sde: classifier_guided(
        TARGET.score_fn(sde), TARGET.classifier(sde), LABEL, 1.0
    ),
    "cfg": lambda sde: classifier_free_guided(TARGET.model(sde), LABEL, torch.tensor(1.0)),
}


def statistics(x: Tensor) -> Tensor:
    """``(B, 9)``: coordinates, their products, and the nearest component."""
    x = x.double()
    nearest = (x[:, None] - TARGET.means).square().sum(2).argmin(1)
    products = torch.stack([x[:, 0] ** 2, x[:, 0] * x[:, 1], x[:, 1] ** 2], 1)
    return torch.cat([x, products, torch.nn.functional.one_hot(nearest, 4).double()], 1)


@cache
def exact(guided: bool) -> tuple[Tensor, Tensor]:
    """Means and deviations of the statistics under the target: of 400,000 exact samples, whose own
    standard error is 1/22 of the one allowed for. The first two moments are also closed-form."""
    label = LABEL if guided else None
    values = statistics(TARGET.sample(400_000, seed=1, label=label, dtype=torch.float64)[0])
    mean, deviation = values.mean(0), values.std(0)
    law = TARGET.conditional(LABEL) if guided else TARGET
    second = law.covariance() + torch.outer(law.mean(), law.mean())
    closed = torch.tensor([*law.mean().tolist(), second[0, 0], second[0, 1], second[1, 1]])
    assert ((mean[:5] - closed).abs() < 5 * deviation[:5] / math.sqrt(400_000) + 1e-6).all()
    mean[:5] = closed
    return mean, deviation


@pytest.mark.parametrize("guidance", GUIDANCES)
@pytest.mark.parametrize("name", ["vp", "subvp", "cosine", "ve", "edm"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_reaches_the_target(sampler: str, name: str, guidance: str) -> None:
    solver, steps = SAMPLERS[sampler]
    sde = SDES[name]
    solution = sample(
        GUIDANCES[guidance](sde), sde, solver, shape=(N, 2), steps=steps, seed=17, denoise=True
    )
    assert solution.network_passes == solution.nfe * (1 if guidance == "none" else 2)
    mean, deviation = exact(guidance != "none")
    found = statistics(solution.x).mean(0)
    # Where a component has no mass, the deviation is that of a fraction of 1/N.
    allowed = (5 / math.sqrt(N) + 0.05) * deviation.clamp_min(1 / math.sqrt(N))
    excess = (found - mean).abs() / allowed
    assert (excess < 1).all(), f"{excess} of the tolerance: {found} against {mean}"
