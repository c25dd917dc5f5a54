"""Sequential Monte Carlo: samples of the posterior, exact as the particles become many."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sde_diffusion.broadcast import per_sample_sum
from sde_diffusion.errors import NonFiniteError, require_between, require_count, require_finite
from sde_diffusion.gradients import pull_back
from sde_diffusion.measurements import Measurement
from sde_diffusion.prediction import ScoreFn, cost_of, select
from sde_diffusion.restoration import differentiable_residual, measured_residual, spread_of_x0
from sde_diffusion.sde import SDE, NoiseLevel
from solvers import grids
from solvers.base import Step, make_steps
from solvers.counting import CountedScoreFn
from solvers.methods.ancestral import Ancestral
from solvers.noise import CounterNoise
from solvers.progress import Report, reporting

_CHOICE = 1_000_004  # the slot of the uniforms that resampling takes


@dataclass(frozen=True)
class SMCSolution:
    """Posterior samples and what the particles say of themselves.

    Attributes:
        x: one particle of each sample, drawn by the final weights: ``(B, *event)``.
        particles: all of them, ``(B, P, *event)``, to be averaged with ``weights``.
        weights: ``(B, P)``, summing to 1 per sample; float64.
        ess: effective sample size ``1 / sum w^2`` at each level, before any resampling: ``(steps +
            1, B)``, in 1..P. Near 1 at some level: the particles of that sample have died out
            there, and more of them, or more noise in the measurement, are needed.
        log_evidence: estimate of ``log p(y)``, nats, ``(B,)``; unbiased on the linear scale, for
            the sampler's own chain.
        nfe, network_passes: of one particle.
        times: the grid.
    """

    x: Tensor
    particles: Tensor
    weights: Tensor
    ess: Tensor
    log_evidence: Tensor
    nfe: int
    network_passes: int
    times: Tensor


def smc_sample(
    score_fn: ScoreFn,
    sde: SDE,
    measurement: Measurement,
    y: Tensor,
    *,
    shape: Sequence[int],
    steps: int,
    particles: int = 16,
    gradient: bool = True,
    data_std: float = 1.0,
    below: float = math.inf,
    resample_below: float = 0.5,
    grid: str | grids.Grid | Sequence[float] | Tensor | None = None,
    seed: int = 0,
    sample_ids: Sequence[int] | Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    progress: bool | Report = False,
) -> SMCSolution:
    """The twisted diffusion sampler (Wu et al. 2023, arXiv:2306.17775, alg. 1).

    Each sample is a population of its own. The chain is ``Ancestral``'s, moved by the gradient of
    the twist ``log N(y; A(x0), r^2 A A^T + noise_std^2 I)`` as pseudo-inverse guidance is; weights
    undo what the approximation of the likelihood got wrong, so that the law is the posterior under
    the chain, as the particles become many, and under the score, as the steps do. What is returned
    is the estimate of x0 at the last level, weighed with the true likelihood.

    Particles are resampled (systematically) within their sample alone, where its effective sample
    size has fallen, so that a sample does not depend on its batch.

    Args:
        score_fn: the unconditional score. It sees batches of ``B * particles``.
        measurement: any, with ``noise_std`` above 0, since weights are likelihoods.
        y: ``(B, *measured)``, or ``(1, *measured)`` for all samples.
        shape: ``(B, *event)``.
        steps: of the chain; one evaluation each and one at the end.
        particles: per sample.
        gradient: whether the twist's gradient moves the proposals. Without it the particles move as
            if nothing were known, which takes many more of them, and serves measurements that have
            no gradient.
        data_std: standard deviation of the data, for r^2; see ``sde_diffusion.restoration``.
        below: the twist acts where ``sigma / alpha`` is below this; above, particles move as if
            nothing were known, since a network's estimate of x0 says little there. No bias comes of
            it.
        resample_below: the share of ``particles`` below which the effective sample size must fall,
            in [0, 1]; 1 resamples at every step.
        grid, seed, sample_ids, dtype, device, progress: as for ``sample``.
    Raises:
        TypeError, ValueError: what does not fit, before any work; a measurement without a gradient,
            where one is asked for, at the first evaluation.
        NonFiniteError: weights or particles left the finite numbers.
    """
    if not isinstance(measurement, Measurement):
        raise TypeError(f"measurement must be a Measurement, got {measurement!r}: wrap a function")
    if measurement.noise_std == 0:
        raise ValueError(
            "noise_std of the measurement must be above 0: particles are weighed by the "
            "likelihood, which without noise is 0 almost everywhere; give a small one"
        )
    y = measurement.check(y)
    count, *event = (require_count(f"shape[{i}]", size) for i, size in enumerate(shape))
    if len(y) not in (1, count):
        raise ValueError(f"y must have one measurement, or one per sample, {count}; got {len(y)}")
    require_count("particles", particles)
    require_between("resample_below", resample_below, 0, 1)
    require_finite("data_std", data_std, above=0.0)
    if not below > 0:
        raise ValueError(f"below must be above 0, in sigma/alpha, got {below!r}")
    times = grids.resolve(grid, sde, steps)
    ids = torch.arange(count) if sample_ids is None else torch.as_tensor(sample_ids).long()
    if ids.shape != (count,):
        raise ValueError(f"sample_ids must be {count} whole numbers, got shape {tuple(ids.shape)}")
    own = torch.arange(count, device=device).repeat_interleave(particles)
    counted = CountedScoreFn(select(score_fn, own))
    twist = _Twist(
        counted,
        measurement,
        y if len(y) == 1 else y.to(own.device)[own],
        gradient,
        data_std,
        below,
    )
    x = torch.empty((count * particles, *event), dtype=dtype, device=device)
    noise = CounterNoise(seed, (ids[:, None] * particles + torch.arange(particles)).reshape(-1))
    x = noise.prior(x) * sde.prior_std().to(x)
    population = _Population(count, particles, resample_below, CounterNoise(seed, ids), x.device)
    with torch.no_grad(), reporting(progress, len(times) - 1) as report:
        all_steps = make_steps(sde, Ancestral(), times, x)
        at = twist(x, all_steps[0].start, last=False)
        population.weigh(at.log_twist)
        for done, step in enumerate(all_steps, 1):
            chosen = population.resample(x, step)
            x, at = x[chosen], at.taken(chosen)
            x, correction = _moved(x, at, step, noise)
            before = at.log_twist
            at = twist(x, step.end, last=done == len(all_steps))
            population.weigh(at.log_twist - before + correction)
            if report is not None:
                report(done, len(all_steps))
    if not bool(at.x0.isfinite().all() and population.log_weights.isfinite().all()):
        raise NonFiniteError(
            "particles or weights became NaN or infinite; the score or the measurement is not "
            "finite, or noise_std is too small",
            len(all_steps) - 1,
            float(times[-1]),
        )
    passes = counted.network_passes + sum(
        cost_of(counted.score_fn, step.start)
        for step in all_steps
        if gradient and twist.acts(step.start)
    )
    constant = 0.5 * measurement.numbers(y) * math.log(2 * math.pi * measurement.noise_std**2)
    found = at.x0.reshape(count, particles, *event)
    return SMCSolution(
        found[torch.arange(count, device=found.device), population.one(len(all_steps))],
        found,
        population.weights(),
        torch.stack(population.ess),
        population.log_evidence() - constant,
        counted.nfe,
        passes,
        times,
    )


class _At(NamedTuple):
    """What is known of each particle at its level, ``(B * P, ...)``.

    Attributes:
        eps: the score's.
        pull: ``-grad log twist``; ``None`` where no gradient is taken.
        x0: the estimate.
        log_twist: ``(B * P,)`` float64, but for a constant of the level.
    """

    eps: Tensor
    pull: Tensor | None
    x0: Tensor
    log_twist: Tensor

    def taken(self, chosen: Tensor) -> _At:
        pull = None if self.pull is None else self.pull[chosen]
        return _At(self.eps[chosen], pull, self.x0[chosen], self.log_twist[chosen])


@dataclass(frozen=True)
class _Twist:
    """``p(y | x_t)``, approximately; constants of the level cancel between a sample's particles."""

    score_fn: CountedScoreFn
    measurement: Measurement
    y: Tensor
    gradient: bool
    data_std: float
    below: float

    def __call__(self, x: Tensor, level: NoiseLevel, last: bool) -> _At:
        variance = self.measurement.noise_std**2
        spread = spread_of_x0(level, self.data_std)
        acting = last or self.acts(level)
        moving = self.gradient and acting and not last
        if last:  # the estimate is what is returned, and its likelihood is the true one
            spread = torch.zeros_like(spread)

        def forward(x: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
            prediction = self.score_fn(x, level)
            residual_of = differentiable_residual if moving else measured_residual
            residual = residual_of(self.measurement, self.y, prediction.x0)
            weighed = self.measurement.weighed(residual, spread, variance)
            log_twist = -0.5 * per_sample_sum(residual.double() * weighed.double())
            if not acting:
                log_twist = torch.zeros_like(log_twist)
            return residual, weighed, (prediction.eps, prediction.x0, log_twist)

        if moving:
            pull, eps, x0, log_twist = pull_back(x, level, forward)
            return _At(eps, pull, x0, log_twist)
        _, _, (eps, x0, log_twist) = forward(x, level)
        return _At(eps, None, x0, log_twist)

    def acts(self, level: NoiseLevel) -> bool:
        return float(level.sigma_over_alpha) < self.below


def _moved(x: Tensor, at: _At, step: Step, noise: CounterNoise) -> tuple[Tensor, Tensor]:
    """The particles after a step, and ``log p(x' | x) - log q(x' | x)`` for the twisted q."""
    ratio, direction, spread = step.coefficients
    z = noise(x, step)
    plain = ratio * x + direction * at.eps + spread * z
    if at.pull is None:
        return plain, torch.zeros_like(at.log_twist)
    shift = (direction * step.start.sigma).to(x.dtype) * at.pull
    change = (shift / spread).double()
    correction = -0.5 * per_sample_sum(change * change) - per_sample_sum(change * z.double())
    return plain + shift, correction


class _Population:
    """Weights of all particles, ``(B, P)``, and the choices they lead to."""

    def __init__(
        self, count: int, particles: int, below: float, noise: CounterNoise, device: torch.device
    ) -> None:
        self.log_weights = torch.zeros(count, particles, dtype=torch.float64, device=device)
        self.ess: list[Tensor] = []
        self._evidence = torch.zeros(count, dtype=torch.float64, device=device)
        self._below = below * particles
        self._noise = noise

    def weigh(self, change: Tensor) -> None:
        self.log_weights = self.log_weights + change.reshape(self.log_weights.shape)
        self.ess.append(1 / self.weights().square().sum(1))

    def weights(self) -> Tensor:
        return torch.softmax(self.log_weights, 1)

    def log_evidence(self) -> Tensor:
        particles = self.log_weights.shape[1]
        return self._evidence + torch.logsumexp(self.log_weights, 1) - math.log(particles)

    def resample(self, x: Tensor, step: Step) -> Tensor:
        """Indices into the ``B * P`` particles: of those that go on."""
        count, particles = self.log_weights.shape
        stay = torch.arange(particles, device=x.device).expand(count, particles)
        needed = (self.ess[-1] < self._below)[:, None]
        places = (stay + self._uniform(step.index)[:, None]) / particles
        chosen = torch.where(needed, self._at(places), stay)
        self._evidence = torch.where(needed[:, 0], self.log_evidence(), self._evidence)
        self.log_weights = torch.where(needed, 0, self.log_weights)
        return (chosen + particles * torch.arange(count, device=x.device)[:, None]).reshape(-1)

    def one(self, index: int) -> Tensor:
        """A particle of each sample, by weight: ``(B,)``."""
        return self._at(self._uniform(index)[:, None])[:, 0]

    def _at(self, places: Tensor) -> Tensor:
        reached = self.weights().cumsum(1)
        found = torch.searchsorted(reached, places * reached[:, -1:], right=True)
        return found.clamp_max(reached.shape[1] - 1)

    def _uniform(self, index: int) -> Tensor:
        """One number in (0, 1) per sample."""
        like = self._evidence
        normal = self._noise.normal(like, index, _CHOICE)
        return torch.special.ndtr(normal)
