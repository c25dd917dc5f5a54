"""diffusers' schedulers, on our scores and our noise, with their own time discretisation.

Every linear SDE is one equation in ``y = x / alpha`` and ``s = sigma / alpha`` (Karras et al. 2022,
arXiv:2206.00364, sec. 2), so a scheduler of one convention serves them all. Those that keep a
variance-preserving state get ``y / sqrt(1 + s^2)`` and the chain ``alpha_bar_i = 1 / (1 + s_i^2)``;
those in sigma-space get ``y`` itself, and, where they take sigmas instead of a chain, our range of
``s``. The chain's levels are the SDE's at 1,000 even times (at its own where it is a table), from
``t_min`` to ``t_max``. Each evaluation is at the level whose ``s`` is the one the scheduler
computes with; timesteps, which it may have rounded, are not used.

The library is optional (extra ``peers``) and imported where it is used.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import math
import sys
import threading
from collections.abc import Iterator
from dataclasses import field, fields, make_dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from sde_diffusion.errors import unknown_name
from sde_diffusion.prediction import Prediction, ScoreFn
from sde_diffusion.sde import SDE, HostedLevel
from solvers.adapters.diffusers_kinds import PREFIX, SCHEDULERS, Kind
from solvers.adapters.diffusers_levels import chain_of, ratios_of, set_timesteps
from solvers.adapters.scaled import counting, evaluated_eps
from solvers.base import Integrator, Step, unbound
from solvers.noise import Noise
from solvers.solution import Solution

__all__ = ["PREFIX", "SCHEDULERS", "diffusers_scheduler", "installed", "scheduler_type"]
_LEAST_VARIANCE = 1e-6  # 1 - alpha_bar that float32 tells from 0 with an error of some per cent
# Fixed by the SDE: the chain, its range, and that it is no flow-matching path.
_GIVEN_BY_THE_SDE = frozenset({
    "beta_end", "beta_schedule", "beta_start", "flow_shift", "lambda_min_clipped",
    "num_train_timesteps", "rescale_betas_zero_snr", "shift_terminal", "sigma_max", "sigma_min",
    "time_shift_type", "trained_betas", "use_dynamic_shifting", "use_flow_sigmas",
})  # fmt: skip
_GIVEN_BY_THE_LOOP = frozenset({
    "generator", "model_output", "return_dict", "sample", "self", "timestep", "variance_noise",
})  # fmt: skip
# In place of the library's defaults that do not suit a general target (clipping), do not end at
# t_min (final level), or cannot make few steps (PNDM's Runge-Kutta start).
_OUR_DEFAULTS = {
    "clip_sample": False,
    "final_sigmas_type": "sigma_min",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}


def installed() -> bool:
    """Whether diffusers can be imported."""
    return importlib.util.find_spec("diffusers") is not None


class _DiffusersScheduler(Integrator):
    """A scheduler of diffusers as an Integrator.

    A run of n steps makes n of the scheduler's steps, from ``t_max`` down to ``t_min``: its own
    discretisation, of which the times given set nothing but the two ends and n. A last step that
    would start at ``t_min`` (towards sigma = 0, or to the same level once more) is not taken:
    ``denoise=True`` does the former for all solvers alike. A scheduler that jumps to sigma = 0 from
    above ``t_min`` ends there, and ``stats["end_sigma_over_alpha"]`` is 0.

    Settings are those of the scheduler's constructor and of its ``step``, with the library's
    defaults; but nothing is clipped, DDIM, PNDM and DDPM start at the chain's last level, and runs
    end at its first.
    """

    scheduler: ClassVar[str]
    adaptive = False

    def __post_init__(self) -> None:
        self._made(torch.linspace(0.1, 0.2, 10, dtype=torch.float64))  # its own checks of settings

    def __reduce__(self) -> tuple[Any, ...]:
        return _remade, (self.scheduler, self.settings())

    @property
    def order(self) -> int:
        declared = SCHEDULERS[self.scheduler].order
        return getattr(self, declared) if isinstance(declared, str) else declared

    @property
    def stochastic(self) -> bool:
        if SCHEDULERS[self.scheduler].stochastic:
            return True
        sde_variant = str(getattr(self, "algorithm_type", "")).startswith("sde-")
        return sde_variant or any(getattr(self, name, 0) > 0 for name in ("eta", "s_churn"))

    def settings(self) -> dict[str, Any]:
        """All settings by name."""
        return {item.name: getattr(self, item.name) for item in fields(self)}  # type: ignore[arg-type]

    def solve(
        self, score_fn: ScoreFn, sde: SDE, x: Tensor, times: Tensor, noise: Noise
    ) -> Solution:
        counted = counting(score_fn)
        nfe, passes = counted.nfe, counted.network_passes
        chain = chain_of(sde, times)
        scheduler, kind = self._made(chain), SCHEDULERS[self.scheduler]
        taken = set_timesteps(scheduler, kind, self.scheduler, len(times) - 1, x.device)
        x, ratios = self._run(scheduler, counted, sde, x, times, noise, taken)
        path = sde.time(-torch.tensor(ratios, dtype=torch.float64).clamp_min(1e-300).log())
        path = path.clamp(times[-1], times[0])
        path[0], path[-1] = times[0], times[-1]
        return Solution(
            x,
            counted.nfe - nfe,
            counted.network_passes - passes,
            path,
            stats={"accepted": len(path) - 1, "end_sigma_over_alpha": ratios[-1]},
        )

    def _run(
        self,
        scheduler: Any,
        score_fn: ScoreFn,
        sde: SDE,
        x: Tensor,
        times: Tensor,
        noise: Noise,
        taken: int,
    ) -> tuple[Tensor, list[float]]:
        """The state at the end, and ``sigma / alpha`` at every step's start and at the end."""
        kind = SCHEDULERS[self.scheduler]
        options = {name: getattr(self, name) for name in _step_settings(self.scheduler)}
        ends = [level.half_log_snr.item() for level in unbound(sde.at(times[[0, -1]]), x.device)]

        def level_of(ratio: float) -> HostedLevel:
            half_log_snr = torch.tensor([-math.log(ratio) if ratio > 0 else math.inf])
            inside = half_log_snr.double().clamp(*ends)
            return unbound(sde.at(sde.time(inside)), x.device)[0]

        kept = _Kept(score_fn)
        ratios: list[float] = []
        state, following, end = x, math.nan, level_of(1.0)
        for call in range(taken):
            ratio, following = ratios_of(scheduler, kind, call)
            level, end = level_of(ratio), level_of(following)
            if not ratios:
                state = _into(kind, x, level)
            if getattr(scheduler, "state_in_first_order", True) and ratio not in ratios[-1:]:
                ratios.append(ratio)
            timestep = scheduler.timesteps[call]
            scheduler.is_scale_input_called = True  # the score takes x as it is
            at = _out_of(kind, state, level, ratio).to(x.dtype)
            evaluated_eps(kept, at, level, len(ratios) - 1)
            output = _output(scheduler, kind, kept.prediction, state, ratio)
            step = Step(len(ratios) - 1, level, end)
            with _drawing(scheduler, noise, x, step, len(ratios) - 1):
                state = scheduler.step(output, timestep, state, **options).prev_sample
        ratios.append(following)
        if following == 0:  # the state is the estimate of x_0 itself, on either scale
            return state.to(x.dtype), ratios
        return _out_of(kind, state, end, following).to(x.dtype), ratios

    def _made(self, chain: Tensor) -> Any:
        """The scheduler for a chain of ``sigma / alpha``, increasing."""
        import diffusers

        scheduler_type = getattr(diffusers, self.scheduler)
        settings = self.settings()
        constructor = {name: settings[name] for name in _constructor_settings(self.scheduler)}
        if SCHEDULERS[self.scheduler].space == "edm":
            ends = {"sigma_min": chain[0].item(), "sigma_max": chain[-1].item()}
            return scheduler_type(**ends, **constructor)
        if chain[0] ** 2 < _LEAST_VARIANCE:
            raise ValueError(
                f"sigma / alpha at t_min is {chain[0].item():.1e}, which {PREFIX}{self.scheduler} "
                f"cannot hold: it keeps alpha_bar in float32; raise the SDE's t_min to where it is "
                f"{math.sqrt(_LEAST_VARIANCE):g}, or use {PREFIX}EDMDPMSolverMultistepScheduler"
            )
        log_alpha_bar = torch.cat([chain.new_zeros(1), -torch.log1p(chain**2)])
        betas = -torch.expm1(log_alpha_bar.diff())
        return scheduler_type(
            num_train_timesteps=len(chain), trained_betas=betas.numpy(), **constructor
        )


class _Kept:
    """A score function that keeps its prediction, in whatever form it came."""

    def __init__(self, score_fn: ScoreFn) -> None:
        self._score_fn = score_fn
        self.prediction: Prediction

    def __call__(self, x: Tensor, level: Any) -> Prediction:
        self.prediction = self._score_fn(x, level)
        return self.prediction


def diffusers_scheduler(name: str, **settings: Any) -> Integrator:
    """``diffusers_scheduler("UniPCMultistepScheduler", solver_order=3, use_karras_sigmas=True)``.

    Args:
        name: a scheduler class, one of ``SCHEDULERS``.
        settings: those of its constructor, but for what the SDE gives (betas, sigma range), and of
            its ``step`` (``eta``, ``s_churn``, ``order``).
    Raises:
        ValueError: unknown scheduler or setting, with the nearest match; values the scheduler
            refuses.
        ImportError: diffusers is not installed.
    """
    kind = scheduler_type(name)
    known = [item.name for item in fields(kind)]  # type: ignore[arg-type]
    for setting in settings:
        if setting not in known:
            raise unknown_name(f"setting of {name}", setting, known)
    return kind(**settings)


@cache
def scheduler_type(name: str) -> type[Integrator]:
    """The Integrator for a scheduler class: a frozen dataclass of its settings."""
    if name not in SCHEDULERS:
        raise unknown_name("diffusers scheduler", name, SCHEDULERS)
    if not installed():
        raise ImportError(
            f"{PREFIX}{name} needs diffusers: install the extra 'peers', "
            "pip install 'sde-diffusion[peers]'"
        )
    kind = SCHEDULERS[name]
    items: list[Any] = []
    for setting, parameter in {**_constructor_settings(name), **_step_settings(name)}.items():
        default = _OUR_DEFAULTS.get(setting, parameter.default)
        if setting == "timestep_spacing":
            default = kind.spacing or default
        if isinstance(default, list):
            default = tuple(default)
        items.append((setting, parameter.annotation, field(default=default)))
    made = make_dataclass(
        name, items, bases=(_DiffusersScheduler,), frozen=True, namespace={"scheduler": name}
    )
    made.__doc__ = f"diffusers' {name}, its own time discretisation on our scores and noise."
    made.catalogue_name = PREFIX + name  # type: ignore[attr-defined]
    return made


def _remade(name: str, settings: dict[str, Any]) -> Integrator:
    return diffusers_scheduler(name, **settings)


@cache
def _constructor_settings(name: str) -> dict[str, inspect.Parameter]:
    import diffusers

    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    return {k: p for k, p in parameters.items() if k != "self" and k not in _GIVEN_BY_THE_SDE}


@cache
def _step_settings(name: str) -> dict[str, inspect.Parameter]:
    import diffusers

    parameters = inspect.signature(getattr(diffusers, name).step).parameters
    return {k: p for k, p in parameters.items() if k not in _GIVEN_BY_THE_LOOP}


def _into(kind: Kind, x: Tensor, level: HostedLevel) -> Tensor:
    """Our state at a level in the scheduler's convention."""
    y = x / level.alpha.to(x.dtype)
    return y / math.sqrt(1 + level.host_ratio**2) if kind.space == "vp" else y


def _out_of(kind: Kind, state: Tensor, level: HostedLevel, ratio: float) -> Tensor:
    """The scheduler's state at a level in ours."""
    y = state * math.sqrt(1 + ratio**2) if kind.space == "vp" else state
    return y * level.alpha.to(y.dtype)


def _output(
    scheduler: Any, kind: Kind, prediction: Prediction, state: Tensor, ratio: float
) -> Tensor:
    """The prediction in the parametrisation the scheduler expects."""
    if kind.space == "edm":
        data = scheduler.config.sigma_data
        spread = math.sqrt(ratio**2 + data**2)
        sign = -1 if scheduler.config.prediction_type == "v_prediction" else 1
        skip, out = (data / spread) ** 2, sign * ratio * data / spread
        return (prediction.x0 - skip * state) / out
    expected = scheduler.config.prediction_type
    if expected == "sample":
        return prediction.x0
    if expected == "v_prediction":
        return (prediction.eps - ratio * prediction.x0) / math.sqrt(1 + ratio**2)
    if expected == "epsilon":
        return prediction.eps
    raise ValueError(f"prediction_type {expected!r} has no meaning for these SDEs; use 'epsilon'")


_PATCHING = threading.RLock()


@contextlib.contextmanager
def _drawing(scheduler: Any, noise: Noise, x: Tensor, step: Step, index: int) -> Iterator[None]:
    """While it lasts, the scheduler's draws are ours: draw k of a step is slot k.

    The schedulers draw by their module's ``randn_tensor``; not all take noise as an argument.
    """
    module: Any = sys.modules[type(scheduler).__module__]
    original = getattr(module, "randn_tensor", None)
    if original is None:  # draws no noise
        yield
        return
    drawn = scheduler.__dict__.setdefault("_slots_drawn", {})

    def draw(shape: Any, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Tensor:
        slot = drawn.get(index, 0)
        drawn[index] = slot + 1
        return noise(x, step, slot).reshape(tuple(shape)).to(dtype or x.dtype)

    with _PATCHING:
        module.randn_tensor = draw
        try:
            yield
        finally:
            module.randn_tensor = original
