"""What ``sde-diffusion steps`` is asked for, and all that can be wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch

from experiments.conditions import Condition, make_conditions
from experiments.draw import Machine, make_machine
from experiments.experiment_file import ExperimentFile
from experiments.folders import default_out
from experiments.precision import in_float64
from experiments.spec import parse_solver, spec_of
from experiments.subjects import DIGITS, Subject, SubjectOptions, make_subjects
from sde_diffusion.errors import require_count, require_finite
from solvers import Integrator, Solver, grids

__all__ = ["FILE", "StepsOptions", "StepsPlan", "make_plan"]

SOLVERS = (
    "probability_flow:method=euler",
    "probability_flow",
    "probability_flow:method=rk4",
    "euler_maruyama",
    "ancestral",
)
MODEL_SOLVERS = (*SOLVERS[:3], "dpm_solver_pp", "uni_pc")
COUNTS = (8, 16, 32, 64, 128, 256)
MODEL_COUNTS = COUNTS[:-1]
SAMPLES, MODEL_SAMPLES = 10_000, 64
PAIRS = 256  # samples of an exact target that a solver without noise is judged by
LEAST_FINE = 256  # steps of an exact target's reference at least


@dataclass(frozen=True)
class StepsOptions:
    """What the command line says; None and empty: the default of what is sampled."""

    target: str | None = None
    model: str | None = None
    sdes: Sequence[str] = ()
    solvers: Sequence[str] = ()
    counts: Sequence[int] = ()
    guidance: str = "none"
    scale: float | None = None
    label: str | None = None
    data: str | None = None
    samples: int | None = None
    repeats: int = 3
    seed: int = 0
    grid: str = "log_snr"
    wanted: Sequence[float] = ()
    batch_size: int | None = None
    device: str = "cpu"
    out: str | None = None


FILE = ExperimentFile("steps", StepsOptions, {"counts": "steps"})


@dataclass
class StepsPlan:
    """Arguments known to be good.

    Attributes:
        asked: the options as they were given.
        options: defaults filled in.
        dtype: what the probability-flow ODE is solved in.
    """

    asked: StepsOptions
    options: StepsOptions
    subject: Subject
    condition: Condition
    dtype: torch.dtype
    solvers: list[Solver | Integrator]
    machine: Machine
    out: str
    samples: int
    pairs: int
    fine_steps: tuple[int, ...]


def make_plan(options: StepsOptions) -> StepsPlan:
    """Check everything.

    Raises:
        ValueError, TypeError: whatever is wrong with the options, before any work.
    """
    if options.model is not None and options.target is not None:
        raise ValueError("--model and --target are two things to sample; give one of them")
    asked, options = options, _filled(options)
    for count in options.counts:
        require_count("--steps", count)
    if len(set(options.counts)) < 2:
        raise ValueError("--steps needs at least two different numbers, to see how errors fall")
    for wanted in options.wanted:
        require_finite("--wanted", wanted, above=0.0)
    network = _is_network(options)
    default = MODEL_SAMPLES if network else SAMPLES
    samples = default if options.samples is None else options.samples
    require_count("--samples", samples, least=2)
    require_count("--repeats", options.repeats)
    require_count("--seed", options.seed, least=0)
    if options.batch_size is not None:
        require_count("--batch-size", options.batch_size)
    scales = () if options.scale is None else (options.scale,)
    make_conditions((options.guidance,), scales, options.label)
    solvers = _solvers(options)
    if network:
        _refuse_noise(
            solvers, "a network has none; leave it out, or measure it on an exact --target"
        )
    machine = make_machine(options.device, options.batch_size)
    subject = _subject(options)
    (condition,) = make_conditions((options.guidance,), scales, options.label, subject.unguided)
    subject.check(condition)
    if condition.law != "whole":
        _refuse_noise(
            solvers,
            f"that of {subject.name!r} is of all its classes, unguided; leave it out, or leave out "
            "--label and --guidance",
        )
    for sde in subject.sdes.values():
        grids.resolve(options.grid, sde, 1)
    config = {
        **asdict(options),
        "samples": samples,
        "out": None,
        "batch_size": None,
        "device": None,
    }
    out = options.out or default_out("steps", [subject.name], config)
    wide, dtype = in_float64(subject, condition, machine.device)
    most = max(options.counts)
    return StepsPlan(
        asked=asked,
        options=replace(options, samples=samples),
        subject=wide,
        condition=condition,
        dtype=dtype,
        solvers=solvers,
        machine=machine,
        out=out,
        samples=samples,
        pairs=samples if network else PAIRS,
        fine_steps=(2 * most, 4 * most) if network else (max(2 * most, LEAST_FINE),),
    )


def _filled(options: StepsOptions) -> StepsOptions:
    """With defaults; those of networks are fewer, since their evaluations cost more."""
    if options.target is None and options.model is None:
        options = replace(options, target="ring")
    network = _is_network(options)
    return replace(
        options,
        solvers=tuple(options.solvers) or (MODEL_SOLVERS if network else SOLVERS),
        counts=tuple(options.counts) or (MODEL_COUNTS if network else COUNTS),
    )


def _is_network(options: StepsOptions) -> bool:
    return options.model is not None or options.target == DIGITS


def _solvers(options: StepsOptions) -> list[Solver | Integrator]:
    solvers: list[Solver | Integrator] = []
    for text in options.solvers:
        solver = parse_solver(text)
        if getattr(solver, "adaptive", False):
            raise ValueError(
                f"--solver {text} chooses its own steps, so that there are none to count; use a "
                "fixed method"
            )
        if solver not in solvers:
            solvers.append(solver)
    return solvers


def _refuse_noise(solvers: Sequence[Solver | Integrator], why: str) -> None:
    for solver in solvers:
        if solver.stochastic:
            raise ValueError(
                f"--solver {spec_of(solver)} draws noise of its own: its error is that of a mean "
                f"under the exact density, and {why}"
            )


def _subject(options: StepsOptions) -> Subject:
    (subject,) = make_subjects(
        SubjectOptions(
            () if options.target is None else (options.target,),
            () if options.model is None else (options.model,),
            options.sdes,
            options.data,
        )
    )
    return subject
