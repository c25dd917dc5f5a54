"""Log-densities along the probability-flow ODE.

The density changes along the ODE by its divergence (Song et al. 2021, arXiv:2011.13456, eq. 39):
``log p(x, t_min) = log p(z, t_max) + int div dt``. It is computed in ``x / r``, ``r =
sqrt(alpha^2 + sigma^2)``, where both ends are smooth and a unit Gaussian has no divergence at all:
with ``s = sigma / alpha``,

    dM/ds = -(alpha tr(d eps / dx) - D s / (1 + s^2)),   M = 0 at t_min,
    log p(x, t_min) = log p(z, t_max) - M + D log(r at t_max / r at t_min).

``M``, one for each probe, is carried in further elements of the state, as ``r M``. Their "noise"
``sigma/r M + r/alpha dM/ds`` makes ``d(r M / alpha)/ds = noise``, the equation that every solver
solves for ``x``. So all solvers serve, and an error estimate in units of r sees M in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sde_diffusion.broadcast import expand, per_sample_sum
from sde_diffusion.errors import require_between, require_count, unknown_name
from sde_diffusion.prediction import Prediction, ScoreFn, cost_of, select
from sde_diffusion.sde import SDE, NoiseLevel
from sde_diffusion.targets import GaussianMixture
from solvers.base import Integrator, Solver
from solvers.divergence import Divergence, named_divergence
from solvers.encoding import Route, Times, carry_to_noise, make_route
from solvers.jacobian import Jacobian, Memory, Passes, plan_passes
from solvers.noise import CounterNoise
from solvers.plans import Plan
from solvers.progress import Report

PriorLogProb = Callable[[Tensor], Tensor]
Moments = Tensor | tuple[Tensor, Tensor]
PRIORS = ("standard", "moments")
_LARGEST_COVARIANCE = 4096  # dimensions; its square in float64 is 128 MiB


@dataclass(frozen=True)
class Likelihood:
    """Log-densities of a batch, and what they cost. All of ``(B,)`` float64 in nats, but as said.

    Attributes:
        log_prob: of ``x`` under the model's law at ``t_min``; NaN where not reached.
        stderr: of ``log_prob`` over the probes: 0 where exact, NaN with a single probe. It knows
            nothing of the solver's error, the truncation or the prior.
        z: the latents, ``(B, *event)``.
        nfe: evaluations of eps per sample, counted; where samples differ, their mean.
        network_passes: of these evaluations. Products with the Jacobian come on top.
        products: products with the Jacobian per sample.
        values: ``(B, probes)``: ``log_prob`` by each independent probe.
        reached: ``(B,)`` bool: whether the solver arrived within its tolerance and ``max_steps``.
        truncation: estimate of what ``log_prob`` has above the log-density of clean data because
            the law at ``t_min`` carries noise: to first order in its variance, by the heat
            equation; only where that noise is small against the data's finest detail. ``None``
            without diagnostics.
        prior_mismatch: estimate of the true log-density at ``z`` above the prior's that was used,
            from the score at ``t_max``, to second order in the mismatch; ``None`` without
            diagnostics or with a callable prior. ``log_prob + prior_mismatch`` is corrected for it.
    """

    log_prob: Tensor
    stderr: Tensor
    z: Tensor
    nfe: int | float
    network_passes: int | float
    products: int | float
    values: Tensor
    reached: Tensor
    nfe_per_sample: Tensor | None = None
    truncation: Tensor | None = None
    prior_mismatch: Tensor | None = None

    @property
    def bits(self) -> Tensor:
        """``log_prob`` in bits."""
        return self.log_prob / math.log(2)

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Ends of a confidence interval for the value with exact divergence, by Student's t.

        Raises:
            ValueError: a level outside (0, 1).
        """
        require_between("level", level, 0, 1)
        if level in (0, 1):
            raise ValueError(f"level must lie inside (0, 1), got {level!r}")
        count = self.values.shape[1]
        width = self.stderr * (student(level, count - 1) if count > 1 else 1.0)
        return self.log_prob - width, self.log_prob + width


def log_likelihood(
    score_fn: ScoreFn,
    sde: SDE,
    x: Tensor,
    *,
    divergence: Literal["exact", "hutchinson", "hutch++"] | Divergence = "exact",
    probes: int = 1,
    seed: int = 0,
    solver: Solver | Integrator | None = None,
    prior: Literal["standard", "moments"] | PriorLogProb = "standard",
    moments: Moments | None = None,
    probe_law: Literal["rademacher", "gaussian"] = "rademacher",
    sample_ids: Sequence[int] | Tensor | None = None,
    steps: int | None = None,
    grid: Times = None,
    plan: Plan | None = None,
    memory: Memory | int | None = None,
    diagnostics: bool = True,
    progress: bool | Report = False,
) -> Likelihood:
    """Log-density of ``x`` under the probability-flow ODE of a score, in nats.

    A sample's value does not depend on its batch: bitwise on exact targets at fixed steps, to
    rounding otherwise.

    Args:
        score_fn: any; guided and conditional ones give the likelihood of their own ODE's law. It
            must be differentiable in ``x``.
        x: ``(B, *event)``, taken as data at ``t_min``. The score sees its dtype; the ODE is solved
            in float64.
        divergence: ``exact``, ``hutchinson``, ``hutch++``, or a ``Divergence``.
        probes: vectors per sample for the estimates (``hutch++``: at least 3), the same along the
            whole path, drawn by ``seed`` and ``sample_ids``.
        solver: any deterministic solver of the catalogue but diffusers'; ``Tsitouras()`` with steps
            chosen by each sample by default (``solvers.encoding.ode_solvers`` lists them).
        prior: the law at ``t_max``: ``standard``, the SDE's; ``moments``, the Gaussian of the
            data's mean and covariance carried to ``t_max``; or ``z -> (B,)`` log-densities.
        moments: for ``moments``: data ``(N, *event)``, or ``(mean, covariance)`` of the flattened
            event: ``(D,)`` and ``(D, D)``, or ``(D,)`` variances.
        probe_law: of Hutchinson's probes: ``rademacher`` or ``gaussian``.
        sample_ids: ``(B,)`` whole numbers; ``0..B-1`` by default.
        steps, grid, plan: as for ``encode``. Samples that do not arrive under ``Adaptive`` are NaN
            and ``False`` in ``reached``.
        memory: bytes that a pass of products may take (512 MiB by default), or a ``Memory``, which
            also bounds the vectors of a pass and chooses forward or reverse mode.
        diagnostics: estimate ``truncation`` and ``prior_mismatch``: four more evaluations, two of
            them with products.
        progress: a bar, or ``progress(done, total)``.
    Raises:
        ValueError, TypeError: arguments that do not fit, before any work.
    """
    route = make_route(sde, solver, steps, grid, plan, x)
    if not bool(x.isfinite().all()):
        flat = x.reshape(len(x), -1) if len(x) else x
        bad = int((~flat.isfinite().all(-1)).nonzero()[0])
        raise ValueError(f"x[{bad}] holds NaN or infinite values; remove or replace them")
    require_count("probes", probes)
    way = named_divergence(divergence, probes, probe_law)
    bound = memory if isinstance(memory, Memory) else Memory()
    if memory is not None and not isinstance(memory, Memory):
        bound = Memory(bytes=memory)
    noise = CounterNoise(seed, sample_numbers(sample_ids, len(x)))
    first, last = (sde.at(route.times[place]) for place in (-1, 0))
    first, last = (level.map(lambda f: f.to(x.device)) for level in (first, last))
    log_prior = _log_prior(prior, moments, sde, last, x)
    passes = plan_passes(bound, score_fn, x, first)
    wide = x.double()
    drawn = way.draw(wide.reshape(len(x), math.prod(x.shape[1:])), noise)
    density = _Density(score_fn, way, drawn, passes, x.shape[1:], x.dtype)
    return _Run(density, sde, x, route, log_prior, first, last).result(
        prior == "standard", diagnostics, progress
    )


def student(level: float, freedom: int) -> float:
    """The quantile of Student's t that a two-sided interval of this level reaches to."""
    from scipy.stats import t

    return float(t.ppf(0.5 + 0.5 * level, freedom))


class _Density:
    """The score function of the augmented state ``(B, D + values)``: ``x`` and ``r M``."""

    def __init__(
        self,
        score_fn: ScoreFn,
        divergence: Divergence,
        drawn: Tensor,
        passes: Passes,
        event: torch.Size,
        dtype: torch.dtype,
    ) -> None:
        self.score_fn = score_fn
        self.divergence = divergence
        self.drawn = drawn
        self.passes = passes
        self.event = event
        self.dtype = dtype
        self.size = math.prod(event)

    def cost_at(self, level: NoiseLevel) -> int:
        return cost_of(self.score_fn, level)

    def select(self, indices: Tensor) -> _Density:
        return _Density(
            select(self.score_fn, indices),
            self.divergence,
            self.drawn[:, indices] if len(self.drawn) else self.drawn,
            self.passes,
            self.event,
            self.dtype,
        )

    def __call__(self, state: Tensor, level: NoiseLevel) -> Prediction:
        x, carried = state[:, : self.size], state[:, self.size :]
        eps, trace = self.traced(x, level)
        alpha, sigma = expand(level.alpha, carried), expand(level.sigma, carried)
        radius = torch.sqrt(alpha**2 + sigma**2)
        ratio = sigma / alpha
        change = -(alpha * trace - self.size * ratio / (1 + ratio**2))
        noise = sigma / radius**2 * carried + radius / alpha * change
        return Prediction.from_eps(state, level, torch.cat([eps, noise], 1))

    def traced(self, flat: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """``eps`` ``(B, D)`` and the trace by each probe ``(B, values)``, float64."""
        size = self.passes.split(len(flat))
        if size >= len(flat):
            return self._traced(flat, level)
        found = []
        for part in torch.arange(len(flat), device=flat.device).split(size):
            own = level if level.t.ndim == 0 else level.map(lambda f, part=part: f[part])  # type: ignore[misc]
            found.append(self.select(part)._traced(flat[part], own))
        return torch.cat([eps for eps, _ in found]), torch.cat([trace for _, trace in found])

    def _traced(self, flat: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        x = flat.to(self.dtype).reshape(len(flat), *self.event)
        jacobian = Jacobian(self.score_fn, x, level, self.passes)
        trace = self.divergence.estimate(jacobian, self.drawn.to(self.dtype))
        return jacobian.eps.double(), trace.double()


@dataclass(frozen=True)
class _Run:
    """One call of ``log_likelihood``, all arguments known to be good."""

    density: _Density
    sde: SDE
    x: Tensor
    route: Route
    log_prior: PriorLogProb
    first: NoiseLevel
    last: NoiseLevel

    def result(self, standard: bool, diagnostics: bool, progress: bool | Report) -> Likelihood:
        density, count, size = self.density, len(self.x), self.density.size
        flat = self.x.double().reshape(count, size)
        state = torch.cat([flat, flat.new_zeros(count, density.divergence.values)], 1)
        solution = carry_to_noise(density, self.sde, state, self.route, progress)
        reached = solution.x.isfinite().all(1)
        z = torch.where(reached[:, None], solution.x[:, :size], 0.0)
        radius = [torch.sqrt(level.alpha**2 + level.sigma**2) for level in (self.first, self.last)]
        change = solution.x[:, size:] / radius[1]
        shaped = z.reshape(self.x.shape)
        base = self.log_prior(shaped).double() + size * torch.log(radius[1] / radius[0])
        values = torch.where(reached[:, None], base[:, None] - change, math.nan)
        truncation = self._truncation(flat) if diagnostics else None
        mismatch = self._mismatch(z) if diagnostics and standard else None
        more = diagnostics + 3 * (diagnostics and standard)
        traced = diagnostics + (diagnostics and standard)
        nfe, each = solution.nfe, density.divergence.products(size)
        own = solution.nfe_per_sample
        return Likelihood(
            values.mean(1),
            _stderr(values, density.divergence.exact),
            torch.where(reached[:, None], z, math.nan).to(self.x.dtype).reshape(self.x.shape),
            nfe + more,
            solution.network_passes + more * cost_of(density.score_fn, self.last),
            (nfe + traced) * each,
            values,
            reached,
            None if own is None else own + more,
            truncation,
            mismatch,
        )

    def _truncation(self, flat: Tensor) -> Tensor:
        """In ``y = x / alpha``, ``log q_s = log q_0 + s^2/2 (laplacian log q + |grad log q|^2)``
        and ``eps = -s grad log q``; then from y to x."""
        eps, trace = self.density.traced(flat, self.first)
        alpha, ratio = self.first.alpha, self.first.sigma_over_alpha
        heat = 0.5 * (per_sample_sum(eps**2) - ratio * alpha * trace.mean(1))
        shift = -(1 / alpha - 1) * per_sample_sum(flat * eps) / ratio
        return heat + shift - self.density.size * torch.log(alpha)

    def _mismatch(self, z: Tensor) -> Tensor:
        """``log p - log prior`` at ``u = z / std``, with ``d`` the difference of their scores in u:
        ``int_0^1 u . d(v u) dv`` by Simpson's rule from its value at 0, which is ``-|d(0)|^2/2 -
        tr(d')(0)/2`` to second order, for both are normalised."""
        std = self.sde.prior_std().to(z)
        unit, scale = z / std, std / self.last.sigma
        origin, trace = self.density.traced(torch.zeros_like(z), self.last)

        def along(share: float) -> Tensor:
            x = (share * z).to(self.density.dtype).reshape(self.x.shape)
            eps = self.density.score_fn(x, self.last).eps.double().reshape(z.shape)
            return per_sample_sum(unit * (share * unit - scale * eps))

        with torch.no_grad():
            climb = (4 * along(0.5) + along(1.0) - per_sample_sum(unit * scale * origin)) / 6
        slope = self.density.size - std * scale * trace.mean(1)
        return climb - 0.5 * per_sample_sum((scale * origin) ** 2) - 0.5 * slope


def _stderr(values: Tensor, exact: bool) -> Tensor:
    count = values.shape[1]
    if exact:
        return torch.zeros_like(values[:, 0])
    if count == 1:
        return torch.full_like(values[:, 0], math.nan)
    return values.std(1) / math.sqrt(count)


def sample_numbers(sample_ids: Sequence[int] | Tensor | None, count: int) -> Tensor | None:
    """``sample_ids``, checked: ``(count,)`` long, or ``None``."""
    if sample_ids is None:
        return None
    ids = torch.as_tensor(sample_ids)
    if ids.is_floating_point() or ids.shape != (count,):
        raise ValueError(
            f"sample_ids must be {count} whole numbers, one per sample, got shape "
            f"{tuple(ids.shape)} of {ids.dtype}"
        )
    return ids.long()


def _log_prior(
    prior: object, moments: Moments | None, sde: SDE, last: NoiseLevel, x: Tensor
) -> PriorLogProb:
    if moments is not None and prior != "moments":
        raise ValueError("moments is only used with prior='moments'; leave it out, or set prior")
    if callable(prior):
        return prior
    if prior == "standard":
        return lambda z: sde.prior_log_prob(z.reshape(len(z), *x.shape[1:]))
    if prior != "moments":
        raise unknown_name("prior", prior, PRIORS)
    if moments is None:
        raise ValueError(
            "prior='moments' needs moments=, the data (N, *event) or its (mean, covariance)"
        )
    mean, covariance = data_moments(moments, x.shape[1:])
    gaussian = GaussianMixture(mean[None], covariance[None])
    return lambda z: gaussian.log_prob_at(z.reshape(len(z), -1), last)


def data_moments(moments: Moments, event: torch.Size) -> tuple[Tensor, Tensor]:
    """Mean ``(D,)`` and covariance ``(D, D)`` (or variances ``(D,)``) of flattened events.

    Raises:
        ValueError: shapes that do not fit, fewer than two samples, more than 4,096 dimensions where
            a covariance is to be made.
    """
    size = math.prod(event)
    if isinstance(moments, Tensor):
        if moments.shape[1:] != event or len(moments) < 2:
            raise ValueError(
                f"moments must be at least two samples (N, {', '.join(map(str, event))}), got "
                f"shape {tuple(moments.shape)}"
            )
        if size > _LARGEST_COVARIANCE:
            raise ValueError(
                f"moments of {size} dimensions would need their full covariance; give (mean, "
                "variances), each (D,)"
            )
        flat = moments.double().reshape(len(moments), size).cpu()
        return flat.mean(0), torch.cov(flat.mT).reshape(size, size)
    mean, covariance = (part.double().cpu() for part in moments)
    if mean.shape != (size,) or covariance.shape not in ((size,), (size, size)):
        raise ValueError(
            f"moments must be (mean, covariance) of shapes ({size},) and ({size}, {size}) or "
            f"({size},), got {tuple(mean.shape)} and {tuple(covariance.shape)}"
        )
    return mean, covariance
