"""Error against the number of steps, with fitted slopes: is a solver of the order it declares?

* Deterministic solvers: root mean square distance, sample by sample, from the finely solved ODE
  from the same noise, in float64. On one problem with one noise there is no Monte Carlo in it.
* Stochastic solvers: the weak error ``|E log p(X) - E log p(X_true)|`` in nats, with ``p`` the
  exact density at ``t_min`` and ``X_true`` exact samples of it. It has a floor, the standard error
  of that mean; only points three times above it are fitted.

The grid is uniform in log-SNR by default: in t, VP and its kin need many hundred steps before
errors fall as they will in the limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.compare import Interrupted, Progress
from experiments.conditions import Condition
from experiments.draw import Drawn, Machine, make_machine, one_thread_each
from experiments.estimates import Estimate, estimate
from experiments.folders import default_out, prepare_out
from experiments.metrics import rms_distance
from experiments.results import Row, RunFolder
from experiments.slopes import Slope, fit_slope
from experiments.spec import parse_solver, spec_of
from experiments.subjects import ExactSubject, Subject, SubjectOptions, make_subjects
from sde_diffusion import NonFiniteError
from sde_diffusion.errors import require_count
from solvers import Integrator, ProbabilityFlow, Solver, grids
from solvers.catalogue import name_of, settings_of

SOLVERS = (
    "probability_flow:method=euler",
    "probability_flow",
    "probability_flow:method=rk4",
    "euler_maruyama",
    "ancestral",
)
COUNTS = (8, 16, 32, 64, 128, 256)
PICTURE = "error_vs_steps.png"
ROUNDING = 1e-12  # of a fine solution in float64
_FINER = 2  # steps of the fine solution, times the most steps that are judged
_PAIRED = 256  # samples that a deterministic solver is judged by
_TRUE = 200_000  # true samples that a mean log density is taken of
_TRUTH_SEED = 0x5EED_0003


@dataclass(frozen=True)
class StepsOptions:
    """What the command line says."""

    target: str = "ring"
    sdes: Sequence[str] = ("vp", "ve")
    solvers: Sequence[str] = SOLVERS
    counts: Sequence[int] = COUNTS
    samples: int = 10_000
    repeats: int = 3
    seed: int = 0
    grid: str = "log_snr"
    batch_size: int | None = None
    device: str = "cpu"
    out: str | None = None


@dataclass
class StepsPlan:
    """Arguments known to be good."""

    options: StepsOptions
    subject: ExactSubject
    solvers: list[Solver | Integrator]
    machine: Machine
    out: str


@dataclass(frozen=True)
class Fitted:
    """A solver's measured order under one SDE."""

    solver: str
    sde: str
    kind: str
    declared: int
    slope: Slope | None
    errors: dict[int, Estimate]
    floor: float


def make_plan(options: StepsOptions) -> StepsPlan:
    """Check everything.

    Raises:
        ValueError, TypeError: whatever is wrong with the options, before any work.
    """
    for count in options.counts:
        require_count("--steps", count)
    if len(set(options.counts)) < 2:
        raise ValueError("--steps needs at least two different numbers, to see how errors fall")
    require_count("--samples", options.samples, least=2)
    require_count("--repeats", options.repeats)
    require_count("--seed", options.seed, least=0)
    if options.batch_size is not None:
        require_count("--batch-size", options.batch_size)
    solvers = []
    for text in options.solvers:
        solver = parse_solver(text)
        if getattr(solver, "adaptive", False):
            raise ValueError(
                f"--solver {text} chooses its own steps, so that there are none to count; use a "
                "fixed method"
            )
        if solver not in solvers:
            solvers.append(solver)
    machine = make_machine(options.device, options.batch_size)
    subject: Subject
    (subject,) = make_subjects(SubjectOptions((options.target,), (), options.sdes))
    if not isinstance(subject, ExactSubject):
        raise ValueError(
            f"--target {options.target} has no exact score, so that its solver errors cannot be "
            "told from its network's; use an exact target (sde-diffusion targets)"
        )
    for sde in subject.sdes.values():
        grids.resolve(options.grid, sde, 1)
    config = {**asdict(options), "out": None, "batch_size": None, "device": None}
    out = options.out or default_out("steps", [subject.name], config)
    return StepsPlan(options, subject, solvers, machine, out)


def run(plan: StepsPlan, progress: Progress) -> tuple[RunFolder, list[Fitted]]:
    """Measure, fit, and write rows as they are finished.

    Raises:
        NonFiniteError: a state left the finite numbers; names solver, step and time.
        Interrupted: Ctrl-C.
    """
    options = plan.options
    path = prepare_out(plan.out, pictures=(PICTURE,))
    folder = RunFolder(path, "steps", asdict(options), device=plan.machine.device)
    counts = sorted(set(options.counts))
    fitted: list[Fitted] = []
    where = "the start"
    progress.start(len(plan.subject.sdes) * len(plan.solvers) * sum(counts))
    try:
        with folder, one_thread_each():
            folder.write()
            for sde in plan.subject.sdes:
                bench = _Bench(plan, sde)
                for solver in plan.solvers:
                    errors: dict[int, Estimate] = {}
                    for count in counts:
                        where = f"{sde} · {spec_of(solver)} · {count} steps"
                        progress.now(where)
                        drawn, errors[count] = bench.error(solver, count)
                        folder.add(_row(plan, sde, solver, count, drawn, errors[count], bench))
                        progress.done(count)
                    fitted.append(bench.fit(solver, errors))
    except KeyboardInterrupt:
        rows = f"{len(folder.rows)} rows are kept in {folder.path}/results.json"
        raise Interrupted(f"interrupted at {where}; {rows}") from None
    except NonFiniteError as error:
        rows = f"{len(folder.rows)} rows are kept in {folder.path}/results.json"
        raise NonFiniteError(f"{where}: {error}; {rows}", error.step, error.time) from error
    return folder, fitted


class _Bench:
    """The references of one SDE."""

    def __init__(self, plan: StepsPlan, sde: str) -> None:
        self.plan = plan
        self.sde = sde
        self._fine: Tensor | None = None
        self._truth: tuple[float, float] | None = None

    def error(self, solver: Solver | Integrator, count: int) -> tuple[Drawn, Estimate]:
        """The solver's samples at a number of steps, and their error."""
        options = self.plan.options
        if not solver.stochastic:
            if self._fine is None:
                steps = max(_FINER * max(options.counts), 256)
                self._fine = self._draw(ProbabilityFlow("rk4"), steps, _PAIRED).x
            drawn = self._draw(solver, count, _PAIRED)
            return drawn, Estimate(rms_distance(drawn.x, self._fine))
        drawn = self._draw(solver, count, options.samples * options.repeats)
        mean, spread = self._true_mean()
        blocks = self._log_density(drawn.x).split(options.samples)
        found = estimate(block.mean().item() - mean for block in blocks)
        stderr = None if found.stderr is None else math.hypot(found.stderr, spread / _TRUE**0.5)
        return drawn, Estimate(abs(found.value), stderr)

    def floor(self, solver: Solver | Integrator) -> float:
        """Error below which a solver's error is not its own."""
        if not solver.stochastic:
            return ROUNDING
        options = self.plan.options
        return self._true_mean()[1] / math.sqrt(options.samples * options.repeats)

    def fit(self, solver: Solver | Integrator, errors: dict[int, Estimate]) -> Fitted:
        floor = self.floor(solver)
        values = [errors[count].value for count in errors]
        slope = fit_slope(list(errors), values, floor=floor)
        kind = "SDE" if solver.stochastic else "ODE"
        return Fitted(spec_of(solver), self.sde, kind, solver.order, slope, errors, floor)

    def _true_mean(self) -> tuple[float, float]:
        """Mean and standard deviation of the log density of true samples at ``t_min``."""
        if self._truth is None:
            plan = self.plan
            process = plan.subject.sdes[self.sde]
            x, _ = plan.subject.target.sample(_TRUE, plan.options.seed + _TRUTH_SEED)
            noise = torch.Generator().manual_seed(plan.options.seed + _TRUTH_SEED + 1)
            x = process.perturb(x, process.t_min, torch.randn(x.shape, generator=noise))
            values = self._log_density(x)
            self._truth = values.mean().item(), values.std().item()
        return self._truth

    def _log_density(self, x: Tensor) -> Tensor:
        subject = self.plan.subject
        level = subject.sdes[self.sde].at(float(subject.sdes[self.sde].t_min))
        return torch.cat(
            [subject.target.log_prob_at(part, level) for part in x.double().split(8192)]
        )

    def _draw(self, solver: Solver | Integrator, count: int, samples: int) -> Drawn:
        plan = self.plan
        return plan.machine.draw(
            plan.subject.score_of(self.sde, Condition()),
            plan.subject.sdes[self.sde],
            solver,
            event_shape=plan.subject.event_shape,
            ids=torch.arange(samples),
            steps=count,
            seed=plan.options.seed,
            grid=plan.options.grid,
            dtype=torch.float32 if solver.stochastic else torch.float64,
            suggested=plan.subject.suggested,
        )


def _row(
    plan: StepsPlan,
    sde: str,
    solver: Solver | Integrator,
    count: int,
    drawn: Drawn,
    error: Estimate,
    bench: _Bench,
) -> Row:
    extra: dict[str, Any] = {
        "solver_label": spec_of(solver),
        "kind": "SDE" if solver.stochastic else "ODE",
        "declared_order": solver.order,
        "error": "weak: mean log density, nats"
        if solver.stochastic
        else "RMS distance to the fine ODE, float64",
        "error_floor": bench.floor(solver),
        "grid": plan.options.grid,
        "seed": plan.options.seed,
        "samples": len(drawn.x),
        "status": "ok",
    }
    return Row(
        solver=name_of(type(solver)),
        settings=settings_of(solver),
        sde=sde,
        target=plan.subject.name,
        steps=count,
        nfe=drawn.nfe,
        network_passes=drawn.network_passes,
        seconds=drawn.seconds,
        metrics={"error": error},
        extra=extra,
    )
