"""A user's function as a solver: ``package.module:name``, on our scores, noise and counting.

Two forms of function are known, told apart by what they must be given.

* ``sampler(model, x, sigmas, ...)``, as k-diffusion's (github.com/crowsonkb/k-diffusion): ``x`` is
  the state over alpha, ``sigmas`` decreasing values of ``sigma / alpha``, and ``model(x, sigma)``,
  sigma 0-d or ``(B,)``, the estimate of x_0. In these coordinates every linear SDE is the
  variance-exploding one with the clock ``sigma / alpha`` (Karras et al. 2022, arXiv:2206.00364,
  sec. 2), so that one convention serves all. ``noise_sampler(sigma, sigma_next)`` is given where
  the function takes it; ``extra_args``, ``callback`` and ``disable`` keep their defaults.
* ``sampler(score_fn, sde, x, times, noise, ...)``, in this package's own terms, as
  ``Integrator.solve``, but the state is what it returns.

Parameters with a default that is a number, a word, a truth value or None are settings.

``sigmas`` are those of the run's grid and end at ``t_min``, as every solver's do; k-diffusion's end
with a zero, which the setting ``append_zero`` adds. Levels beyond the SDE's range are evaluated at
its end. What is the same method gives the same samples to rounding; ``sample_dpmpp_2m`` is not
quite ``DPMSolverPP(2)``, whose docstring says by what.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, make_dataclass
from functools import cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sde_diffusion.broadcast import expand
from sde_diffusion.errors import NonFiniteError
from sde_diffusion.importing import imported
from sde_diffusion.prediction import Prediction, ScoreFn
from sde_diffusion.schedules import VPSDE
from sde_diffusion.sde import SDE, HostedLevel, NoiseLevel
from solvers.adapters.foreign_noise import GENERATOR, PatchedNormals, seeded
from solvers.adapters.scaled import counting
from solvers.base import Integrator, Step, unbound
from solvers.noise import CounterNoise, Noise
from solvers.solution import Solution

Style = Literal["sigmas", "times"]
_REQUIRED: dict[int, Style] = {3: "sigmas", 5: "times"}
_GIVEN = frozenset({"extra_args", "callback", "disable", "noise_sampler"})
FORMS = (
    "called (model, x, sigmas, ...), as k-diffusion's are, or (score_fn, sde, x, times, noise, ...)"
)


@dataclass(frozen=True)
class _Info:
    """What was named, and how it is called."""

    path: str
    function: Callable[..., Any]
    style: Style
    takes_noise: bool


@dataclass(frozen=True)
class _Draws:
    """What noise a function was seen to draw.

    Attributes:
        matters: its result depends on the noise.
        patched: it calls ``torch.randn_like`` of the state, which is answered with our noise.
        foreign: it draws from torch's generator otherwise.
    """

    matters: bool
    patched: bool
    foreign: bool


class _CallableSampler(Integrator):
    """A user's function as an Integrator.

    ``order`` is the function's attribute of that name, 0 (which claims none) without one, or a
    setting called so. ``stochastic`` is its attribute, else measured on a Gaussian; ``adaptive`` is
    its attribute, else false.
    """

    info: ClassVar[_Info]

    def __reduce__(self) -> tuple[Any, ...]:
        values = {item.name: getattr(self, item.name) for item in fields(self)}  # type: ignore[arg-type]
        return _remade, (self.info.path, values)

    @property
    def order(self) -> int:
        return int(getattr(self.info.function, "order", 0))

    @property
    def stochastic(self) -> bool:
        declared = getattr(self.info.function, "stochastic", None)
        if declared is not None:
            return bool(declared)
        draws = _draws(self)
        return self.info.takes_noise if draws is None else draws.matters

    @property
    def adaptive(self) -> bool:
        return bool(getattr(self.info.function, "adaptive", False))

    @property
    def depends_on_batch(self) -> bool:
        """Whether it draws from torch's generator, so that a sample depends on its batch."""
        draws = _draws(self)
        return draws is not None and draws.foreign and draws.matters

    def solve(
        self, score_fn: ScoreFn, sde: SDE, x: Tensor, times: Tensor, noise: Noise
    ) -> Solution:
        """As every Integrator's.

        Raises:
            TypeError: the function returned no tensor of the state's shape.
            NonFiniteError: it returned NaN or infinity.
            Exception: whatever the function raises.
        """
        draws = _draws(self)
        if draws is not None and not (draws.patched or draws.foreign):
            return self.solved(score_fn, sde, x, times, noise)
        with PatchedNormals(x) as patched:
            if draws is not None and not draws.foreign:
                return self.solved(score_fn, sde, x, times, noise, patched)
            with seeded(x, sde, times, noise):
                solution = self.solved(score_fn, sde, x, times, noise, patched)
        solution.stats["depends_on_batch"] = self.depends_on_batch
        return solution

    def solved(
        self,
        score_fn: ScoreFn,
        sde: SDE,
        x: Tensor,
        times: Tensor,
        noise: Noise,
        patched: PatchedNormals | None = None,
    ) -> Solution:
        """``solve`` as the function does it; ``patched`` is told where noise comes from."""
        counted = counting(score_fn)
        nfe, passes = counted.nfe, counted.network_passes
        settings = {item.name: getattr(self, item.name) for item in fields(self)}  # type: ignore[arg-type]
        levels = unbound(sde.at(times), x.device)
        source = _Source(x, sde, times, levels, noise)
        if patched is not None:
            patched.source = source.draw
        if self.info.style == "times":
            found = self.info.function(counted, sde, x, times, noise, **settings)
            scale: float | Tensor = 1.0
        else:
            ratios = [level.host_ratio for level in levels]
            if settings.pop("append_zero"):
                ratios.append(0.0)
            if self.info.takes_noise:
                settings["noise_sampler"] = source
            sigmas = torch.tensor(ratios, dtype=torch.float64).to(device=x.device, dtype=x.dtype)
            model = _Denoiser(counted, source)
            found = self.info.function(model, x / _alpha(levels[0], x), sigmas, **settings)
            scale = 1.0 if ratios[-1] == 0 else _alpha(levels[-1], x)
        self._check(found, x, times)
        return Solution(
            (found * scale).to(x.dtype),
            counted.nfe - nfe,
            counted.network_passes - passes,
            times,
            stats={"accepted": len(times) - 1},
        )

    def _check(self, found: object, x: Tensor, times: Tensor) -> None:
        path = self.info.path
        if not isinstance(found, Tensor) or found.shape != x.shape:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise TypeError(
                f"{path} must return the state, a tensor of shape {tuple(x.shape)}, got {got}"
            )
        if not bool(found.isfinite().all()):
            at = times[-1].item()
            raise NonFiniteError(f"{path} returned NaN or infinity", len(times) - 1, at)


class _Source:
    """The run's noise by ``(sigma, sigma_next)``, and its levels by sigma."""

    def __init__(
        self, x: Tensor, sde: SDE, times: Tensor, levels: list[HostedLevel], noise: Noise
    ) -> None:
        self.calls = 0
        self._x, self._sde, self._noise = x, sde, noise
        self._ends = levels[0], levels[-1]
        # In the state's dtype, as the function has them.
        wide = torch.tensor([level.host_ratio for level in levels], dtype=torch.float64)
        self._known = dict(zip(wide.to(x.dtype).tolist(), levels, strict=True))

    def __call__(self, sigma: float | Tensor, sigma_next: float | Tensor) -> Tensor:
        """Standard normal of the state's shape: the increment from sigma to sigma_next,
        normalised, of a call's own."""
        start, end = (self.level(float(torch.as_tensor(s).max())) for s in (sigma, sigma_next))
        return self.draw(start, end)

    def draw(self, start: NoiseLevel | None = None, end: NoiseLevel | None = None) -> Tensor:
        """The noise of the next call; from the whole run's start to its end by default."""
        step = Step(self.calls, start or self._ends[0], end or self._ends[1])
        self.calls += 1
        return self._noise(self._x, step)

    def level(self, ratio: float) -> HostedLevel:
        """The level at ``sigma / alpha = ratio``, or the nearest end of the run's."""
        if ratio not in self._known:
            if not math.isfinite(ratio):
                raise NonFiniteError(f"the sampler asked for the score at sigma = {ratio}", 0, 0.0)
            top, bottom = (level.host_ratio for level in self._ends)
            if ratio >= top:
                return self._ends[0]
            if ratio <= bottom:
                return self._ends[1]
            wanted = torch.tensor([-math.log(ratio)], dtype=torch.float64)
            self._known[ratio] = unbound(self._sde.at(self._sde.time(wanted)), self._x.device)[0]
        return self._known[ratio]

    def levels(self, ratios: Tensor) -> NoiseLevel:
        """A level per sample, at ``sigma / alpha`` ``(B,)``."""
        each = [self.level(ratio) for ratio in ratios.tolist()]
        return NoiseLevel(*(torch.stack(column) for column in zip(*each, strict=True)))


class _Denoiser:
    """``model(x, sigma)``: the estimate of x_0 at the state over alpha."""

    def __init__(self, score_fn: ScoreFn, source: _Source) -> None:
        self._score_fn = score_fn
        self._source = source

    def __call__(self, x: Tensor, sigma: float | Tensor, **_: Any) -> Tensor:
        ratios = torch.as_tensor(sigma)
        level: NoiseLevel
        if ratios.ndim == 0 or bool((ratios == ratios.flatten()[0]).all()):
            level = self._source.level(float(ratios.flatten()[0]))
        else:
            level = self._source.levels(ratios.flatten())
        return self._score_fn(_alpha(level, x) * x, level).x0


_seen: dict[_CallableSampler, _Draws | None] = {}


def _draws(solver: _CallableSampler) -> _Draws | None:
    """Where a function takes its noise from, measured on a Gaussian; None: it fails there."""
    if solver not in _seen:
        _seen[solver] = None  # what hangs and is interrupted is not tried again
        for shape in ((2, 1), (2, 1, 4, 4)):
            try:
                _seen[solver] = _measured(solver, shape)
                break
            except TimeoutError:
                raise
            except Exception:  # whatever a user's function does: the run itself will say so
                continue
    return _seen[solver]


def _measured(solver: _CallableSampler, shape: tuple[int, ...]) -> _Draws:
    sde, x = VPSDE(), torch.ones(shape, dtype=torch.float64)
    times = torch.linspace(sde.t_max, sde.t_min, 9, dtype=torch.float64)
    found = []
    for seed in range(2):
        with GENERATOR, torch.random.fork_rng(devices=[]), PatchedNormals(x) as patched:
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            noise = CounterNoise(seed)
            found.append(solver.solved(_unit_gaussian, sde, x, times, noise, patched).x)
            foreign = not torch.equal(before, torch.get_rng_state())
    return _Draws(not torch.equal(*found), patched.asked, foreign)


def _unit_gaussian(x: Tensor, level: NoiseLevel) -> Prediction:
    alpha, sigma = _alpha(level, x), expand(level.sigma, x).to(x.dtype)
    return Prediction.from_x0(x, level, alpha * x / (alpha**2 + sigma**2))


def _alpha(level: NoiseLevel, x: Tensor) -> Tensor:
    return expand(level.alpha, x).to(x.dtype)


def callable_sampler(path: str, **settings: Any) -> Integrator:
    """``callable_sampler("my_samplers:sample_euler", s_churn=10.0)``.

    Raises:
        ValueError: a module or name that does not exist, or a function of another form.
        TypeError: settings that the function does not have.
    """
    return sampler_type(path)(**settings)


def sampler_type(path: str) -> type[Integrator]:
    """The Integrator for the function at ``package.module:name``: a frozen dataclass of its
    settings."""
    return _sampler_type(path, imported(path))


@cache
def _sampler_type(path: str, function: Callable[..., Any]) -> type[Integrator]:
    style, parameters = _style(path, function)
    items: list[Any] = []
    for name, parameter in parameters.items():
        if name in _GIVEN or not _is_setting(parameter):
            continue
        if name != "order" and hasattr(_CallableSampler, name):
            raise ValueError(f"{path} has a setting {name!r}, which solvers use; rename it")
        if parameter.default is parameter.empty:
            items.append((name, int | float | str, field(kw_only=True)))
        else:
            items.append((name, _hint(parameter), field(default=parameter.default, kw_only=True)))
    if style == "sigmas":
        items.append(("append_zero", bool, field(default=False, kw_only=True)))
    info = _Info(path, function, style, "noise_sampler" in parameters)
    made = make_dataclass(
        path.partition(":")[2],
        items,
        bases=(_CallableSampler,),
        frozen=True,
        namespace={"info": info, "__doc__": inspect.getdoc(function) or f"The function {path}."},
    )
    # The file whose change makes it another solver.
    own = function.__module__ if inspect.isfunction(function) else path.partition(":")[0]
    made.__module__ = own
    made.catalogue_name = path  # type: ignore[attr-defined]
    return made


def _style(path: str, function: Callable[..., Any]) -> tuple[Style, dict[str, inspect.Parameter]]:
    """How the function is called, and its parameters beyond those."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        raise ValueError(f"{path} is not a solver; name a function {FORMS}") from None
    positional = [
        p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    required = [p.name for p in positional if p.default is p.empty]
    style = _REQUIRED.get(len(required))
    if style is None or (style == "times" and required[2] != "x"):
        raise ValueError(f"{path} must be given ({', '.join(required)}); name a function {FORMS}")
    return style, {name: p for name, p in parameters.items() if name not in required}


def _is_setting(parameter: inspect.Parameter) -> bool:
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        return False
    default = parameter.default
    return (
        default is None
        or default is parameter.empty
        or isinstance(default, bool | float | int | str)
    )


def _hint(parameter: inspect.Parameter) -> Any:
    """The type of a setting by its default: ``eta=1`` may be a half as well."""
    default = parameter.default
    if default is None:
        return int | float | str | None
    if isinstance(default, bool | float | str):
        return type(default)
    return int | float


def _remade(path: str, settings: dict[str, Any]) -> Integrator:
    return callable_sampler(path, **settings)
