"""How far each method's samples are from the exact posterior, on a mixture that has one."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.compare import Progress
from experiments.draw import make_machine, one_thread_each
from experiments.estimates import Estimate, estimate
from experiments.folders import default_out, prepare_out
from experiments.metrics import sliced_w2, w2
from experiments.restoration import Restored, Settings, measurement_of, restore
from experiments.restore import RestoreOptions, checked_solver
from experiments.results import environment, plain, write_whole
from experiments.spec import spec_of
from experiments.subjects import ExactSubject
from sde_diffusion import SDES, LinearMeasurement
from sde_diffusion.errors import require_count, unknown_name
from solvers import sample

TABLE = "table.json"
SAMPLES = 400
FLOOR, EXACT_SCORE, PRIOR = "floor", "exact score", "nothing known"


@dataclass
class TablePlan:
    """Arguments known to be good."""

    options: RestoreOptions
    subject: ExactSubject
    measurement: LinearMeasurement
    settings: Settings
    device: torch.device
    samples: int
    out: str


@dataclass
class TableRow:
    """One method, over several measurements.

    Attributes:
        sliced_w2, w2: distance from the exact posterior's samples.
        nfe, network_passes: per sample; None for what is not sampled by evaluations.
    """

    method: str
    sliced_w2: Estimate
    w2: Estimate
    nfe: float | None
    network_passes: float | None
    ess: float | None
    seconds: float


def make_plan(options: RestoreOptions) -> TablePlan:
    """Check everything.

    Raises:
        ValueError, TypeError: whatever is wrong with the options, before any work.
    """
    solver = checked_solver(options)
    if options.model is not None or options.data is not None:
        raise ValueError(
            "--table needs a target whose posterior is known; leave --model and --data out, or "
            "leave --table out"
        )
    if options.count is not None:
        raise ValueError("--table measures --samples of each measurement; leave -n out")
    samples = require_count("--samples", SAMPLES if options.samples is None else options.samples)
    sde = options.sde or "vp"
    if sde not in SDES:
        raise unknown_name("--sde", sde, SDES)
    subject = ExactSubject(options.target or "gmm16", [sde])
    measurement = measurement_of(
        options.task,
        subject.event_shape,
        options.noise,
        known=options.known,
        factor=options.factor,
        blur=options.blur,
    )
    covariance = subject.target.covariance()
    settings = Settings(
        solver,
        options.steps,
        options.seed,
        options.scale,
        options.below,
        float(covariance.diagonal().mean().sqrt()),
        options.jump,
        options.walks,
        options.particles,
        rows=1 << 14,
    )
    device = make_machine(options.device, None).device
    config = {**asdict(options), "out": None, "device": None, "table": True}
    out = options.out or default_out("restore", [subject.name, sde, options.task], config)
    return TablePlan(options, subject, measurement, settings, device, samples, out)


def run(plan: TablePlan, progress: Progress) -> tuple[Path, list[TableRow]]:
    """Every method on ``repeats`` measurements; writes table.json and returns the rows.

    Two rows stand beside the methods: the floor, exact samples of the posterior against others, and
    the same sampler with the posterior's exact score, whose distance is that of the steps alone.
    Each measurement is of a fresh sample of the target, and a row's standard error is over them.
    """
    options = plan.options
    folder = prepare_out(plan.out, TABLE)
    names = [FLOOR, EXACT_SCORE, *options.methods, PRIOR]
    found: dict[str, list[tuple[float, float, Restored]]] = {name: [] for name in names}
    progress.start(options.repeats * len(names))
    with one_thread_each():
        for repeat in range(options.repeats):
            truth = _truth(plan, repeat)
            for name in names:
                progress.now(f"{options.task} · {plan.subject.name} · {name}")
                drawn = truth.drawn(name, plan)
                found[name].append((sliced_w2(drawn.x, truth.x), w2(drawn.x, truth.x), drawn))
                progress.done(1)
    rows = [_row(name, results) for name, results in found.items()]
    text = json.dumps(plain(_table(plan, rows)), indent=1) + "\n"
    write_whole(folder / TABLE, text)
    return folder, rows


@dataclass
class _Truth:
    """One measurement, and exact samples of what it leaves open.

    Attributes:
        y: ``(1, *measured)``.
        x, other: ``(N, D)``, two independent sets.
        settings: with a seed of this repeat.
    """

    y: Tensor
    x: Tensor
    other: Tensor
    settings: Settings

    def drawn(self, name: str, plan: TablePlan) -> Restored:
        if name == FLOOR:
            return Restored(self.other, 0, 0, 0.0)
        target = plan.subject.target
        (sde,) = plan.subject.sdes.values()
        if name in (EXACT_SCORE, PRIOR):
            law = target
            if name == EXACT_SCORE:
                law = target.posterior(plan.measurement, self.y[0])
            done = sample(
                law.score_fn(sde),
                sde,
                self.settings.solver,
                shape=(plan.samples, *target.event_shape),
                steps=self.settings.steps,
                seed=self.settings.seed,
                denoise=True,
                device=plan.device,
            )
            return Restored(done.x.cpu(), done.nfe, done.network_passes, done.stats["seconds"])
        y = self.y.expand(plan.samples, *self.y.shape[1:]).to(plan.device)
        return restore(
            name,
            target.score_fn(sde),
            sde,
            plan.measurement,
            y,
            plan.subject.event_shape,
            self.settings,
        )


def _truth(plan: TablePlan, repeat: int) -> _Truth:
    seed = plan.options.seed + repeat
    target = plan.subject.target
    x0, _ = target.sample(1, 1_000 + seed)
    y = plan.measurement.draw(x0, seed)
    posterior = target.posterior(plan.measurement, y[0])
    x, _ = posterior.sample(plan.samples, 2_000 + seed)
    other, _ = posterior.sample(plan.samples, 3_000 + seed)
    settings = Settings(**{**vars(plan.settings), "seed": seed})
    return _Truth(y, x, other, settings)


def _row(name: str, results: list[tuple[float, float, Restored]]) -> TableRow:
    drawn = [result[2] for result in results]
    ess = [d.ess for d in drawn if d.ess is not None]
    return TableRow(
        name,
        estimate(result[0] for result in results),
        estimate(result[1] for result in results),
        drawn[0].nfe or None,
        drawn[0].network_passes or None,
        sum(ess) / len(ess) if ess else None,
        sum(d.seconds for d in drawn) / len(drawn),
    )


def _table(plan: TablePlan, rows: list[TableRow]) -> dict[str, Any]:
    (sde,) = plan.subject.sdes.values()

    def shown(row: TableRow) -> dict[str, Any]:
        distances = {"sliced_w2": row.sliced_w2._asdict(), "w2": row.w2._asdict()}
        return {**vars(row), **distances}

    return {
        "format": "sde-diffusion-restoration-table",
        "version": 1,
        "options": asdict(plan.options),
        "target": plan.subject.name,
        "sde": sde.config(),
        "solver": spec_of(plan.settings.solver),
        "samples": plan.samples,
        "data_std": plan.settings.data_std,
        "rows": [shown(row) for row in rows],
        "environment": environment(plan.device),
    }
