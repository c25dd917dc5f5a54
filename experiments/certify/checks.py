"""What a certificate consists of: each check measures one thing that a solver promises.

Which apply follows from what the solver declares:

* deterministic, fixed steps: the order of its global error, as the slope of log error on the finest
  grids (uniform and not, and started where the solution bends), against closed forms and against
  scipy's DOP853 in t;
* stochastic, fixed steps: the weak order of mean and variance on a Gaussian, by exact propagation,
  and the strong order on shared Brownian paths;
* order 0: no order is claimed; the error of the moments must not grow with the number of steps;
* adaptive: the limit, at tightening tolerances;
* all: the limit itself, evaluations as reported, independence of the batch, short runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from experiments.certify.accuracy import (
    adaptive_limit,
    flow_order,
    no_order,
    sampled_limit,
    strong_order,
    weak_order,
)
from experiments.certify.bench import Bench
from experiments.certify.certificate import Check, Sizes
from experiments.certify.peers import peer_order, peer_short_runs, peer_weak_order
from experiments.certify.promises import evaluations, short_runs, splitting
from solvers import Integrator, Solver
from solvers.catalogue import is_peer

Measure = Callable[[Solver | Integrator, Bench, Sizes], list[Check]]


def checks_of(solver: Solver | Integrator) -> list[Measure]:
    """The measurements that apply to a solver, in the order of the table."""
    if is_peer(solver):
        order = peer_weak_order if solver.stochastic else peer_order
        return [order, evaluations, splitting, peer_short_runs]
    common: list[Measure] = [evaluations, splitting, short_runs]
    if isinstance(solver, Integrator) and solver.adaptive:
        return [adaptive_limit if not solver.stochastic else sampled_limit, *common]
    if solver.order == 0:
        return [no_order, *common]
    if solver.stochastic:
        return [weak_order, strong_order, *common]
    return [flow_order, *common]


def measure(solver: Solver | Integrator, bench: Bench, sizes: Sizes) -> Iterator[Check]:
    """All checks of a solver; an exception inside one is its failure, not the run's."""
    for measured in checks_of(solver):
        try:
            yield from measured(solver, bench, sizes)
        except Exception as error:
            key, name = _KEYS[measured]
            why = f"{type(error).__name__}: {error}"
            yield Check(key, name, "runs", "raised", False, " ".join(why.split())[:300])


_KEYS: dict[Measure, tuple[str, str]] = {
    flow_order: ("uniform", "order"),
    weak_order: ("uniform", "weak order"),
    strong_order: ("strong", "strong order"),
    no_order: ("limit", "bias (no order)"),
    sampled_limit: ("limit", "moments of samples"),
    adaptive_limit: ("limit", "limit at tolerance"),
    evaluations: ("nfe", "evaluations per step"),
    splitting: ("split", "independence of the batch"),
    short_runs: ("short", "one step, two steps"),
    peer_order: ("uneven", "order, its own times"),
    peer_weak_order: ("uneven", "weak order, its own times"),
    peer_short_runs: ("short", "one step, two steps"),
}
