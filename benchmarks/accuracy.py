"""Error against evaluations on exact targets: which solver, on which grid, at how many evaluations.

Deterministic solvers: RMS and median distance to the finely solved probability-flow ODE from the
same 2,048 noises. Stochastic solvers: energy distance to exact samples, over its floor.

Run: ``python -m benchmarks.accuracy`` (``--quick`` for a look)
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from experiments.budget import steps_for_budget
from experiments.metrics import energy_distance, median_distance, rms_distance
from sde_diffusion import SDE, GaussianMixture, named_sde, named_target
from solvers import Solver, catalogue, sample
from solvers.methods.probability_flow import TABLEAUS, ProbabilityFlow

TARGETS = ("ring", "gmm16", "moons")
SDE_NAMES = ("vp", "ve")
GRIDS = ("time", "log_snr", "karras")
BUDGETS = (5, 8, 10, 15, 20, 30, 50, 100)
SAMPLES = 2048
FINE_STEPS = 1000
Cell = tuple[float, float, str]


def deterministic() -> dict[str, Solver]:
    """Native ODE solvers under every setting of their method."""
    solvers: dict[str, Solver] = {f"probability_flow:{m}": ProbabilityFlow(m) for m in TABLEAUS}
    for name, entry in catalogue().items():
        native = issubclass(entry.type, Solver) and entry.type is not ProbabilityFlow
        if native and entry.kind == "ODE" and entry.order:
            solvers[name] = entry.type()
    return solvers


def stochastic() -> dict[str, Solver]:
    """Native SDE solvers at their defaults."""
    entries = catalogue().items()
    return {
        name: entry.type()
        for name, entry in entries
        if issubclass(entry.type, Solver) and entry.kind == "SDE"
    }


def fine_solution(target: GaussianMixture, sde: SDE, dtype: torch.dtype) -> Tensor:
    """The probability-flow ODE solved with many steps of order 4, in float64, same noises."""
    solution = sample(
        target.score_fn(sde),
        sde,
        ProbabilityFlow("rk4"),
        shape=(SAMPLES, target.dimension),
        steps=FINE_STEPS,
        grid="log_snr",
        dtype=torch.float64,
    )
    return solution.x.to(dtype)


def best_grid(
    solver: Solver, target: GaussianMixture, sde: SDE, nfe: int, fine: Tensor
) -> Cell | None:
    """RMS and median distance on the grid with the least RMS, and that grid."""
    try:
        steps = steps_for_budget(solver, nfe)
    except ValueError:
        return None
    cells: list[Cell] = []
    for grid in GRIDS:
        x = sample(
            target.score_fn(sde),
            sde,
            solver,
            shape=tuple(fine.shape),
            steps=steps,
            grid=grid,
            dtype=fine.dtype,
        ).x
        cells.append((rms_distance(x, fine), median_distance(x, fine), grid))
    return min(cells)


def ode_table(console: Console, target_name: str, sde_name: str, dtype: torch.dtype) -> None:
    target, sde = named_target(target_name), named_sde(sde_name)
    fine = fine_solution(target, sde, dtype)
    table = Table(title=f"{target_name}, {sde_name}, {str(dtype)[6:]}: RMS | median, best grid")
    table.add_column("solver")
    for nfe in BUDGETS:
        table.add_column(f"NFE {nfe}", justify="right")
    for name, solver in deterministic().items():
        cells = (best_grid(solver, target, sde, nfe, fine) for nfe in BUDGETS)
        table.add_row(name, *("-" if c is None else f"{c[0]:.1e}|{c[1]:.1e} {c[2]}" for c in cells))
    console.print(table)


def sde_table(console: Console, target_name: str, sde_name: str) -> None:
    target, sde = named_target(target_name), named_sde(sde_name)
    exact, _ = target.sample(SAMPLES, seed=1)
    floor = energy_distance(target.sample(SAMPLES, seed=2)[0], exact)
    table = Table(
        title=f"{target_name}, {sde_name}: energy distance, best grid (floor {floor:.1e})"
    )
    table.add_column("solver")
    for nfe in BUDGETS:
        table.add_column(f"NFE {nfe}", justify="right")
    for name, solver in stochastic().items():
        row = []
        for nfe in BUDGETS:
            steps = steps_for_budget(solver, nfe)
            distances = []
            for grid in GRIDS:
                shape = (SAMPLES, target.dimension)
                x = sample(target.score_fn(sde), sde, solver, shape=shape, steps=steps, grid=grid).x
                distances.append((energy_distance(x, exact), grid))
            row.append("{:.1e} {}".format(*min(distances)))
        table.add_row(name, *row)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="ring on VP in float32 only")
    quick = parser.parse_args().quick
    console = Console(width=200)
    for target in TARGETS[:1] if quick else TARGETS:
        for sde in SDE_NAMES[:1] if quick else SDE_NAMES:
            for dtype in (torch.float32,) if quick else (torch.float32, torch.float64):
                ode_table(console, target, sde, dtype)
            sde_table(console, target, sde)


if __name__ == "__main__":
    main()
