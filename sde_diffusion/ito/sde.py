"""A general Ito SDE: any drift, any diffusion, by functions of state and time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from sde_diffusion.broadcast import expand
from sde_diffusion.errors import require_finite, unknown_name
from sde_diffusion.ito.calculus import acts_elementwise, covariance_divergence
from sde_diffusion.ito.fields import KINDS, Field, Kind, Score, misfit
from sde_diffusion.ito.laws import GaussianPrior, Prior, ScaledTransition, Transition
from sde_diffusion.sde import SDE

if TYPE_CHECKING:
    from sde_diffusion.ito.equations import Forward, Reverse

Coordinates = Literal["state", "log", "reflected", "sqrt"]
COORDINATES: tuple[Coordinates, ...] = (
    "state",
    "log",
    "reflected",
    "sqrt",
)


@dataclass(frozen=True)
class ItoSDE:
    """``dx = f(x, t) dt + G(x, t) dw`` on ``[0, t_max]``, in the sense of Ito.

    Args:
        drift: f, ``(x, t) -> (B, *event)``; see ``sde_diffusion.ito.fields`` for what a field is.
        diffusion: G, ``(x, t)`` to a shape that ``kind`` says.
        kind: ``isotropic``, ``diagonal``, ``scalar`` (one motion for all) or ``general``.
        state_dependent: whether G depends on x; if not, ``div G G^T`` is 0 and is not computed.
        t_min: where sampling ends, at least 0; the score may be infinite at 0.
        t_max: where the prior is taken.
        prior: the law at ``t_max``.
        transition: the law of x_t given x_0, where it is known.
        divergence: ``div G G^T``, ``(x, t) -> (B, *event)``; by autograd where not given.
        coordinates: ``state``; or, where the state is positive elementwise, what it is solved in so
            that it stays so: ``log``, ``sqrt``, or ``reflected``, which is x itself, for drifts
            that are finite at 0 and would not be in the others.
    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """

    drift: Field
    diffusion: Field
    kind: Kind = "diagonal"
    state_dependent: bool = True
    t_min: float = 1e-3
    t_max: float = 1.0
    prior: Prior | None = None
    transition: Transition | None = None
    divergence: Field | None = None
    coordinates: Coordinates = "state"

    def __post_init__(self) -> None:
        for name in ("drift", "diffusion", "divergence"):
            value = getattr(self, name)
            if not callable(value) and not (name == "divergence" and value is None):
                raise TypeError(f"{name} must be callable, (x, t) -> Tensor, got {value!r}")
        if self.kind not in KINDS:
            raise unknown_name("kind", self.kind, KINDS)
        if self.coordinates not in COORDINATES:
            raise unknown_name("coordinates", self.coordinates, COORDINATES)
        require_finite("t_max", self.t_max, above=0.0)
        require_finite("t_min", self.t_min)
        if not 0 <= self.t_min < self.t_max:
            raise ValueError(
                f"t_min must lie in [0, t_max={self.t_max!r}), got t_min={self.t_min!r}"
            )

    @classmethod
    def from_linear(cls, sde: SDE) -> ItoSDE:
        """A linear SDE in this form: ``G = sqrt(g2(t)) I``, its prior and its kernel."""

        def scales(t: Tensor) -> tuple[Tensor, Tensor]:
            level = sde.at(t)
            return level.alpha, level.sigma

        def drift(x: Tensor, t: Tensor) -> Tensor:
            return expand(sde.at(t).f, x) * x

        return cls(
            drift,
            lambda x, t: sde.at(t).g2.sqrt(),
            kind="isotropic",
            state_dependent=False,
            t_min=float(sde.t_min),
            t_max=float(sde.t_max),
            prior=GaussianPrior(sde.prior_std()),
            transition=ScaledTransition(scales),
        )

    def forward(self) -> Forward:
        """The SDE itself, from 0 to ``t_max``, as ``solvers.sample_ito`` takes it."""
        from sde_diffusion.ito.equations import Forward

        return Forward(self)

    def reverse(
        self,
        score: Score,
        guidance: Score | None = None,
        scale: float | Tensor = 1.0,
        eta: float = 1.0,
    ) -> Reverse:
        """Anderson's reverse SDE from ``t_max`` to ``t_min``; see ``Reverse``."""
        from sde_diffusion.ito.equations import Reverse

        return Reverse(self, score, guidance, scale, eta)

    def flow(
        self, score: Score, guidance: Score | None = None, scale: float | Tensor = 1.0
    ) -> Reverse:
        """The probability-flow ODE from ``t_max`` to ``t_min``: ``reverse`` with ``eta=0``."""
        return self.reverse(score, guidance, scale, eta=0.0)

    @property
    def positive(self) -> bool:
        """Whether the state is positive elementwise."""
        return self.coordinates != "state"

    def covariance_divergence(self, x: Tensor, t: Tensor) -> Tensor | None:
        """``div G G^T`` at ``(x, t)``, of ``x``'s shape; ``None`` where it is 0 throughout."""
        if self.divergence is not None:
            return self.divergence(x, t)
        if not self.state_dependent:
            return None
        return covariance_divergence(self.diffusion, self.kind, x, t)

    def check(self, x: Tensor, t: float) -> None:
        """Raise ``ValueError`` unless the fields fit a state ``x`` and each other, at ``t``.

        Shapes, and whether a diagonal G's elements depend on their own element of x alone.
        """
        if not len(x):
            return
        x = x[:4].detach()
        at = time_tensor(t, x)
        drift, g = self.drift(x, at), self.diffusion(x, at)
        if drift.shape != x.shape:
            raise ValueError(
                f"drift gave shape {tuple(drift.shape)} for x of shape {tuple(x.shape)}; "
                "it must have the shape of x"
            )
        if (expected := misfit(self.kind, g, x)) is not None:
            raise ValueError(
                f"diffusion of kind {self.kind!r} must have shape {expected} for x of shape "
                f"{tuple(x.shape)}, got {tuple(g.shape)}; or declare another kind"
            )
        elementwise = self.kind != "diagonal" or not self.state_dependent
        if not elementwise and not acts_elementwise(self.diffusion, x, at):
            raise ValueError(
                "diffusion of kind 'diagonal' must have g_i depend on x_i alone, and here it "
                "depends on other elements: declare kind='general', with (B, D, D) matrices"
            )


def time_tensor(t: float | Tensor, x: Tensor) -> Tensor:
    """A time as a 0-d tensor on ``x``'s device, in float64 where it has it."""
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    return torch.as_tensor(t, dtype=wide, device=x.device)
