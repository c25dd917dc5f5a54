"""Critically damped Langevin diffusion: data in position, noise in velocity alone.

Dockhorn, Vahdat & Kreis 2022, arXiv:2112.07068: with mass M, friction ``Gamma = 2 sqrt(M)`` and
``beta`` constant, ``dx = beta v / M dt``, ``dv = (-beta x - beta Gamma v / M) dt + sqrt(2 Gamma
beta) dw`` (eq. 5). In ``w = v / sqrt(M)`` and ``u = beta t / sqrt(M)`` the drift is the constant
matrix ``[[0, 1], [-1, -2]]``, whose exponential is ``P = exp(-u) [[1 + u, u], [-u, 1 - u]]``; the
stationary law is ``N(0, I)``, so that a start of covariance C has covariance ``P C P^T + I - P
P^T`` at t. All below follows from these two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sde_diffusion.broadcast import expand
from sde_diffusion.errors import require_finite
from sde_diffusion.ito.fields import Normals, Score
from sde_diffusion.ito.laws import GaussianPrior, LogDensity, check_positive
from sde_diffusion.ito.sde import ItoSDE
from sde_diffusion.parametrization import check_label
from sde_diffusion.targets import GaussianMixture


class Covariance(NamedTuple):
    """A 2 x 2 covariance of position and velocity, elementwise the same for a whole event."""

    xx: Tensor
    xv: Tensor
    vv: Tensor

    @property
    def determinant(self) -> Tensor:
        return self.xx * self.vv - self.xv**2

    def solve(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Its inverse times ``(x, v)``."""
        return (
            (self.vv * x - self.xv * v) / self.determinant,
            (self.xx * v - self.xv * x) / self.determinant,
        )


@dataclass(frozen=True)
class CriticallyDampedLangevin:
    """The diffusion's settings and closed forms. A state is ``(B, 2, *event)``: position, velocity.

    Args:
        beta: speed; the end's distance from the prior is ``exp(-beta t_max / sqrt(M))``.
        mass: M, the variance of the velocity at the end.
        gamma: the velocity of data is ``N(0, gamma M)``.
        t_min, t_max: as in ``ItoSDE``.
    """

    beta: float = 4.0
    mass: float = 0.25
    gamma: float = 0.04
    t_min: float = 1e-3
    t_max: float = 1.0

    def __post_init__(self) -> None:
        check_positive(beta=self.beta, mass=self.mass)
        require_finite("gamma", self.gamma)
        if self.gamma < 0:
            raise ValueError(f"gamma must be at least 0, got {self.gamma!r}")

    @property
    def friction(self) -> float:
        """Gamma, at which damping is critical."""
        return 2 * math.sqrt(self.mass)

    def sde(self) -> ItoSDE:
        """The diffusion as an ``ItoSDE`` on states; its transition is that from a whole state."""
        pull, drag = self.beta / self.mass, self.beta * self.friction / self.mass
        size = math.sqrt(2 * self.friction * self.beta)

        def drift(state: Tensor, t: Tensor) -> Tensor:
            x, v = state.unbind(1)
            return torch.stack([pull * v, -self.beta * x - drag * v], 1)

        def diffusion(state: Tensor, t: Tensor) -> Tensor:
            return _per_part(state, 0.0, size)

        return ItoSDE(
            drift,
            diffusion,
            kind="diagonal",
            state_dependent=False,
            t_min=self.t_min,
            t_max=self.t_max,
            prior=StationaryPrior(self),
            transition=StateTransition(self),
        )

    def hybrid(self) -> HybridTransition:
        """The transition from positions alone, the velocity at 0 integrated out."""
        return HybridTransition(self)

    def start(self, x0: Tensor, normal: Normals) -> Tensor:
        """States ``(B, 2, *event)`` from data ``(B, *event)`` with velocities from ``N(0, gamma
        M)``; ``normal(0)`` has the data's shape."""
        return torch.stack([x0, math.sqrt(self.gamma * self.mass) * normal(0)], 1)

    def clock(self, t: Tensor) -> Tensor:
        """``u = beta t / sqrt(M)``."""
        return self.beta / math.sqrt(self.mass) * t

    def mean(self, x0: Tensor, v0: Tensor | float, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of position and velocity at t; ``v0`` in units of ``v``."""
        u, root = expand(self.clock(t), x0), math.sqrt(self.mass)
        shrink = torch.exp(-u)
        w0 = v0 / root
        return (
            shrink * ((1 + u) * x0 + u * w0),
            shrink * root * ((1 - u) * w0 - u * x0),
        )

    def covariance(self, t: Tensor, position: Tensor | float, gamma: float) -> Covariance:
        """Covariance at t from independent position and velocity, of variances ``position`` and
        ``gamma M`` at 0; fields of ``t``'s shape, or ``position``'s and ``t``'s broadcast.

        ``1 - exp(-y)(1 + y + y^2/2)``, y = 2u, is the incomplete gamma function, which keeps its
        digits where y^3/6 is tiny.
        """
        u, root = self.clock(t).double(), math.sqrt(self.mass)
        y = 2 * u
        decay = torch.exp(-y)
        cube = torch.special.gammainc(torch.full_like(y, 3.0), y)
        xx = decay * ((1 + u) ** 2 * position + u**2 * gamma) + cube
        xv = decay * (u * (1 - u) * gamma - u * (1 + u) * position + 2 * u**2)
        vv = decay * (u**2 * position + (1 - u) ** 2 * gamma + y - 2 * u**2) - torch.expm1(-y)
        return Covariance(xx, root * xv, self.mass * vv)

    def velocity_score(self, network: Score) -> Score:
        """A network ``(state, t) -> (B, *event)`` for the velocity's score, as a score of states.

        The position's part is 0: no equation reads it, for G is 0 there.
        """

        def score(state: Tensor, t: Tensor) -> Tensor:
            velocity = network(state, t)
            return torch.stack([torch.zeros_like(velocity), velocity], 1)

        return score

    def exact(self, target: GaussianMixture) -> LangevinMixture:
        """The exact density, score and class posterior where positions are a mixture."""
        return LangevinMixture(self, target)


@dataclass(frozen=True)
class StationaryPrior:
    """``N(0, I)`` for the position, ``N(0, M I)`` for the velocity."""

    langevin: CriticallyDampedLangevin

    def sample(self, normal: Normals) -> Tensor:
        z = normal(0)
        return z * self._std(z)

    def log_prob(self, x: Tensor) -> Tensor:
        return GaussianPrior(self._std(x)).log_prob(x)

    def _std(self, like: Tensor) -> Tensor:
        return _per_part(like, 1.0, math.sqrt(self.langevin.mass))


@dataclass(frozen=True)
class StateTransition:
    """The kernel of a state given the whole state at 0: Gaussian, 2 x 2 per element."""

    langevin: CriticallyDampedLangevin

    def sample(self, x0: Tensor, t: Tensor, normal: Normals) -> Tensor:
        mean = self.langevin.mean(x0[:, 0], x0[:, 1], t)
        return _drawn(mean, self.langevin.covariance(t, 0.0, 0.0), normal)

    def score(self, x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        mean = self.langevin.mean(x0[:, 0], x0[:, 1], t)
        return _gaussian_score(x, mean, self.langevin.covariance(t, 0.0, 0.0))


@dataclass(frozen=True)
class HybridTransition:
    """The kernel of a state given the position at 0 alone: what hybrid score matching regresses on
    (Dockhorn et al. 2022, sec. 3.2). ``x0`` is ``(B, *event)``."""

    langevin: CriticallyDampedLangevin

    def sample(self, x0: Tensor, t: Tensor, normal: Normals) -> Tensor:
        covariance = self.langevin.covariance(t, 0.0, self.langevin.gamma)
        return _drawn(self.langevin.mean(x0, 0.0, t), covariance, normal)

    def score(self, x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        covariance = self.langevin.covariance(t, 0.0, self.langevin.gamma)
        return _gaussian_score(x, self.langevin.mean(x0, 0.0, t), covariance)

    def velocity_scale(self, t: Tensor) -> Tensor:
        """``1 / ell``: the standard deviation of the velocity given the position and ``x0``, of
        ``t``'s shape. The velocity's score is ``-eps_v / velocity_scale`` (sec. 3.2)."""
        covariance = self.langevin.covariance(t, 0.0, self.langevin.gamma)
        return torch.sqrt(covariance.determinant / covariance.xx)


def _per_part(state: Tensor, position: float, velocity: float) -> Tensor:
    """One number for positions and one for velocities, to multiply a state."""
    parts = state.new_tensor([position, velocity])
    return parts.reshape(1, 2, *(1,) * (state.ndim - 2))


def _drawn(mean: tuple[Tensor, Tensor], covariance: Covariance, normal: Normals) -> Tensor:
    """A Gaussian state by the Cholesky factor, velocity last."""
    z, other = normal(0).unbind(1)
    deviation = covariance.xx.sqrt()
    slope, rest = (
        covariance.xv / deviation,
        (covariance.determinant / covariance.xx).clamp_min(0).sqrt(),
    )
    x = mean[0] + _in(deviation, z) * z
    v = mean[1] + _in(slope, z) * z + _in(rest, z) * other
    return torch.stack([x, v], 1)


def _gaussian_score(x: Tensor, mean: tuple[Tensor, Tensor], covariance: Covariance) -> Tensor:
    position, velocity = x.unbind(1)
    spread = Covariance(*(_in(field, position) for field in covariance))
    pull = spread.solve((position - mean[0]).double(), (velocity - mean[1]).double())
    return -torch.stack(pull, 1).to(x.dtype)


def _in(field: Tensor, x: Tensor) -> Tensor:
    """A 0-d or ``(B,)`` float64 field that multiplies ``x`` without a loss of its own digits."""
    return field if field.ndim == 0 else field.reshape(field.shape + (1,) * (x.ndim - 1))


class LangevinMixture:
    """Everything exact where the data is a Gaussian mixture of positions ``(B, D)``; states
    ``(B, 2, D)``, times 0-d or ``(B,)``."""

    def __init__(self, langevin: CriticallyDampedLangevin, target: GaussianMixture) -> None:
        self.langevin = langevin
        self.target = target

    def sample(self, n: int, seed: int, t: float, label: int | None = None) -> Tensor:
        """``n`` exact states at ``t``, float64."""
        x0, _ = self.target.sample(n, seed, label, dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed + 1)
        z = torch.randn(n, 2, x0.shape[1], generator=generator, dtype=torch.float64)
        return self.langevin.hybrid().sample(x0, torch.tensor(t).double(), lambda slot: z)

    def log_prob(self, state: Tensor, t: Tensor) -> Tensor:
        """Log-density in nats, ``(B,)``."""
        return torch.logsumexp(self._joint(state, t)[0], 1).to(state.dtype)

    def score(self, state: Tensor, t: Tensor) -> Tensor:
        """The exact score, ``(B, 2, D)``."""
        joint, pull = self._joint(state, t)
        weight = torch.softmax(joint, 1)
        parts = [(weight[:, :, None] * self._outward(part)).sum(1) for part in pull]
        return -torch.stack(parts, 1).to(state.dtype)

    def log_posterior(self, label: int) -> LogDensity:
        """``log p(label | state at t)`` as ``(state, t) -> (B,)``: an exact classifier."""
        check_label(self.target, label)
        chosen = self.target.labels == label

        def log_posterior(state: Tensor, t: Tensor) -> Tensor:
            joint, _ = self._joint(state, t)
            one = torch.logsumexp(joint[:, chosen.to(joint.device)], 1)
            return (one - torch.logsumexp(joint, 1)).to(state.dtype)

        return log_posterior

    def _joint(self, state: Tensor, t: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """``log w_k N(state; k)`` ``(B, K)``, and the inverse covariance times the offset, in each
        component's eigenbasis, ``(B, K, D)`` twice."""
        if state.ndim != 3 or state.shape[1:] != (2, self.target.dimension):
            raise ValueError(
                f"state must have shape (B, 2, {self.target.dimension}), got {tuple(state.shape)}"
            )
        wide = state.double()
        means = self.target.means.to(wide)[None]
        times = t.double().reshape(-1, 1, 1).to(wide.device)
        spread = self.langevin.covariance(
            times, self.target.variances.to(wide)[None], self.langevin.gamma
        )
        centre = self.langevin.mean(means, 0.0, times)
        offset = [self._inward(wide[:, i, None, :] - centre[i]) for i in (0, 1)]
        pull = spread.solve(*offset)
        volume = 0.5 * spread.determinant.log().sum(-1) + wide.shape[2] * math.log(2 * math.pi)
        distance = (offset[0] * pull[0] + offset[1] * pull[1]).sum(-1)
        return self.target.weights.to(wide).log() - volume - 0.5 * distance, pull

    def _inward(self, offset: Tensor) -> Tensor:
        rotation = self.target.rotation
        if rotation is None:
            return offset
        return (offset[:, :, :, None] * rotation.to(offset)).sum(2)

    def _outward(self, pull: Tensor) -> Tensor:
        rotation = self.target.rotation
        if rotation is None:
            return pull
        return (pull[:, :, None, :] * rotation.to(pull)).sum(3)
