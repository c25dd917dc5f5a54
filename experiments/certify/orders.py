"""``sde-diffusion orders``: certificates of many solvers, kept as they are finished."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.certify.bench import Bench
from experiments.certify.candidates import Candidate, make_candidates
from experiments.certify.certificate import FULL, QUICK, TOLERANCE, Certificate, Sizes
from experiments.certify.checks import measure
from experiments.compare import Interrupted, Progress
from experiments.draw import one_thread_each
from experiments.folders import default_out, prepare_out
from experiments.results import RunFile, plain
from solvers.catalogue import is_peer, settings_of

ORDERS, PICTURE = "orders.json", "orders.png"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class OrdersOptions:
    """What the command line says; no solvers: the catalogue; peers: diffusers' schedulers too."""

    solvers: Sequence[str] = ()
    quick: bool = False
    out: str | None = None
    peers: bool = False


@dataclass
class OrdersPlan:
    """Arguments known to be good."""

    options: OrdersOptions
    candidates: list[Candidate]
    sizes: Sizes
    out: str


def make_plan(options: OrdersOptions) -> OrdersPlan:
    """Check everything.

    Raises:
        ValueError, TypeError: a solver that does not exist or cannot be made, before any work.
    """
    candidates = make_candidates(options.solvers, quick=options.quick, peers=options.peers)
    words = ["quick"] if options.quick else []
    words += ["peers"] if options.peers else []
    if options.solvers:
        words = [c.name for c in candidates][:2]
    config = {**asdict(options), "out": None}
    out = options.out or default_out("orders", words, config)
    return OrdersPlan(options, candidates, QUICK if options.quick else FULL, out)


def certify(candidate: Candidate, bench: Bench | None = None, sizes: Sizes = FULL) -> Certificate:
    """All checks of one solver; ``bench`` keeps the problems for the next one."""
    solver = candidate.solver
    started = time.perf_counter()
    certificate = Certificate(
        candidate.name,
        "SDE" if solver.stochastic else "ODE",
        solver.order,
        solver.weak_order,
        settings_of(solver) if hasattr(solver, "__dataclass_fields__") else {},
        peer=is_peer(solver),
    )
    certificate.checks = list(measure(solver, bench or Bench(), sizes))
    certificate.seconds = time.perf_counter() - started
    return certificate


def run(plan: OrdersPlan, progress: Progress) -> tuple[OrdersFile, list[Certificate]]:
    """Certify, and write each certificate when it is finished.

    Raises:
        Interrupted: Ctrl-C; what was finished is kept.
    """
    path = prepare_out(plan.out, marker=ORDERS, pictures=(PICTURE,))
    file = OrdersFile(path, asdict(plan.options))
    bench = Bench()
    certificates: list[Certificate] = []
    where = "the start"
    progress.start(len(plan.candidates))
    try:
        with file, one_thread_each():
            file.write()
            for candidate in plan.candidates:
                where = candidate.name
                progress.now(where)
                certificates.append(certify(candidate, bench, plan.sizes))
                file.add(certificates[-1])
                progress.done(1)
    except KeyboardInterrupt:
        kept = f"{len(certificates)} certificates are kept in {path / ORDERS}"
        raise Interrupted(f"interrupted at {where}; {kept}") from None
    return file, certificates


class OrdersFile(RunFile):
    """``orders.json``: rewritten after each certificate."""

    name = ORDERS
    schema = SCHEMA_VERSION

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        super().__init__(path, "orders", config)
        self.certificates: list[Certificate] = []

    def add(self, certificate: Certificate) -> None:
        """Add a finished certificate and write the file."""
        self.certificates.append(certificate)
        self.write()

    def as_dict(self) -> dict[str, Any]:
        """All that orders.json holds."""
        return {
            **self._head,
            "tolerance": TOLERANCE,
            "status": self.status,
            "passed": all(c.passed for c in self.certificates if not c.peer),
            "certificates": [plain(_as_dict(c)) for c in self.certificates],
        }


def _as_dict(certificate: Certificate) -> dict[str, Any]:
    return {"passed": certificate.passed, **asdict(certificate)}
