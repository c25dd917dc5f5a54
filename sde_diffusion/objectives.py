"""What one training step minimises, by name: a loss and the law of its times.

A step draws, from one generator and in this order, the samples, the labels that are dropped, the
times (``objective.times``) and the noise, and averages ``objective.loss`` over the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sde_diffusion.broadcast import expand
from sde_diffusion.discrete_bound import ChainTimes, VLBLoss, require_chain
from sde_diffusion.errors import require_count, require_finite, unknown_name
from sde_diffusion.losses import (
    Loss,
    TimeSampler,
    edm_loss,
    log_normal_times,
    mean_square,
    perturbed,
    simple_loss,
    stratified,
    uniform_log_snr_times,
    uniform_times,
)
from sde_diffusion.parametrization import (
    EDMModel,
    EpsModel,
    ParametrizedModel,
    ScoreModel,
    VModel,
    X0Model,
    no_time,
)
from sde_diffusion.score_matching import explicit_loss
from sde_diffusion.sde import SDE, NoiseLevel

__all__ = [
    "OBJECTIVES",
    "PARAMETRIZATIONS",
    "GeometricLadder",
    "MinSNRLoss",
    "Objective",
    "Scaled",
    "even_times",
    "likelihood_objective",
    "named_objective",
    "parametrized",
    "v_loss",
    "x0_loss",
]


@dataclass(frozen=True)
class Objective:
    """What one training step minimises.

    Attributes:
        loss: ``(model, x0, label, level, noise) -> (B,)``.
        times: ``(n, sde, generator) -> (n,)``.
    """

    loss: Loss
    times: TimeSampler


def parametrized(
    name: str, net: nn.Module, sde: SDE, *, sigma_data: float = 0.5
) -> ParametrizedModel:
    """The network as a model of the kind called ``name``: one of ``PARAMETRIZATIONS``.

    Args:
        sigma_data: root mean square of the data; for ``edm`` alone, ignored by the others.

    Raises:
        ValueError: an unknown name (the nearest one is named), or sigma_data not above 0.
    """
    if name not in _MODELS:
        raise unknown_name("parametrization", name, _MODELS)
    if name == "edm":
        return EDMModel(net, sde, sigma_data=sigma_data)
    return _MODELS[name](net, sde)


_MODELS: dict[str, Callable[..., ParametrizedModel]] = {
    "eps": EpsModel,
    "x0": X0Model,
    "v": VModel,
    "score": ScoreModel,
    "edm": EDMModel,
    "ncsnv2": partial(ScoreModel, divide_by_sigma=True, time_label=no_time),
}

PARAMETRIZATIONS: dict[str, str] = {
    "eps": "the noise (Ho et al. 2020)",
    "x0": "the clean sample",
    "v": "alpha eps - sigma x0 (Salimans & Ho 2022)",
    "score": "the score itself; its target has variance 1/sigma^2",
    "edm": "EDM's preconditioning (Karras et al. 2022)",
    "ncsnv2": "F(x) / sigma with F blind to sigma (Song & Ermon 2020)",
}
"""What a network may predict, by name."""


def even_times(sde: SDE) -> TimeSampler:
    """Uniform in t where the signal is scaled down (VP and its kin), else uniform in log-SNR.

    The two are the same on VE; on EDM, where t is sigma, uniform times would nearly all be noise.
    """
    scales_down = float(sde.at(sde.t_max).alpha) < 0.5
    return uniform_times if scales_down else uniform_log_snr_times


def v_loss(
    model: ParametrizedModel, x0: Tensor, label: Tensor | None, level: NoiseLevel, noise: Tensor
) -> Tensor:
    """``||v_theta - v||^2 / D`` per sample, (B,), with ``v = alpha eps - sigma x0``.

    On VP it is the simple loss weighted by ``1 + SNR`` at x0 (Salimans & Ho 2022, section 4).
    """
    prediction = model(perturbed(x0, level, noise), level, label)
    return mean_square(prediction.v - _velocity(x0, level, noise))


def x0_loss(
    model: ParametrizedModel, x0: Tensor, label: Tensor | None, level: NoiseLevel, noise: Tensor
) -> Tensor:
    """``||x0_theta - x_0||^2 / D`` per sample, (B,)."""
    return mean_square(model(perturbed(x0, level, noise), level, label).x0 - x0)


def _velocity(x0: Tensor, level: NoiseLevel, noise: Tensor) -> Tensor:
    return expand(level.alpha, x0) * noise - expand(level.sigma, x0) * x0


@dataclass(frozen=True)
class Scaled:
    """A constant times a loss."""

    loss: Loss
    factor: float

    def __call__(self, *arguments: Any) -> Tensor:
        """What the loss is called with."""
        return self.factor * self.loss(*arguments)


@dataclass(frozen=True)
class MinSNRLoss:
    """``min(SNR, gamma) ||x0_theta - x_0||^2 / D`` per sample, (B,); ``SNR = (alpha/sigma)^2``.

    Hang et al. 2023, arXiv:2303.09556, eq. 8. The one loss is computed on whatever the network
    predicts, so that no form is divided by a vanishing alpha or sigma: the weight is
    ``min(SNR, gamma)`` on x0, ``min(SNR, gamma) / SNR`` on eps, and
    ``min(SNR, gamma) sigma^2 / (alpha^2 + sigma^2)^2`` on v, which is ``min(SNR, gamma) /
    (SNR + 1)`` under VP.
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        require_finite("gamma", self.gamma, above=0.0)

    def __call__(
        self,
        model: ParametrizedModel,
        x0: Tensor,
        label: Tensor | None,
        level: NoiseLevel,
        noise: Tensor,
    ) -> Tensor:
        prediction = model(perturbed(x0, level, noise), level, label)
        snr = torch.exp(2 * level.half_log_snr)
        if isinstance(model, VModel):
            error = prediction.v - _velocity(x0, level, noise)
            total = level.alpha**2 + level.sigma**2
            weight = snr.clamp_max(self.gamma) * level.sigma**2 / total**2
        elif isinstance(model, X0Model | EDMModel):
            error, weight = prediction.x0 - x0, snr.clamp_max(self.gamma)
        else:
            error, weight = prediction.eps - noise, (self.gamma / snr).clamp_max(1.0)
        loss = mean_square(error)
        return weight.to(loss.dtype) * loss


@dataclass(frozen=True)
class GeometricLadder:
    """Times of ``levels`` noise levels in geometric progression, each as likely as the others.

    ``sigma / alpha`` runs from its value at t_min to that at t_max, both included, as NCSN's
    sigmas do (Song & Ermon 2019, arXiv:1907.05600, section 4.2). A batch is spread evenly over the
    ladder.
    """

    levels: int = 100

    def __post_init__(self) -> None:
        require_count("levels", self.levels, least=2)

    def rungs(self, sde: SDE) -> Tensor:
        """The ladder's times, increasing, (levels,) float64."""
        top, bottom = (float(sde.at(float(t)).half_log_snr) for t in (sde.t_min, sde.t_max))
        times = sde.time(torch.linspace(top, bottom, self.levels, dtype=torch.float64))
        return times.clamp(sde.t_min, sde.t_max)

    def __call__(self, n: int, sde: SDE, generator: torch.Generator) -> Tensor:
        index = (self.levels * stratified(n, generator)).long().clamp_max(self.levels - 1)
        return self.rungs(sde).to(index.device)[index].float()


def _simple(model: ParametrizedModel, sde: SDE) -> Objective:
    return Objective(simple_loss, even_times(sde))


def _v(model: ParametrizedModel, sde: SDE) -> Objective:
    return Objective(v_loss, even_times(sde))


def _x0(model: ParametrizedModel, sde: SDE) -> Objective:
    return Objective(x0_loss, even_times(sde))


def _edm(model: ParametrizedModel, sde: SDE, *, mean: float = -1.2, std: float = 1.2) -> Objective:
    if not isinstance(model, EDMModel):
        raise ValueError(
            f"objective 'edm' needs an EDM-preconditioned network, got {type(model).__name__}; "
            "use parametrization 'edm', or objective 'simple'"
        )
    require_finite("mean", mean)
    require_finite("std", std, above=0.0)
    return Objective(edm_loss, partial(log_normal_times, mean=mean, std=std))


def likelihood_objective(sde: SDE) -> Objective:
    """``g^2 / sigma^2 ||eps_theta - eps||^2 / D`` at uniform t, in expectation, from better times.

    Times have density ``p(t) = (g^2 / sigma^2) / Z`` (Song et al. 2021, "Maximum likelihood
    training of score-based diffusion models", arXiv:2101.09258, section 4.3), so the weight that
    remains is the constant ``Z / (t_max - t_min)``. For every linear SDE ``g^2 / sigma^2 = -2 d
    half_log_snr / dt``: hence ``Z = 2 (half_log_snr(t_min) - half_log_snr(t_max))``, and the
    inverse of the distribution function is that of ``half_log_snr``, so that nothing is integrated
    numerically. ``(t_max - t_min) D / 2`` times the mean is the integral in the bound on
    ``-log p``, in nats (their theorem 1).
    """
    top, bottom = (float(sde.at(float(t)).half_log_snr) for t in (sde.t_min, sde.t_max))
    factor = 2 * (top - bottom) / (sde.t_max - sde.t_min)
    return Objective(Scaled(simple_loss, factor), uniform_log_snr_times)


def _likelihood(model: ParametrizedModel, sde: SDE) -> Objective:
    return likelihood_objective(sde)


def _min_snr(model: ParametrizedModel, sde: SDE, *, gamma: float = 5.0) -> Objective:
    return Objective(MinSNRLoss(gamma), even_times(sde))


def _ncsn(model: ParametrizedModel, sde: SDE, *, levels: int = 100) -> Objective:
    # sigma^2 / 2 ||s + eps / sigma||^2 = ||eps_theta - eps||^2 / 2.
    return Objective(Scaled(simple_loss, 0.5), GeometricLadder(levels))


def _explicit(model: ParametrizedModel, sde: SDE) -> Objective:
    return Objective(explicit_loss, even_times(sde))


def _discrete_simple(model: ParametrizedModel, sde: SDE) -> Objective:
    return Objective(simple_loss, ChainTimes(require_chain(sde, "objective 'discrete_simple'")))


def _vlb(
    model: ParametrizedModel, sde: SDE, *, variance: str = "small", bins: int = 256
) -> Objective:
    chain = require_chain(sde, "objective 'vlb'")
    return Objective(VLBLoss(chain, variance, bins), ChainTimes(chain))


def _hybrid(
    model: ParametrizedModel,
    sde: SDE,
    *,
    variance: str = "small",
    bins: int = 256,
    weight: float = 1e-3,
) -> Objective:
    chain = require_chain(sde, "objective 'hybrid'")
    return Objective(VLBLoss(chain, variance, bins, simple=1.0, weight=weight), ChainTimes(chain))


_MAKERS: dict[str, Callable[..., Objective]] = {
    "simple": _simple,
    "v": _v,
    "x0": _x0,
    "edm": _edm,
    "likelihood": _likelihood,
    "min_snr": _min_snr,
    "ncsn": _ncsn,
    "explicit": _explicit,
    "discrete_simple": _discrete_simple,
    "vlb": _vlb,
    "hybrid": _hybrid,
}

OBJECTIVES: dict[str, str] = {
    "simple": "squared error of eps, times uniform (Ho et al. 2020)",
    "v": "squared error of v, times uniform (Salimans & Ho 2022)",
    "x0": "squared error of x0, times uniform",
    "edm": "EDM's weight, log(sigma/alpha) normal with mean and std (Karras et al. 2022)",
    "likelihood": "weight g^2 as a bound on -log p, times drawn in proportion (Song et al. 2021)",
    "min_snr": "squared error of x0 weighted by min(SNR, gamma) (Hang et al. 2023)",
    "ncsn": "sigma^2-weighted score matching on a geometric ladder of levels (Song & Ermon 2019)",
    "explicit": "explicit score matching with the exact trace, for small models (Hyvärinen 2005)",
    "discrete_simple": "squared error of eps at a DDPM chain's own steps (Ho et al. 2020, eq. 14)",
    "vlb": "a DDPM chain's full variational bound, one step of it per sample (Ho et al. 2020)",
    "hybrid": "discrete_simple + weight * vlb (Nichol & Dhariwal 2021)",
}
"""The training objectives, by name."""


def named_objective(name: str, model: ParametrizedModel, sde: SDE, **settings: Any) -> Objective:
    """The objective called ``name``: one of ``OBJECTIVES``.

    Settings: ``edm``: mean=-1.2, std=1.2; ``min_snr``: gamma=5.0; ``ncsn``: levels=100; ``vlb``:
    variance="small" or "large", bins=256 (brightness levels of the data in [-1, 1]); ``hybrid``:
    these and weight=1e-3. ``discrete_simple``, ``vlb`` and ``hybrid`` need a `TabulatedVPSDE`.

    Raises:
        ValueError: an unknown name or setting (the nearest is named), a value out of range, or an
            objective that does not fit the model or the SDE.
    """
    if name not in _MAKERS:
        raise unknown_name("objective", name, _MAKERS)
    make = _MAKERS[name]
    known = [
        parameter.name
        for parameter in inspect.signature(make).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
    for setting in settings:
        if not known:
            raise ValueError(f"objective {name!r} has no settings, got {setting!r}; leave it out")
        if setting not in known:
            raise unknown_name(f"setting of objective {name!r}", setting, known)
    return make(model, sde, **settings)
