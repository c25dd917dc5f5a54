"""Error against evaluations on exact targets: ours against the best scheduler of diffusers.

Deterministic solvers: RMS and median distance to the finely solved probability-flow ODE from the
same 2,048 noises. All runs, theirs and ours, start at ``t_max`` and end at ``t_min`` without a
final denoise, so that all are held against the same solution: diffusers' last steps to sigma = 0,
and those that stay at the last level, are not taken (see ``solvers/adapters/diffusers_.py``), and
the evaluation saved goes into one step more. At each number of evaluations the best of all solvers
and untuned grids of one side meets the best of the other; then the best three of ours get grids
fitted to other noises (``solvers/fitted_grid.py``, where it is there).

Stochastic solvers: unbiased energy distance to exact samples. The best setting of either side is
chosen on one set of noises and judged on others, in pairs, with the standard error of the
difference.

Targets: at NFE 5 to 50 no worse than diffusers; with a fitted grid at most 0.7 of its RMS at NFE 8
to 30; energy distance at NFE 20 and 50 no worse, beyond twice the standard error.

Run: ``python -m benchmarks.accuracy`` (``--quick`` for a look, ``--all`` for a table of every
solver of ours; diffusers is the extra ``peers``)
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import itertools
import math
import multiprocessing
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from experiments.budget import steps_for_budget
from experiments.metrics import energy_distance, median_distance, rms_distance
from experiments.spec import spec_of
from sde_diffusion import SDE, GaussianMixture, named_sde, named_target
from solvers import Integrator, Solver, catalogue, sample
from solvers.adapters import diffusers_
from solvers.methods.probability_flow import TABLEAUS, ProbabilityFlow

TARGETS = ("ring", "gmm16", "moons")
SDE_NAMES = ("vp", "ve")
GRIDS = ("time", "log_snr", "karras", "quadratic")
BUDGETS = (5, 8, 10, 15, 20, 30, 50)
FITTED_BUDGETS = (8, 10, 15, 20, 30)
QUICK_BUDGETS = (5, 10, 30)
STOCHASTIC_BUDGETS = (20, 50)
FITTED_TARGET = 0.7
SAMPLES = 2048
FINE_STEPS = 500
PILOT = 256
FIT_EVALUATIONS = 150
REPEATS = 6
WORKERS = 2
SIGMAS: tuple[dict[str, Any], ...] = (
    {},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
)


@dataclass(frozen=True)
class Cell:
    """One run: its errors, and what made it."""

    rms: float
    median: float
    solver: Solver | Integrator
    grid: str | None

    def __str__(self) -> str:
        return named(self.solver, self.grid)


@dataclass(frozen=True)
class Verdict:
    """One target met or missed."""

    what: str
    where: str
    ratio: float
    met: bool


def named(solver: Solver | Integrator, grid: str | None) -> str:
    name = spec_of(solver).replace("diffusers:", "").replace("Scheduler", "")
    for long, short in (
        ("use_karras_sigmas=True", "karras"),
        ("use_exponential_sigmas=True", "exp"),
    ):
        name = name.replace(long, short)
    return name if grid is None else f"{name} {grid}"


def variants(kind: type[Any], settings: dict[str, Any], **fixed: Any) -> list[Any]:
    """A solver at its defaults and at every other order it has."""
    found = [kind(**fixed)]
    for order in (2, 3, 4) if "order" in settings else ():
        try:
            found.append(kind(order=order, **fixed))
        except ValueError:
            continue
    return list(dict.fromkeys(found))


def deterministic() -> list[Solver]:
    """Native ODE solvers of order 2 and above (and DDIM), at every order."""
    solvers: list[Solver] = [ProbabilityFlow(method) for method in TABLEAUS if method != "euler"]
    for entry in catalogue().values():
        native = issubclass(entry.type, Solver) and entry.type is not ProbabilityFlow
        if native and entry.kind == "ODE" and entry.order:
            solvers += variants(entry.type, entry.settings)
    return solvers


def stochastic() -> list[Solver]:
    """Native SDE solvers, and ODE solvers' stochastic members, at every order."""
    solvers: list[Solver] = []
    for entry in catalogue().values():
        if not issubclass(entry.type, Solver):
            continue
        if entry.kind == "SDE":
            solvers += variants(entry.type, entry.settings)
        elif entry.kind == "ODE" and "eta" in entry.settings and "order" in entry.settings:
            solvers += variants(entry.type, entry.settings, eta=1.0)
    return solvers


def schedulers() -> list[Integrator]:
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
    return found


def stochastic_schedulers() -> list[Integrator]:
    """sde-dpmsolver++ and SA-Solver."""
    made = diffusers_.diffusers_scheduler
    found = []
    for sigmas in SIGMAS:
        found.append(made("SASolverScheduler", **sigmas))
        for order in (2, 3):
            settings = {"algorithm_type": "sde-dpmsolver++", "solver_order": order, **sigmas}
            found.append(made("DPMSolverMultistepScheduler", **settings))
    return found


@dataclass(frozen=True)
class Problem:
    """A target under an SDE."""

    target_name: str
    sde_name: str

    def __str__(self) -> str:
        return f"{self.target_name}, {self.sde_name}"

    @property
    def target(self) -> GaussianMixture:
        return named_target(self.target_name)

    @property
    def sde(self) -> SDE:
        return named_sde(self.sde_name)

    def draw(
        self, solver: Solver | Integrator, *, seed: int = 0, dtype: torch.dtype, **options: Any
    ) -> Tensor:
        shape = (SAMPLES, self.target.dimension)
        score_fn = self.target.score_fn(self.sde)
        return sample(score_fn, self.sde, solver, shape=shape, seed=seed, dtype=dtype, **options).x

    def fine(self) -> Tensor:
        """The probability-flow ODE solved with many steps of order 4, in float64, same noises."""
        rk4 = ProbabilityFlow("rk4")
        return self.draw(rk4, steps=FINE_STEPS, grid="log_snr", dtype=torch.float64)


def cells(
    problem: Problem,
    solvers: Iterable[Solver | Integrator],
    nfe: int,
    fine: Tensor,
    dtype: torch.dtype,
) -> list[Cell]:
    """Every solver on every grid, best first; what overflows or cannot be that short is left
    out."""
    found = []
    for solver in solvers:
        for grid in GRIDS if isinstance(solver, Solver) else (None,):
            try:
                steps = steps_for_budget(solver, nfe)
                x = problem.draw(solver, steps=steps, grid=grid, dtype=dtype)
            except (ValueError, ArithmeticError):
                continue
            errors = rms_distance(x, fine.to(dtype)), median_distance(x, fine.to(dtype))
            if math.isfinite(errors[0]):
                found.append(Cell(*errors, solver, grid))
    return sorted(found, key=lambda cell: cell.rms)


@cache
def fitted_grid(problem: Problem, solver: Solver, steps: int) -> Any:
    """The grid fitted to noises of its own, in float32; used for float64 states as well."""
    from solvers.fitted_grid import fit

    return fit(
        problem.target.score_fn(problem.sde),
        problem.sde,
        solver,
        steps,
        PILOT,
        shape=(problem.target.dimension,),
        seed=1,
        evaluations=FIT_EVALUATIONS,
    )


def fitted(
    problem: Problem, best: list[Cell], nfe: int, fine: Tensor, dtype: torch.dtype
) -> Cell | None:
    """The best of the three first solvers with a grid fitted to other noises than those judged."""
    if importlib.util.find_spec("solvers.fitted_grid") is None:
        return None
    solvers = list(dict.fromkeys(cell.solver for cell in best))[:3]
    found = []
    for solver in solvers:
        steps = steps_for_budget(solver, nfe)
        grid = fitted_grid(problem, solver, steps)
        x = problem.draw(solver, steps=steps, grid=grid, dtype=dtype)
        rms = rms_distance(x, fine.to(dtype))
        found.append(Cell(rms, median_distance(x, fine.to(dtype)), solver, "fitted"))
    return min(found, key=lambda cell: cell.rms)


def ode_table(
    console: Console,
    problem: Problem,
    dtype: torch.dtype,
    budgets: tuple[int, ...],
    with_peers: bool,
) -> list[Verdict]:
    """Ours against theirs at each number of evaluations."""
    fine = problem.fine()
    name = f"{problem}, {str(dtype)[6:]}"
    table = Table(title=f"{name}: distance to the fine ODE solution, RMS | median")
    for column in ("NFE", "ours", "best untuned", "theirs", "best", "RMS", "median", "fitted"):
        table.add_column(column, justify="right" if column in ("NFE", "RMS", "median") else "left")
    table.add_column("RMS", justify="right")
    verdicts = []
    for nfe in budgets:
        ours = cells(problem, deterministic(), nfe, fine, dtype)
        row = [str(nfe), f"{ours[0].rms:.1e}|{ours[0].median:.1e}", str(ours[0])]
        theirs = cells(problem, schedulers(), nfe, fine, dtype) if with_peers else []
        if theirs:
            ratio = ours[0].rms / theirs[0].rms
            least = [min(cell.median for cell in side) for side in (ours, theirs)]
            medians = least[0] / least[1]
            row += [f"{theirs[0].rms:.1e}|{theirs[0].median:.1e}", str(theirs[0])]
            row += [f"{ratio:.2f}", f"{medians:.2f}"]
            where = f"{name}, NFE {nfe}"
            verdicts.append(Verdict("untuned RMS <= 1", where, ratio, ratio <= 1))
            verdicts.append(Verdict("untuned median <= 1", where, medians, medians <= 1))
        else:
            row += ["-"] * 4
        if nfe in FITTED_BUDGETS and (cell := fitted(problem, ours, nfe, fine, dtype)):
            row.append(f"{cell.rms:.1e}|{cell.median:.1e} {cell}")
            if theirs:
                ratio = cell.rms / theirs[0].rms
                row.append(f"{ratio:.2f}")
                what = f"fitted RMS <= {FITTED_TARGET}"
                verdicts.append(Verdict(what, where, ratio, ratio <= FITTED_TARGET))
        table.add_row(*row)
    console.print(table)
    return verdicts


def energies(
    problem: Problem, solver: Solver | Integrator, nfe: int, grid: str | None, seeds: range
) -> Tensor:
    """Unbiased energy distance to exact samples, seed by seed."""
    found = []
    for seed in seeds:
        steps = steps_for_budget(solver, nfe)
        x = problem.draw(solver, steps=steps, grid=grid, seed=seed, dtype=torch.float32)
        exact, _ = problem.target.sample(SAMPLES, seed=1000 + seed)
        found.append(energy_distance(x, exact, unbiased=True))
    return torch.tensor(found, dtype=torch.float64)


def best_stochastic(
    problem: Problem, solvers: Iterable[Solver | Integrator], nfe: int
) -> tuple[Solver | Integrator, str | None]:
    """The solver and grid with the least energy distance on one set of noises."""
    found: list[tuple[float, int, Solver | Integrator, str | None]] = []
    for solver in solvers:
        for grid in GRIDS if isinstance(solver, Solver) else (None,):
            try:
                energy = energies(problem, solver, nfe, grid, range(1)).item()
            except (ValueError, ArithmeticError):
                continue
            if math.isfinite(energy):
                found.append((energy, len(found), solver, grid))
    return min(found)[2:]


def sde_table(
    console: Console, problem: Problem, budgets: tuple[int, ...], repeats: int, with_peers: bool
) -> list[Verdict]:
    """Energy distance of the best stochastic solver of either side."""
    table = Table(title=f"{problem}, float32: unbiased energy distance to exact samples")
    for column in ("NFE", "ours", "best", "theirs", "best", "ours - theirs", "standard error"):
        table.add_column(column)
    verdicts = []
    for nfe in budgets:
        seeds = range(1, 1 + repeats)
        chosen = best_stochastic(problem, stochastic(), nfe)
        ours = energies(problem, chosen[0], nfe, chosen[1], seeds)
        row = [str(nfe), f"{ours.mean():.1e}", named(*chosen)]
        if with_peers:
            other = best_stochastic(problem, stochastic_schedulers(), nfe)
            theirs = energies(problem, other[0], nfe, other[1], seeds)
            difference = ours - theirs
            error = (difference.std() / math.sqrt(repeats)).item()
            mean = difference.mean().item()
            row += [f"{theirs.mean():.1e}", named(*other), f"{mean:+.1e}", f"{error:.1e}"]
            what = "energy: (ours - theirs) / standard error <= 2"
            ratio = mean / error
            verdicts.append(Verdict(what, f"{problem}, NFE {nfe}", ratio, ratio <= 2))
        table.add_row(*row)
    console.print(table)
    return verdicts


def all_table(console: Console, problem: Problem, dtype: torch.dtype) -> None:
    """Every solver of ours on its best grid."""
    fine = problem.fine()
    table = Table(title=f"{problem}, {str(dtype)[6:]}: RMS | median, best grid")
    table.add_column("solver")
    for nfe in BUDGETS:
        table.add_column(f"NFE {nfe}", justify="right")
    for solver in deterministic():
        row = []
        for nfe in BUDGETS:
            found = cells(problem, [solver], nfe, fine, dtype)
            row.append(
                f"{found[0].rms:.1e}|{found[0].median:.1e} {found[0].grid}" if found else "-"
            )
        table.add_row(spec_of(solver), *row)
    console.print(table)


def summary(console: Console, verdicts: list[Verdict]) -> None:
    """Targets met and missed, and by how much."""
    for what in dict.fromkeys(verdict.what for verdict in verdicts):
        group = [verdict for verdict in verdicts if verdict.what == what]
        missed = sorted((v for v in group if not v.met), key=lambda v: -v.ratio)
        ratios = torch.tensor([verdict.ratio for verdict in group])
        console.print(
            f"{what}: met {len(group) - len(missed)} of {len(group)}; median "
            f"{ratios.median():.2f}, worst {ratios.max():.2f}, best {ratios.min():.2f}"
        )
        for verdict in missed:
            console.print(f"  missed: {verdict.where}: {verdict.ratio:.2f}")


def measure(problem: Problem, *, quick: bool, full: bool) -> tuple[str, list[Verdict]]:
    """All tables of one problem as text, and its verdicts."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="diffusers")
    console = Console(width=230, file=io.StringIO(), record=True)
    with_peers = diffusers_.installed()
    verdicts: list[Verdict] = []
    budgets = QUICK_BUDGETS if quick else BUDGETS
    for dtype in (torch.float32,) if quick else (torch.float32, torch.float64):
        verdicts += ode_table(console, problem, dtype, budgets, with_peers)
        if full:
            all_table(console, problem, dtype)
    budgets = STOCHASTIC_BUDGETS[:1] if quick else STOCHASTIC_BUDGETS
    verdicts += sde_table(console, problem, budgets, 3 if quick else REPEATS, with_peers)
    return console.export_text(), verdicts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="ring on VP, few budgets, float32")
    parser.add_argument("--all", action="store_true", help="a table of every solver of ours too")
    options = parser.parse_args()
    console = Console(width=230)
    if not diffusers_.installed():
        console.print("diffusers is not installed (extra 'peers'): ours alone, no ratios")
    started = time.perf_counter()
    problems = list(itertools.starmap(Problem, itertools.product(TARGETS, SDE_NAMES)))
    verdicts: list[Verdict] = []
    work = partial(measure, quick=options.quick, full=options.all)
    # Fresh processes: torch's threads do not survive a fork.
    with multiprocessing.get_context("spawn").Pool(WORKERS) as pool:
        for text, found in pool.imap(work, problems[:1] if options.quick else problems):
            print(text, flush=True)
            verdicts += found
    summary(console, verdicts)
    console.print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
