"""Log-likelihoods of data under a model or an exact target, with what each figure leaves out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.compare import Progress
from experiments.conditions import Condition, make_conditions
from experiments.draw import Machine, make_machine
from experiments.folders import default_out, prepare_out
from experiments.likelihood_figures import Figures, lines, summarised, together
from experiments.results import environment, plain, write_whole
from experiments.spec import parse_solver, spec_of
from experiments.subjects import ExactSubject, ModelSubject, Subject, SubjectOptions, make_subjects
from sde_diffusion.data import Dataset
from sde_diffusion.discrete_bound import vlb
from sde_diffusion.errors import require_count, require_finite, unknown_name
from sde_diffusion.prediction import ScoreFn
from sde_diffusion.tabulated import TabulatedVPSDE
from sde_diffusion.units import bin_width, within_range
from solvers import Adaptive, Integrator, Solver
from solvers.dequantised import class_posterior, dequantise, dequantised_likelihood
from solvers.divergence import LAWS, named_divergence
from solvers.encoding import make_route
from solvers.likelihood import Likelihood, log_likelihood
from solvers.likelihood_bound import likelihood_bound

RESULTS, TABLE = "likelihood.json", "likelihood.csv"
OWN = "own"
PRIORS = ("standard", "moments", "exact")
_DIGITS_LEVELS = 17  # scikit-learn's digits are counts of 0 to 16 pixels


@dataclass(frozen=True)
class LikelihoodOptions:
    """What the command line says."""

    target: str | None = None
    model: str | None = None
    sde: str | None = None
    data: str | None = None
    count: int = 64
    label: str | None = None
    guidance: str = "none"
    scale: float | None = None
    divergence: str | None = None
    probes: int = 8
    probe_law: str = "rademacher"
    solver: str = "tsitouras"
    steps: int | None = None
    tolerance: float | None = None
    prior: str = "standard"
    levels: int | None = None
    draws: int = 1
    bound: int = 32
    classify: bool = False
    clip: bool = False
    seed: int = 0
    memory: float = 512.0
    batch_size: int | None = None
    device: str = "cpu"
    out: str | None = None


@dataclass(frozen=True)
class _Labelled(Condition):
    """Every sample by its own label."""

    own: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))

    def class_of(self, ids: Tensor, num_classes: int) -> Tensor:
        return self.own[ids]


@dataclass
class LikelihoodPlan:
    """Arguments known to be good."""

    options: LikelihoodOptions
    subject: Subject
    sde: str
    condition: Condition
    solver: Solver | Integrator
    x: Tensor
    labels: Tensor | None
    width: float | None
    machine: Machine
    settings: dict[str, Any]
    out: str


@dataclass
class Measured:
    """What a run found and wrote."""

    folder: Path
    figures: Figures
    summary: dict[str, float]


def make_plan(options: LikelihoodOptions) -> LikelihoodPlan:
    """Check everything.

    Raises:
        ValueError, TypeError: whatever is wrong with the options, before any work.
    """
    for name, value, least in (
        ("-n", options.count, 1), ("--probes", options.probes, 1), ("--draws", options.draws, 0),
        ("--bound", options.bound, 0), ("--seed", options.seed, 0),
    ):  # fmt: skip
        require_count(name, value, least=least)
    require_finite("--memory", options.memory, above=0.0)
    if options.tolerance is not None:
        require_finite("--tolerance", options.tolerance, above=0.0)
    if options.model is not None and options.target is not None:
        raise ValueError("--model and --target are two things to measure; give one of them")
    if options.prior not in PRIORS:
        raise unknown_name("--prior", options.prior, PRIORS)
    if options.probe_law not in LAWS:
        raise unknown_name("--probe-law", options.probe_law, LAWS)
    solver = parse_solver(options.solver)
    machine = make_machine(options.device, options.batch_size)
    subject = _subject(options)
    (sde,) = subject.sdes
    x, labels, data = _data(options, subject)
    condition = _condition(options, subject, labels)
    settings = _settings(options, subject, sde, solver, x, data)
    width = _width(options, subject)
    if width is not None:
        within_range(x, clip=options.clip)
    if options.classify and (labels is None or (subject.num_classes or 0) < 2):
        raise ValueError("--classify needs a class-conditional model and data with labels")
    config = {**asdict(options), "out": None, "batch_size": None, "device": None}
    out = options.out or default_out("likelihood", [subject.name, sde], config)
    return LikelihoodPlan(
        options, subject, sde, condition, solver, x, labels, width, machine, settings, out
    )


def run(plan: LikelihoodPlan, progress: Progress) -> Measured:
    """Measure, batch by batch, and write the two files."""
    options, subject = plan.options, plan.subject
    folder = prepare_out(plan.out, RESULTS)
    subject.to(plan.machine.device)
    size = options.batch_size or min(64, subject.suggested)
    batches = torch.arange(len(plan.x)).split(size)
    progress.start(len(plan.x))
    parts = []
    for ids in batches:
        progress.now(f"{subject.name} · {plan.sde} · {spec_of(plan.solver)}")
        parts.append(_batch(plan, ids))
        progress.done(len(ids))
    figures = together(parts)
    summary = summarised(figures, plan.labels)
    write_whole(folder / TABLE, lines(figures, plan.labels))
    document = {
        "format": "sde-diffusion-likelihood",
        "version": 1,
        "subject": subject.name,
        "sde": subject.sdes[plan.sde].config(),
        "options": {k: v for k, v in asdict(options).items() if k != "out"},
        "divergence": plan.settings["divergence"],
        "event_shape": list(subject.event_shape),
        "bin_width": plan.width,
        "summary": summary,
        "files": [TABLE],
        "environment": environment(plan.machine.device),
    }
    write_whole(folder / RESULTS, json.dumps(plain(document), indent=1) + "\n")
    return Measured(folder, figures, summary)


def _subject(options: LikelihoodOptions) -> Subject:
    sdes = () if options.sde is None else (options.sde,)
    if options.model is None:
        name = options.target or "digits"
        given = SubjectOptions((name,), (), sdes or ("vp",), options.data)
    else:
        given = SubjectOptions((), (options.model,), sdes, options.data)
    (subject,) = make_subjects(given)
    return subject


def _data(
    options: LikelihoodOptions, subject: Subject
) -> tuple[Tensor, Tensor | None, Dataset | None]:
    """What is measured: held-out data of a model, exact samples of a target."""
    if isinstance(subject, ExactSubject):
        x, labels = subject.target.sample(options.count, options.seed, dtype=torch.float64)
        return x, labels, None
    if not isinstance(subject, ModelSubject) or subject.data is None:
        raise ValueError(
            f"the data that {subject.name!r} was trained on is not to be had; name some with --data"
        )
    data = subject.data
    chosen = slice(0, options.count)
    if len(data.test_x) < options.count:
        raise ValueError(
            f"-n {options.count} is more than the {len(data.test_x)} held-out samples of "
            f"{data.name!r}; ask for fewer"
        )
    return data.test_x[chosen], None if data.test_y is None else data.test_y[chosen], data


def _condition(options: LikelihoodOptions, subject: Subject, labels: Tensor | None) -> Condition:
    scales = () if options.scale is None else (options.scale,)
    if options.label != OWN:
        (condition,) = make_conditions((options.guidance,), scales, options.label)
        if condition.label == "all":
            raise ValueError("--label must be a class, 'own' (each sample's) or 'none'")
        subject.check(condition)
        return condition
    (condition,) = make_conditions((options.guidance,), scales, "all")
    subject.check(condition)
    if labels is None:
        raise ValueError("--label own needs data with labels; give a class, or none")
    return _Labelled(condition.guidance, condition.scale, "all", own=labels)


def _settings(
    options: LikelihoodOptions,
    subject: Subject,
    sde: str,
    solver: Solver | Integrator,
    x: Tensor,
    data: Dataset | None,
) -> dict[str, Any]:
    process = subject.sdes[sde]
    exact = isinstance(subject, ExactSubject)
    divergence = options.divergence or ("exact" if exact else "hutchinson")
    named_divergence(divergence, options.probes, options.probe_law)
    settings: dict[str, Any] = {
        "divergence": divergence,
        "probes": options.probes,
        "probe_law": options.probe_law,
        "solver": solver,
        "steps": options.steps,
        "grid": None if options.steps is None else "log_snr",
        "seed": options.seed,
        "memory": int(options.memory * 1024**2),
    }
    if options.tolerance is not None:
        if options.steps is not None:
            raise ValueError("--tolerance and --steps exclude each other; give one of them")
        settings["plan"] = Adaptive(options.tolerance, options.tolerance)
    make_route(process, solver, options.steps, settings["grid"], settings.get("plan"), x)
    if options.prior == "exact":
        if not isinstance(subject, ExactSubject):
            raise ValueError("--prior exact needs a target whose density is known, not a model")
        target, last = subject.target, process.at(float(process.t_max))
        settings["prior"] = lambda z: target.log_prob_at(z, last)
    elif options.prior == "moments":
        settings["prior"] = "moments"
        if isinstance(subject, ExactSubject):
            settings["moments"] = (subject.target.mean(), subject.target.covariance())
        elif data is not None:
            settings["moments"] = data.train_x
    return settings


def _width(options: LikelihoodOptions, subject: Subject) -> float | None:
    if not isinstance(subject, ModelSubject) or options.draws == 0:
        return None
    description = subject.judge.data
    levels = options.levels or (_DIGITS_LEVELS if description.name == "digits" else None)
    try:
        return bin_width(description.scaling, levels)
    except ValueError as error:
        raise ValueError(
            f"--levels: {error}; or --draws 0 for densities of data that is not rounded"
        ) from None


def _batch(plan: LikelihoodPlan, ids: Tensor) -> Figures:
    options, subject, device = plan.options, plan.subject, plan.machine.device
    process = subject.sdes[plan.sde]
    score_fn = subject.score_of(plan.sde, plan.condition)(ids)
    x = plan.x[ids].to(device)
    settings = {**plan.settings, "sample_ids": ids}
    bits = spread = None
    if plan.width is not None:
        found = dequantised_likelihood(
            score_fn, process, x, width=plan.width, draws=options.draws, clip=options.clip,
            **settings,
        )  # fmt: skip
        likelihoods, bits, spread = found.draws, found.bits_per_dim, found.stderr
    else:
        likelihoods = (log_likelihood(score_fn, process, x, **settings),)
    bounds = []
    for draw in range(options.draws if plan.width else 1) if options.bound else ():
        # Of the same data as the likelihoods, so that the bound stands above their mean.
        at = x if plan.width is None else dequantise(
            x, plan.width, draw, seed=options.seed, sample_ids=ids
        )  # fmt: skip
        bounds.append(
            likelihood_bound(
                score_fn, process, at, draws=options.bound, seed=options.seed, sample_ids=ids
            )
        )
    return Figures(
        _mean(likelihoods, lambda each: each.log_prob),
        _mean(likelihoods, lambda each: each.stderr),
        torch.stack([each.reached for each in likelihoods]).all(0),
        _mean(likelihoods, lambda each: torch.full_like(each.log_prob, each.nfe)),
        _mean(likelihoods, lambda each: each.truncation),
        _mean(likelihoods, lambda each: each.prior_mismatch)
        if likelihoods[0].prior_mismatch is not None else None,
        bits,
        spread,
        torch.stack([each.bound for each in bounds]).mean(0).cpu() if bounds else None,
        torch.stack([each.stderr for each in bounds]).mean(0).cpu() if bounds else None,
        _vlb(plan, score_fn, x),
        _truth(plan, x, ids),
        _predicted(plan, x, ids) if options.classify else None,
    )  # fmt: skip


def _vlb(plan: LikelihoodPlan, score_fn: ScoreFn, x: Tensor) -> Tensor | None:
    """``L_vlb`` of a discrete chain on the raw levels, in bits per dimension; ``None`` without."""
    process, options = plan.subject.sdes[plan.sde], plan.options
    if plan.width is None or not options.bound or not isinstance(process, TabulatedVPSDE):
        return None
    bins = round(2 / plan.width) + 1  # centred at -1, ..., 1
    if abs(plan.width * (bins - 1) - 2) > 1e-6:  # not the decoder's bins
        return None
    return vlb(score_fn, process, x, bins=bins, seed=options.seed).bits_per_dim


def _mean(likelihoods: tuple[Likelihood, ...], what: Callable[[Likelihood], Any]) -> Tensor:
    return torch.stack([what(each) for each in likelihoods]).mean(0).cpu()


def _truth(plan: LikelihoodPlan, x: Tensor, ids: Tensor) -> Tensor | None:
    """The true log-density of clean data, where there is one law it could have."""
    subject, condition = plan.subject, plan.condition
    if not isinstance(subject, ExactSubject):
        return None
    if not subject.target.has_density:
        return None
    if condition.law == "whole":
        return subject.target.log_prob(x).cpu()
    if condition.law == "conditional" and isinstance(condition.label, int):
        return subject.target.conditional(condition.label).log_prob(x).cpu()
    return None


def _predicted(plan: LikelihoodPlan, x: Tensor, ids: Tensor) -> Tensor:
    subject = plan.subject
    process = subject.sdes[plan.sde]
    model: Any
    if isinstance(subject, ExactSubject):
        model, weights = subject.target.model(process), subject.target.weights
        weights = torch.stack(
            [weights[subject.target.labels == c].sum() for c in range(subject.target.num_classes)]
        )
    else:
        model, weights = subject.models[plan.sde].model, None  # type: ignore[attr-defined]
    settings = {**plan.settings, "sample_ids": ids}
    return class_posterior(model, process, x, weights=weights, **settings).label.cpu()
