"""Data to latents and back along the probability-flow ODE, and what can be done on the way.

The ODE pairs every ``x`` at ``t_min`` with one latent ``z`` at ``t_max`` (Song et al. 2021,
arXiv:2011.13456, sec. 4.3 and app. D.3). ``encode`` runs the solvers on the mirrored SDE
(``solvers.mirror``), ``decode`` on the SDE itself; every deterministic solver of the catalogue
serves both, with fixed or with adaptive steps, but for diffusers' schedulers, whose discretisation
knows one direction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sde_diffusion.broadcast import per_sample_norm, per_sample_sum
from sde_diffusion.errors import require_count, require_finite
from sde_diffusion.parametrization import Label, Model, bind
from sde_diffusion.prediction import ScoreFn
from sde_diffusion.sde import SDE
from solvers import grids
from solvers.adaptive import Adaptive
from solvers.base import Integrator, Solver
from solvers.methods.embedded_pairs import Tsitouras
from solvers.mirror import MirroredScore, MirroredSDE, mirrored_times
from solvers.plans import Plan
from solvers.progress import Report
from solvers.sample import sample
from solvers.solution import Solution

Times = str | grids.Grid | Sequence[float] | Tensor | None


@dataclass(frozen=True)
class Route:
    """How to travel along the probability-flow ODE: a solver and its steps, known to fit.

    Attributes:
        times: decreasing, from the latent's end to the data's, float64 on the CPU.
    """

    solver: Solver | Integrator
    times: Tensor
    plan: Plan | None


@dataclass(frozen=True)
class RoundTrip:
    """Data encoded and decoded again.

    Attributes:
        z: the latents, ``(B, *event)``.
        x: what they decode to.
        rms: ``(B,)``: root mean square over the event of the difference from the data.
        nfe: score evaluations per sample, both ways.
    """

    z: Tensor
    x: Tensor
    rms: Tensor
    nfe: int | float


def encode(
    score_fn: ScoreFn,
    sde: SDE,
    x: Tensor,
    *,
    solver: Solver | Integrator | None = None,
    steps: int | None = None,
    grid: Times = None,
    plan: Plan | None = None,
    progress: bool | Report = False,
) -> Solution:
    """The latents of data: carry ``x`` from ``t_min`` to ``t_max`` along the probability-flow ODE.

    Args:
        score_fn, sde: as for ``sample``.
        x: ``(B, *event)``; its dtype and device are kept. Rounding in float32 costs about 1e-5.
        solver: deterministic; by default ``Tsitouras()`` with steps chosen by each sample.
        steps, grid: as for ``sample``, decreasing times; they are taken from their end.
        plan: ``Adaptive(...)`` by default where neither steps nor a grid is given; samples that do
            not arrive are then NaN, and ``False`` in ``Solution.reached``.
    Returns:
        A ``Solution``: ``.x`` the latents, of standard deviation ``sde.prior_std()``; ``.times``
        increasing.
    Raises:
        ValueError, TypeError: a stochastic solver, missing steps, ``x`` not finite.
    """
    route = make_route(sde, solver, steps, grid, plan, x)
    return carry_to_noise(score_fn, sde, x, route, progress)


def decode(
    score_fn: ScoreFn,
    sde: SDE,
    z: Tensor,
    *,
    temperature: float = 1.0,
    solver: Solver | Integrator | None = None,
    steps: int | None = None,
    grid: Times = None,
    plan: Plan | None = None,
    progress: bool | Report = False,
) -> Solution:
    """The data of latents: carry ``z`` from ``t_max`` to ``t_min``.

    Args:
        temperature: above 0; latents are multiplied by it. Below 1 samples come nearer to the
            typical, above 1 they spread.
        solver, steps, grid, plan: as for ``encode``.
    """
    require_finite("temperature", temperature, above=0.0)
    route = make_route(sde, solver, steps, grid, plan, z)
    return sample(
        score_fn,
        sde,
        route.solver,
        x=z * temperature,
        grid=route.times,
        plan=route.plan,
        progress=progress,
    )


def round_trip(score_fn: ScoreFn, sde: SDE, x: Tensor, **options: Any) -> RoundTrip:
    """Encode ``x``, decode it, and say how far it has come: options as for ``encode``."""
    there = encode(score_fn, sde, x, **options)
    arrived = there.x.isfinite().flatten(1).all(1) if x.ndim > 1 else there.x.isfinite()
    back = decode(score_fn, sde, torch.where(_like(arrived, x), there.x, 0.0), **options)
    found = torch.where(_like(arrived, x), back.x, math.nan)
    size = max(1, math.prod(x.shape[1:]))
    rms = (per_sample_sum((found - x) ** 2) / size).sqrt()
    return RoundTrip(there.x, found, rms, there.nfe + back.nfe)


def change_class(
    model: Model, sde: SDE, x: Tensor, label: Label, new_label: Label, **options: Any
) -> Solution:
    """``x`` of one class as it would be in another: its latent under ``label``, decoded under
    ``new_label``.

    Args:
        model: class-conditional, called ``(x, level, label)``.
        label, new_label: a class, ``(B,)`` classes, or ``None`` for the null label.
        options: as for ``encode``.
    """
    before, after = bind(model, label), bind(model, new_label)
    latents = encode(before, sde, x, **options)
    if not bool(latents.x.isfinite().all()):
        raise RuntimeError("some samples could not be encoded; loosen rtol and atol of the plan")
    solution = decode(after, sde, latents.x, **options)
    return replace(
        solution,
        nfe=solution.nfe + latents.nfe,
        network_passes=solution.network_passes + latents.network_passes,
        nfe_per_sample=None,
    )


def interpolate(
    score_fn: ScoreFn,
    sde: SDE,
    a: Tensor,
    b: Tensor,
    *,
    count: int = 9,
    temperature: float = 1.0,
    **options: Any,
) -> Tensor:
    """Paths from ``a`` to ``b`` through latent space, ``(count, B, *event)``, both ends included.

    Both are encoded, the latents interpolated by ``spherical`` (Song, Meng & Ermon 2021,
    arXiv:2010.02502, app. D.5), and decoded. The ends are the round trips of ``a`` and ``b``.

    Args:
        a, b: ``(B, *event)``.
        count: points on each path, at least 2.
        temperature: as for ``decode``.
        options: as for ``encode``.
    """
    count = require_count("count", count, least=2)
    if a.shape != b.shape:
        raise ValueError(
            f"a and b must have one shape, (B, *event), got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    first, last = (encode(score_fn, sde, end, **options).x for end in (a, b))
    if not bool(first.isfinite().all() and last.isfinite().all()):
        raise RuntimeError("some samples could not be encoded; loosen rtol and atol of the plan")
    # Point by point, so that a score function that holds something per sample is called with its
    # own batch.
    weights = torch.linspace(0, 1, count, dtype=torch.float64).tolist()
    return torch.stack(
        [
            decode(
                score_fn, sde, spherical(first, last, weight), temperature=temperature, **options
            ).x
            for weight in weights
        ]
    )


def spherical(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """``sin((1 - w) angle)/sin(angle) a + sin(w angle)/sin(angle) b``, per sample (Shoemake 1985).

    Straight where ``a`` and ``b`` point the same way.

    Raises:
        ValueError: a pair that points in exactly opposite directions, or a zero vector.
    """
    require_finite("weight", weight)
    wide_a, wide_b = a.double(), b.double()
    norms = per_sample_norm(wide_a) * per_sample_norm(wide_b)
    cosine = per_sample_sum(wide_a * wide_b) / norms
    bad = ~cosine.isfinite() | (cosine < -1 + 1e-12)
    if bool(bad.any()):
        raise ValueError(
            f"pair {int(bad.nonzero()[0])} of a and b is opposite or zero: there is no one way "
            "between them; choose another pair"
        )
    angle = torch.acos(cosine.clamp(max=1.0))
    sine = torch.sin(angle)
    straight = sine < 1e-8
    sine = torch.where(straight, 1.0, sine)
    ahead = torch.where(straight, 1 - weight, torch.sin((1 - weight) * angle) / sine)
    behind = torch.where(straight, weight, torch.sin(weight * angle) / sine)
    return (_like(ahead, a) * wide_a + _like(behind, a) * wide_b).to(a.dtype)


def make_route(
    sde: SDE,
    solver: Solver | Integrator | None,
    steps: int | None,
    grid: Times,
    plan: Plan | None,
    x: Tensor,
) -> Route:
    """Check how the ODE is to be travelled, before any work."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 1:
        raise TypeError(f"x must be a floating tensor of shape (B, *event), got {x!r:.80}")
    solver = Tsitouras() if solver is None else solver
    if not isinstance(solver, (Solver, Integrator)):
        raise TypeError(f"solver must be a Solver or an Integrator, got {solver!r}")
    if solver.stochastic or solver.order < 1:
        what = "draws noise" if solver.stochastic else "makes no step along it"
        raise ValueError(
            f"solver must follow the probability-flow ODE, and {solver!r} {what}; "
            f"these do: {', '.join(ode_solvers())}"
        )
    if type(solver).__module__.endswith("diffusers_"):
        raise ValueError(
            f"{solver!r} discretises from noise to data only; use one of: "
            f"{', '.join(ode_solvers())}"
        )
    estimating = isinstance(solver, Solver) and solver.error_order is not None
    own_steps = isinstance(solver, Integrator) and solver.adaptive
    if plan is None and steps is None and grid is None:
        if not (estimating or own_steps):
            raise ValueError(
                f"steps is missing: {solver!r} takes the steps of a grid; give their number, or "
                "use a solver that chooses its own, such as Tsitouras()"
            )
        if estimating:
            tolerance = 1e-6 if x.dtype == torch.float64 else 1e-4
            plan = Adaptive(tolerance, tolerance)
    if isinstance(plan, Adaptive):
        plan = replace(plan, unfinished="nan")
    chooses = own_steps or (plan is not None and plan.chooses_steps)
    if chooses and steps is None and grid is None:
        grid = [float(sde.t_max), float(sde.t_min)]
    return Route(solver, grids.resolve(grid, sde, steps), plan)


def carry_to_noise(
    score_fn: ScoreFn, sde: SDE, x: Tensor, route: Route, progress: bool | Report = False
) -> Solution:
    """Along a route from its last time to its first."""
    if not callable(score_fn):
        raise TypeError(f"score_fn must be callable, (x, level) -> Prediction, got {score_fn!r}")
    mirror = MirroredSDE(sde)
    solution = sample(
        MirroredScore(score_fn, mirror),
        mirror,
        route.solver,
        x=x,
        grid=mirrored_times(sde, route.times),
        plan=route.plan,
        progress=progress,
    )
    return replace(solution, times=route.times.flip(0))


def ode_solvers() -> list[str]:
    """Names of the catalogue's solvers that ``encode`` and ``log_likelihood`` take."""
    from solvers.catalogue import catalogue

    return [
        name
        for name, entry in catalogue().items()
        if entry.kind == "ODE" and entry.order is not None and entry.order > 0
    ]


def _like(mask: Tensor, x: Tensor) -> Tensor:
    return mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
