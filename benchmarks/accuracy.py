"""Error against evaluations on exact targets: ours against the best scheduler of diffusers.

Deterministic solvers: RMS and median distance to the finely solved probability-flow ODE from the
same 2,048 noises. All runs, theirs and ours, start at ``t_max`` and end at ``t_min`` without a
final denoise, so that all are held against the same solution: diffusers' last steps to sigma = 0,
and those that stay at the last level, are not taken (see ``solvers/adapters/diffusers_.py``), and
the evaluation saved goes into one step more. At each number of evaluations the best of all solvers
and untuned grids of one side meets the best of the other; then the best three of ours get grids
fitted to other noises (``solvers/fitted_grid.py``). With float64 states those compete, of either
side, that came within a factor of two of their side's best with float32 states, in either distance:
what differs is rounding.

Stochastic solvers: unbiased energy distance to exact samples. The best setting of either side is
chosen on one set of noises and judged on others, in pairs, with the standard error of the
difference.

Adaptive steps: evaluations at equal RMS, see ``benchmarks/adaptive.py``.

Targets: at NFE 5 to 50 no worse than diffusers; with a fitted grid at most 0.7 of its RMS at NFE 8
to 30; energy distance at NFE 20 and 50 no worse, beyond twice the standard error; adaptive, at most
0.8 of the evaluations of torchdiffeq's dopri5 on the raw equation.

Run: ``python -m benchmarks.accuracy`` (all: more than an hour on one core, most of it ``gmm16``).
What is measured is kept in ``runs/accuracy``, one file for each piece, and not measured again: a
run that was cut off goes on, ``--target ring --sde vp`` does a part, ``--report`` prints what there
is, ``--again fitted`` measures one part anew. Of our solvers the multistep methods compete; the
one-step ones, which came first nowhere, join them with ``--all``. diffusers is the extra ``peers``.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import accuracy_cells as cells
from benchmarks import adaptive
from benchmarks.accuracy_cells import Contender, Problem, label
from benchmarks.accuracy_report import report
from sde_diffusion.storage import read_json, write_json
from solvers.adapters import diffusers_

TARGETS = ("ring", "moons", "gmm16")
SDES = ("vp", "ve")
DTYPES = ("float32", "float64")
BUDGETS = (5, 8, 10, 15, 20, 30, 50)
FITTED_BUDGETS = (8, 10, 15, 20, 30)
STOCHASTIC_BUDGETS = (20, 50)
PARTS = ("theirs", "ours", "fitted", "stochastic", "adaptive")
FITTED_SOLVERS = 3
REPEATS = 6
NEAR_THE_BEST = 2.0
STORE = Path("runs/accuracy")

Record = dict[str, Any]


class Store:
    """What has been measured: one JSON file for each piece."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def read(self, name: str) -> Record:
        path = self.folder / f"{name}.json"
        return read_json(path) if path.exists() else {}

    def write(self, name: str, record: Record) -> None:
        write_json(self.folder / f"{name}.json", record)


def piece(problem: Problem, nfe: int, part: str) -> str:
    where = f"{problem.target_name}-{problem.sde_name}-{problem.dtype_name}"
    return f"{where}-{nfe:02d}-{part}"


def measure_ode(
    store: Store, problem: Problem, nfe: int, parts: Sequence[str], everything: bool
) -> None:
    """One number of evaluations: what of each side has not been measured yet."""
    if "theirs" in parts and diffusers_.installed():
        complete(store, problem, nfe, "theirs", cells.theirs())
    if "ours" in parts:
        complete(store, problem, nfe, "ours", cells.all_ours() if everything else cells.ours())
    if "fitted" in parts and nfe in FITTED_BUDGETS:
        best = best_solvers(store.read(piece(problem, nfe, "ours")))
        complete(store, problem, nfe, "fitted", [(solver, "fitted") for solver in best])


def complete(
    store: Store, problem: Problem, nfe: int, part: str, contenders: Iterable[Contender]
) -> None:
    """Measure the contenders that have not been measured yet."""
    name = piece(problem, nfe, part)
    found = store.read(name)
    wanted = {label(*contender): contender for contender in contenders}
    if problem.dtype_name == "float64" and part != "fitted":
        single = Problem(problem.target_name, problem.sde_name)
        near = near_the_best(store.read(piece(single, nfe, part)))
        wanted = {key: wanted[key] for key in wanted if not near or key in near}
    missing = {key: wanted[key] for key in wanted if key not in found}
    if missing:
        fine = problem.fine(store.folder)
        found |= {key: cells.errors(problem, one, nfe, fine) for key, one in missing.items()}
        store.write(name, found)


def near_the_best(found: Record) -> set[str]:
    """Those within a factor of the best, in RMS or in median."""
    valid = {name: pair for name, pair in found.items() if pair}
    best = [min((pair[k] for pair in valid.values()), default=math.inf) for k in (0, 1)]
    return {
        name
        for name, pair in valid.items()
        if any(pair[k] <= NEAR_THE_BEST * best[k] for k in (0, 1))
    }


def best_solvers(found: Record) -> list[Any]:
    """The first solvers by RMS on any fixed grid."""
    by_name = {label(*contender): contender[0] for contender in cells.all_ours()}
    order = sorted((name for name in found if found[name]), key=lambda name: found[name][0])
    return list(dict.fromkeys(by_name[name] for name in order if name in by_name))[:FITTED_SOLVERS]


def measure_sde(store: Store, problem: Problem, nfe: int) -> None:
    """Energy distance of the best of either side, chosen on other noises than judged on."""
    name = piece(problem, nfe, "stochastic")
    record = store.read(name)
    sides = {"ours": cells.our_stochastic}
    if diffusers_.installed():
        sides["theirs"] = cells.their_stochastic
    for side, contenders in sides.items():
        if side in record:
            continue
        first = {}
        for contender in contenders():
            energy = cells.energies(problem, contender, nfe, range(1))
            if energy is not None:
                first[label(*contender)] = (energy[0], contender)
        best = min(first, key=lambda key: first[key][0])
        judged = cells.energies(problem, first[best][1], nfe, range(1, 1 + REPEATS))
        record[side] = {"best": best, "energies": judged}
        store.write(name, record)


def measure_adaptive(store: Store, target_name: str, sde_name: str) -> None:
    name = f"{target_name}-{sde_name}-adaptive"
    if not store.read(name):
        store.write(name, adaptive.measure(target_name, sde_name))


def measure(store: Store, options: argparse.Namespace) -> None:
    """All pieces asked for, one after the other."""
    for target_name in options.target:
        for sde_name in options.sde:
            for dtype_name in options.dtype:
                problem = Problem(target_name, sde_name, dtype_name)
                for nfe in options.nfe:
                    started = time.perf_counter()
                    measure_ode(store, problem, nfe, options.part, options.all)
                    print(
                        f"{problem}, NFE {nfe}: {time.perf_counter() - started:.0f} s", flush=True
                    )
            if "stochastic" in options.part:
                for nfe in STOCHASTIC_BUDGETS:
                    measure_sde(store, Problem(target_name, sde_name), nfe)
            if "adaptive" in options.part:
                measure_adaptive(store, target_name, sde_name)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--sde", nargs="+", choices=SDES, default=SDES)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--nfe", nargs="+", type=int, choices=BUDGETS, default=BUDGETS)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--all", action="store_true", help="our one-step solvers too")
    parser.add_argument("--again", nargs="+", choices=PARTS, default=(), help="measure anew")
    parser.add_argument("--store", type=Path, default=STORE, help="where results are kept")
    parser.add_argument(
        "--report", action="store_true", help="print what there is, measure nothing"
    )
    return parser.parse_args()


def main() -> None:
    options = parsed()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="diffusers")
    store = Store(options.store)
    if not diffusers_.installed():
        print("diffusers is not installed (extra 'peers'): ours alone, no ratios")
    for part in options.again:
        for path in options.store.glob(f"*-{part}.json"):
            path.unlink()
    if not options.report:
        measure(store, options)
    print(report(options.store))


if __name__ == "__main__":
    main()
