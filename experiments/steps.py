"""Error against the number of steps, with fitted slopes: is a solver of the order it declares?

* Deterministic solvers: root mean square distance, sample by sample, from the finely solved ODE
  from the same noise, in float64. On one problem with one noise there is no Monte Carlo in it.
  A network is computed in float64 where it can be (`experiments.precision`), and the floor is
  measured: the distance between the fine solution and one of half its steps, which bounds what
  is left of the reference's own error and, in either precision, what rounding does to it.
* Stochastic solvers: the weak error ``|E log p(X) - E log p(X_true)|`` in nats, with ``p`` the
  exact density at ``t_min`` and ``X_true`` exact samples of it. It has a floor, the standard error
  of that mean; only points three times above it are fitted.

The order has a 95 % interval by the bootstrap over samples (256 pairs, of networks ``--samples``;
the log densities of the others), and holds in the asymptotic region that
`experiments.asymptotics` finds; from there the evaluations for a wanted error follow.

The grid is uniform in log-SNR by default: in t, VP and its kin need many hundred steps before
errors fall as they will in the limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.asymptotics import ErrorLaw, Needed, fit_law
from experiments.computing import Interrupted, Progress
from experiments.draw import Drawn, one_thread_each
from experiments.estimates import Estimate, estimate
from experiments.experiment_file import EXPERIMENT
from experiments.folders import prepare_out
from experiments.metrics import paired_distances, rms_distance
from experiments.results import Row, RunFolder, naming, plain, write_whole
from experiments.slopes import Slope, fit_slope
from experiments.spec import spec_of
from experiments.steps_plan import FILE, StepsOptions, StepsPlan, make_plan
from experiments.subjects import ExactSubject
from sde_diffusion import GaussianMixture, NonFiniteError
from solvers import Integrator, ProbabilityFlow, Solver
from solvers.catalogue import name_of, settings_of

__all__ = [
    "PICTURE",
    "Fitted",
    "StepsOptions",
    "StepsPlan",
    "make_plan",
    "precision_of",
    "run",
]

PICTURE = "error_vs_steps.png"
ROUNDING = 1e-12  # of a fine solution in float64
_TRUE = 200_000  # true samples that a mean log density is taken of
_TRUTH_SEED, _BOOTSTRAP_SEED = 0x5EED_0003, 0x5EED_0004
_REPLICATES = 400
_GROUP = 100  # samples whose mean log density is resampled as one


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
    law: ErrorLaw | None = None
    needed: tuple[Needed, ...] = ()


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
    references = sum(plan.fine_steps) if any(not s.stochastic for s in plan.solvers) else 0
    progress.start(len(plan.subject.sdes) * (len(plan.solvers) * sum(counts) + references))
    plan.subject.to(plan.machine.device)
    try:
        with folder, one_thread_each():
            folder.write()
            with naming(path / EXPERIMENT):
                write_whole(path / EXPERIMENT, FILE.to_toml(plan.asked))
            for sde in plan.subject.sdes:
                bench = _Bench(plan, sde)
                if references:
                    where = f"{sde} · the fine solution"
                    progress.now(where)
                    bench.fine()
                    progress.done(references)
                for solver in plan.solvers:
                    measured: dict[int, _Measured] = {}
                    for count in counts:
                        where = f"{sde} · {spec_of(solver)} · {count} steps"
                        progress.now(where)
                        measured[count] = found = bench.error(solver, count)
                        folder.add(_row(plan, sde, solver, count, found.drawn, found.error, bench))
                        progress.done(count)
                    fitted.append(bench.fit(solver, measured))
                    for row in folder.rows[-len(counts) :]:
                        row["law"] = plain(_law(fitted[-1], options.wanted))
                    folder.write()
    except KeyboardInterrupt:
        rows = f"{len(folder.rows)} rows are kept in {folder.path}/results.json"
        raise Interrupted(f"interrupted at {where}; {rows}") from None
    except NonFiniteError as error:
        rows = f"{len(folder.rows)} rows are kept in {folder.path}/results.json"
        raise NonFiniteError(f"{where}: {error}; {rows}", error.step, error.time) from error
    return folder, fitted


@dataclass(frozen=True)
class _Measured:
    """Samples at one number of steps, their error, and the error's bootstrap replicates (R,)."""

    drawn: Drawn
    error: Estimate
    replicates: np.ndarray


@dataclass(frozen=True)
class _Fine:
    """A fine solution (N, *event), and the distance that may be left between it and the exact."""

    x: Tensor
    floor: float


class _Bench:
    """The references of one SDE."""

    def __init__(self, plan: StepsPlan, sde: str) -> None:
        self.plan = plan
        self.sde = sde
        self._fine: _Fine | None = None
        self._truth: tuple[float, float] | None = None

    def error(self, solver: Solver | Integrator, count: int) -> _Measured:
        """The solver's samples at a number of steps, and their error."""
        options = self.plan.options
        if not solver.stochastic:
            drawn = self._draw(solver, count, self.plan.pairs)
            squares = paired_distances(drawn.x, self.fine().x).square().double().numpy()
            error = Estimate(math.sqrt(squares.mean()))
            return _Measured(drawn, error, np.sqrt(_resampled(squares, options.seed)))
        drawn = self._draw(solver, count, self.plan.samples * options.repeats)
        mean, spread = self._true_mean()
        densities = self._log_density(drawn.x)
        blocks = densities.split(self.plan.samples)
        found = estimate(block.mean().item() - mean for block in blocks)
        stderr = None if found.stderr is None else math.hypot(found.stderr, spread / _TRUE**0.5)
        groups = np.array([group.mean().item() for group in densities.split(_group(densities))])
        truths = np.random.default_rng(options.seed + _TRUTH_SEED).normal(
            mean, spread / _TRUE**0.5, _REPLICATES
        )
        replicates = np.abs(_resampled(groups, options.seed) - truths)
        return _Measured(drawn, Estimate(abs(found.value), stderr), replicates)

    def floor(self, solver: Solver | Integrator) -> float:
        """Error below which a solver's error is not its own."""
        if not solver.stochastic:
            return self.fine().floor
        options = self.plan.options
        return self._true_mean()[1] / math.sqrt(self.plan.samples * options.repeats)

    def fine(self) -> _Fine:
        """The fine solution, solved once."""
        if self._fine is None:
            plan, solver = self.plan, ProbabilityFlow("rk4")
            *coarser, x = (self._draw(solver, n, plan.pairs).x for n in plan.fine_steps)
            self._fine = _Fine(x, max([ROUNDING, *(rms_distance(other, x) for other in coarser)]))
        return self._fine

    def fit(self, solver: Solver | Integrator, measured: dict[int, _Measured]) -> Fitted:
        floor = self.floor(solver)
        errors = {count: found.error for count, found in measured.items()}
        values = [error.value for error in errors.values()]
        slope = fit_slope(list(errors), values, floor=floor)
        law = fit_law(
            list(errors),
            values,
            np.stack([found.replicates for found in measured.values()], 1),
            floor=floor,
            nfe=[found.drawn.nfe for found in measured.values()],
        )
        needed = () if law is None else tuple(map(law.needed, self.plan.options.wanted))
        kind = "SDE" if solver.stochastic else "ODE"
        return Fitted(
            spec_of(solver), self.sde, kind, solver.order, slope, errors, floor, law, needed
        )

    def _true_mean(self) -> tuple[float, float]:
        """Mean and standard deviation of the log density of true samples at ``t_min``."""
        if self._truth is None:
            plan = self.plan
            process = plan.subject.sdes[self.sde]
            x, _ = self._target.sample(_TRUE, plan.options.seed + _TRUTH_SEED)
            noise = torch.Generator().manual_seed(plan.options.seed + _TRUTH_SEED + 1)
            x = process.perturb(x, process.t_min, torch.randn(x.shape, generator=noise))
            values = self._log_density(x)
            self._truth = values.mean().item(), values.std().item()
        return self._truth

    def _log_density(self, x: Tensor) -> Tensor:
        process = self.plan.subject.sdes[self.sde]
        level = process.at(float(process.t_min))
        return torch.cat([self._target.log_prob_at(p, level) for p in x.double().split(8192)])

    @property
    def _target(self) -> GaussianMixture:
        subject = self.plan.subject
        if not isinstance(subject, ExactSubject):
            raise TypeError(f"{subject.name!r} has no exact density")
        return subject.target

    def _draw(self, solver: Solver | Integrator, count: int, samples: int) -> Drawn:
        plan = self.plan
        return plan.machine.draw(
            plan.subject.score_of(self.sde, plan.condition),
            plan.subject.sdes[self.sde],
            solver,
            event_shape=plan.subject.event_shape,
            ids=torch.arange(samples),
            steps=count,
            seed=plan.options.seed,
            grid=plan.options.grid,
            dtype=torch.float32 if solver.stochastic else plan.dtype,
            suggested=plan.subject.suggested,
        )


def precision_of(plan: StepsPlan) -> str:
    """ "float64" or "float32": what ODEs are solved in."""
    return str(plan.dtype).removeprefix("torch.")


def _resampled(values: np.ndarray, seed: int) -> np.ndarray:
    """Means (R,) of bootstrap replicates; the same samples for every number of steps."""
    rng = np.random.default_rng(seed + _BOOTSTRAP_SEED)
    chosen = rng.integers(0, len(values), (_REPLICATES, len(values)))
    return np.asarray(values[chosen].mean(1))


def _group(densities: Tensor) -> int:
    """Samples in a group: equal groups, so that their means weigh the same."""
    return _GROUP if len(densities) % _GROUP == 0 and len(densities) >= 20 * _GROUP else 1


def _law(fitted: Fitted, wanted: Sequence[float]) -> dict[str, Any] | None:
    """What rows of results.json say of their sampler's law; null: no asymptotic region."""
    law = fitted.law
    if law is None:
        return None
    return {
        "order": law.order,
        "order_low": law.order_low,
        "order_high": law.order_high,
        "first": law.first,
        "last": law.last,
        "constant": math.exp(law.intercept),
        "wanted": [
            {"error": error, "nfe": n.nfe, "low": n.low, "high": n.high, "how": n.how}
            for error, n in zip(wanted, fitted.needed, strict=True)
        ],
    }


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
        else f"RMS distance to the fine ODE, {precision_of(plan)}",
        "error_floor": bench.floor(solver),
        "grid": plan.options.grid,
        "seed": plan.options.seed,
        "label": plan.condition.label,
        "samples": len(drawn.x),
        "status": "ok",
    }
    return Row(
        solver=name_of(type(solver)),
        settings=settings_of(solver),
        sde=sde,
        target=plan.subject.name,
        guidance=plan.condition.guidance,
        scale=plan.condition.scale,
        steps=count,
        nfe=drawn.nfe,
        network_passes=drawn.network_passes,
        seconds=drawn.seconds,
        metrics={"error": error},
        extra=extra,
    )
