"""Every sampler that runs in ``sample``'s own loop, and a score function that counts."""

from __future__ import annotations

from torch import Tensor

from sde_diffusion import NoiseLevel, Prediction, ScoreFn
from solvers import (
    DDIM,
    Ancestral,
    Corrector,
    Integrator,
    Langevin,
    PredictorCorrector,
    ProbabilityFlow,
    Solver,
    catalogue,
)


def native_samplers() -> dict[str, Solver]:
    """Every sampler of the catalogue that runs in ``sample``'s own loop, and the settings whose
    code differs. A new file in ``solvers/methods`` is tested here without a word."""
    samplers: dict[str, Solver] = {}
    for name, entry in catalogue().items():
        if issubclass(entry.type, Integrator):
            continue
        made = entry.type()
        if isinstance(made, Corrector):
            made = PredictorCorrector(corrector=made)
        assert isinstance(made, Solver)
        samplers[name] = made
    samplers["ancestral-large"] = Ancestral(0.5, "large")
    samplers["ddim-0.5"] = DDIM(0.5)
    for method in ("euler", "midpoint", "rk4"):
        samplers[method] = ProbabilityFlow(method)
    samplers["langevin-sample"] = PredictorCorrector(corrector=Langevin(steps=2, norm="sample"))
    samplers["corrector-first"] = PredictorCorrector(Ancestral(), first="corrector")
    return samplers


NATIVE = native_samplers()


class Counting:
    """A score function that counts its own calls, and those of a network inside it."""

    def __init__(self, score_fn: ScoreFn) -> None:
        self.score_fn = score_fn
        self.calls = 0

    def __call__(self, x: Tensor, level: NoiseLevel) -> Prediction:
        self.calls += 1
        return self.score_fn(x, level)
