"""How it is solved: samplers for any score function under any linear SDE.

Every class in ``solvers.methods`` and ``solvers.adapters`` is importable from here by its name.
"""

from typing import Any

from solvers import grids, ito
from solvers.adapters.diffusers_ import diffusers_scheduler
from solvers.adaptive import Adaptive
from solvers.base import Corrector, Integrator, Solver, Step, Stepped, make_steps
from solvers.catalogue import catalogue
from solvers.dequantised import class_posterior, dequantised_likelihood
from solvers.encoding import change_class, decode, encode, interpolate, round_trip
from solvers.ito.run import sample_ito
from solvers.jacobian import Memory
from solvers.likelihood import log_likelihood
from solvers.likelihood_bound import likelihood_bound
from solvers.methods.edm_heun import EDMHeun as EDMStochasticHeun
from solvers.noise import BrownianPath, CounterNoise, Noise, RecordedNoise
from solvers.plans import FixedGrid, Plan
from solvers.repaint import RePaint
from solvers.replacement import Replacement, manifold_constrained
from solvers.restart import Restart, RestartInterval
from solvers.sample import sample
from solvers.smc import SMCSolution, smc_sample
from solvers.solution import Solution

__all__ = [
    "Adaptive",
    "BrownianPath",
    "Corrector",
    "CounterNoise",
    "EDMStochasticHeun",
    "FixedGrid",
    "Integrator",
    "Memory",
    "Noise",
    "Plan",
    "RePaint",
    "RecordedNoise",
    "Replacement",
    "Restart",
    "RestartInterval",
    "SMCSolution",
    "Solution",
    "Solver",
    "Step",
    "Stepped",
    "catalogue",
    "change_class",
    "class_posterior",
    "decode",
    "dequantised_likelihood",
    "diffusers_scheduler",
    "encode",
    "grids",
    "interpolate",
    "ito",
    "likelihood_bound",
    "log_likelihood",
    "make_steps",
    "manifold_constrained",
    "round_trip",
    "sample",
    "sample_ito",
    "smc_sample",
]


def __getattr__(name: str) -> Any:
    for entry in catalogue().values():
        if entry.type.__name__ == name:
            return entry.type
    raise AttributeError(f"module 'solvers' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *(entry.type.__name__ for entry in catalogue().values())])
