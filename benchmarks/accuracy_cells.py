"""Who competes in ``benchmarks.accuracy``, on what, and how one run is measured."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.budget import steps_for_budget
from experiments.metrics import energy_distance, median_distance, rms_distance
from experiments.spec import spec_of
from sde_diffusion import SDE, GaussianMixture, named_sde, named_target
from solvers import Integrator, Solver, catalogue, grids, sample
from solvers.adapters import diffusers_
from solvers.fitted_grid import fit
from solvers.methods.probability_flow import TABLEAUS, ProbabilityFlow
from solvers.methods.unipc import UniPC
from solvers.multistep import Multistep

GRIDS: dict[str, grids.Grid] = {
    "time": grids.time,
    "log_snr": grids.log_snr,
    "karras": grids.karras,
    "quadratic": grids.quadratic,
    "arctan": grids.arctan,
    "arctan(2, 1/4)": partial(grids.arctan, rho=2.0, scale=0.25),
    "arctan(4, 1)": partial(grids.arctan, rho=4.0, scale=1.0),
    "arctan(4, 4)": partial(grids.arctan, rho=4.0, scale=4.0),
}
SAMPLES = 2048
FINE_STEPS = 500
PILOT = 256
SEARCH = 120
SIGMAS: tuple[dict[str, Any], ...] = (
    {},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
)

Grid = str | None
Contender = tuple[Solver | Integrator, Grid]


def label(solver: Solver | Integrator, grid: Grid) -> str:
    """Short and unique: the solver as the command line spells it, and its grid."""
    name = spec_of(solver).replace("diffusers:", "").replace("Scheduler", "")
    for long, short in (
        ("use_karras_sigmas=True", "karras"),
        ("use_exponential_sigmas=True", "exp"),
    ):
        name = name.replace(long, short)
    return name if grid is None else f"{name} @ {grid}"


@dataclass(frozen=True)
class Problem:
    """A target under an SDE, with states of one precision."""

    target_name: str
    sde_name: str
    dtype_name: str = "float32"

    def __str__(self) -> str:
        return f"{self.target_name}, {self.sde_name}, {self.dtype_name}"

    @property
    def target(self) -> GaussianMixture:
        return named_target(self.target_name)

    @property
    def sde(self) -> SDE:
        return named_sde(self.sde_name)

    @property
    def dtype(self) -> torch.dtype:
        kind: torch.dtype = getattr(torch, self.dtype_name)
        return kind

    def draw(self, solver: Solver | Integrator, *, seed: int = 0, **options: Any) -> Tensor:
        shape = (SAMPLES, self.target.dimension)
        options.setdefault("dtype", self.dtype)
        score_fn = self.target.score_fn(self.sde)
        return sample(score_fn, self.sde, solver, shape=shape, seed=seed, **options).x

    def fine(self, store: Path) -> Tensor:
        """The probability-flow ODE solved with many steps of order 4, in float64, same noises.

        Kept in ``store``: it costs as much as all runs of some cells together.
        """
        path = store / f"fine-{self.target_name}-{self.sde_name}.npy"
        if not path.exists():
            rk4 = ProbabilityFlow("rk4")
            x = self.draw(rk4, steps=FINE_STEPS, grid="log_snr", dtype=torch.float64)
            partial = path.with_suffix(".partial")
            with open(partial, "wb") as file:
                np.save(file, x.numpy())
            partial.replace(path)
        return torch.from_numpy(np.load(path, allow_pickle=False)).to(self.dtype)


def _variants(kind: type[Any], settings: dict[str, Any], **fixed: Any) -> list[Any]:
    """A solver at its defaults and at every other order it has."""
    found = [kind(**fixed)]
    for order in (2, 3, 4) if "order" in settings else ():
        try:
            found.append(kind(order=order, **fixed))
        except ValueError:
            continue
    return list(dict.fromkeys(found))


def _on_grids(solvers: list[Solver]) -> list[Contender]:
    return list(itertools.product(solvers, GRIDS))


def ours() -> list[Contender]:
    """Native multistep methods of order 2 and above, at every order, on every fixed grid."""
    solvers = [one for one in our_solvers() if isinstance(one, Multistep)]
    return _on_grids([one for one in solvers if one.order > 1])


def all_ours() -> list[Contender]:
    """One-step methods and DDIM as well, which came first nowhere (see docs/accuracy.md)."""
    return _on_grids(our_solvers())


def our_solvers() -> list[Solver]:
    """Native ODE solvers at every order."""
    solvers: list[Solver] = [ProbabilityFlow(method) for method in TABLEAUS if method != "euler"]
    for entry in catalogue().values():
        native = issubclass(entry.type, Solver) and entry.type is not ProbabilityFlow
        if native and entry.kind == "ODE" and entry.order:
            solvers += _variants(entry.type, entry.settings)
    solvers.append(UniPC(2, variant="bh1"))
    return solvers


def theirs() -> list[Contender]:
    """diffusers' ODE schedulers under their settings."""
    made = diffusers_.diffusers_scheduler
    found = []
    for sigmas, order, last in itertools.product(SIGMAS, (2, 3), (True, False)):
        settings = {"solver_order": order, "lower_order_final": last, **sigmas}
        found.append(made("DPMSolverMultistepScheduler", **settings))
        found.append(made("UniPCMultistepScheduler", **settings))
        found.append(made("DEISMultistepScheduler", **settings))
    for sigmas in SIGMAS:
        found.append(made("HeunDiscreteScheduler", **sigmas))
        found += [made("LMSDiscreteScheduler", order=order, **sigmas) for order in (3, 4)]
    return [(scheduler, None) for scheduler in found]


def our_stochastic() -> list[Contender]:
    """Native SDE solvers, and ODE solvers' stochastic members, at every order."""
    solvers: list[Solver] = []
    for entry in catalogue().values():
        if not issubclass(entry.type, Solver):
            continue
        if entry.kind == "SDE":
            solvers += _variants(entry.type, entry.settings)
        elif entry.kind == "ODE" and "eta" in entry.settings and "order" in entry.settings:
            solvers += _variants(entry.type, entry.settings, eta=1.0)
    return _on_grids(solvers)


def their_stochastic() -> list[Contender]:
    """sde-dpmsolver++ and SA-Solver."""
    made = diffusers_.diffusers_scheduler
    found = []
    for sigmas in SIGMAS:
        found.append(made("SASolverScheduler", **sigmas))
        for order in (2, 3):
            settings = {"algorithm_type": "sde-dpmsolver++", "solver_order": order, **sigmas}
            found.append(made("DPMSolverMultistepScheduler", **settings))
    return [(scheduler, None) for scheduler in found]


@cache
def fitted_grid(problem: Problem, solver: Solver, steps: int) -> Any:
    """The grid fitted to noises of its own, in float32; used for float64 states as well."""
    score_fn = problem.target.score_fn(problem.sde)
    shape = (problem.target.dimension,)
    return fit(score_fn, problem.sde, solver, steps, PILOT, shape=shape, seed=1, evaluations=SEARCH)


def errors(problem: Problem, contender: Contender, nfe: int, fine: Tensor) -> list[float] | None:
    """``[RMS, median]`` distance to the fine solution; None for what overflows, or cannot be that
    short."""
    solver, grid = contender
    try:
        steps = steps_for_budget(solver, nfe)
        # One grid under two names: uniform in t is uniform in log-SNR where log sigma is linear.
        if grid == "time" and _same(grids.time, grids.log_snr, problem.sde, steps):
            return None
        times: Any = GRIDS.get(grid or "")
        if grid == "fitted" and isinstance(solver, Solver):
            times = fitted_grid(Problem(problem.target_name, problem.sde_name), solver, steps)
        x = problem.draw(solver, steps=steps, grid=times)
    except (ValueError, ArithmeticError):
        return None
    found = [rms_distance(x, fine), median_distance(x, fine)]
    return found if all(map(math.isfinite, found)) else None


def energies(problem: Problem, contender: Contender, nfe: int, seeds: range) -> list[float] | None:
    """Unbiased energy distance to exact samples, seed by seed."""
    solver, grid = contender
    found = []
    try:
        steps = steps_for_budget(solver, nfe)
        for seed in seeds:
            x = problem.draw(solver, steps=steps, grid=GRIDS.get(grid or ""), seed=seed)
            exact, _ = problem.target.sample(SAMPLES, seed=1000 + seed)
            found.append(energy_distance(x, exact, unbiased=True))
    except (ValueError, ArithmeticError):
        return None
    return found if all(map(math.isfinite, found)) else None


def _same(a: grids.Grid, b: grids.Grid, sde: SDE, steps: int) -> bool:
    return bool(torch.allclose(a(sde, steps), b(sde, steps), rtol=1e-9, atol=0))
