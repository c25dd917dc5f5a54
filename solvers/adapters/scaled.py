"""The probability-flow ODE in the form in which other libraries' solvers are given it.

With ``y = x / alpha`` and ``lambda = half_log_snr`` every linear SDE's ODE is ``dy/dlambda =
-exp(-lambda) eps(x)``: Karras et al. 2022, arXiv:2206.00364, eq. 4, with ``s = exp(-lambda)``. The
linear part is gone, and lambda spreads the work evenly over the noise scales.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sde_diffusion.errors import NonFiniteError, require_count, require_finite, unknown_name
from sde_diffusion.prediction import ScoreFn, select
from sde_diffusion.sde import SDE, HostedLevel, NoiseLevel
from solvers.adapters.adjoint import Watched
from solvers.base import Integrator, unbound
from solvers.counting import CountedScoreFn
from solvers.noise import Noise
from solvers.solution import Solution

NORMS = ("sample", "batch")


def evaluated_eps(score_fn: ScoreFn, x: Tensor, level: NoiseLevel, index: int) -> Tensor:
    """``eps``, or a ``NonFiniteError`` that names the time; ``index`` is the grid's step."""
    eps = score_fn(x, level).eps
    # The sum is one number to look at, and finite only if every element is (or if it overflows).
    if not math.isfinite(eps.sum().item()) and not bool(eps.isfinite().all()):
        time = level.t.item()
        what = (
            "score_fn returned NaN or infinity"
            if bool(x.isfinite().all())
            else "the state left the finite numbers; use more steps or tighter tolerances"
        )
        raise NonFiniteError(f"{what} at step {index}, t = {time:.6g}", index, time)
    return eps


def counting(score_fn: ScoreFn) -> CountedScoreFn:
    """``score_fn`` with a count, which ``sample`` has given it already."""
    return score_fn if isinstance(score_fn, CountedScoreFn) else CountedScoreFn(score_fn)


class Flow:
    """The right-hand side ``dy/dlambda`` for one solve, with its levels and its limit.

    Attributes:
        times: the grid.
        start, end: levels at ``times[0]`` and ``times[-1]``.
        grid: ``half_log_snr`` at all times, float64 on the CPU.
        span: its first and last entry.
        nfe: evaluations so far.
        parameters: tensors, beside the state, that an adjoint equation is to give gradients of;
            ``None``: none is integrated.
    """

    def __init__(
        self,
        score_fn: ScoreFn,
        sde: SDE,
        times: Tensor,
        like: Tensor,
        max_nfe: int,
        parameters: tuple[Tensor, ...] | None = None,
    ) -> None:
        self.parameters = parameters
        self.times = times
        self.start, self.end = unbound(sde.at(times[[0, -1]]), like.device)
        self.grid = sde.at(times).half_log_snr
        self.span = self.grid[0].item(), self.grid[-1].item()
        self._sde = sde
        self._device = like.device
        self._tolerance = 8 * torch.finfo(self.start.t.dtype).eps
        self._max_nfe = max_nfe
        self.restart(score_fn)

    def restart(self, score_fn: ScoreFn) -> None:
        """Turn to another part of the batch, counting anew."""
        known = self.parameters
        self._score_fn = score_fn if known is None else Watched(score_fn, known)
        self.nfe = 0
        self._expected: Iterator[tuple[float, HostedLevel]] = iter(())

    def expect(self, half_log_snrs: Sequence[float] | Tensor) -> None:
        """Say where the next evaluations will be, in order: their levels are computed together.

        A wrong guess costs time and nothing else.
        """
        wanted = torch.as_tensor(half_log_snrs, dtype=torch.float64)
        levels = unbound(self._sde.at(self._sde.time(wanted.clamp(*self.span))), self._device)
        self._expected = iter(list(zip(wanted.tolist(), levels, strict=True)))

    def level(self, half_log_snr: float) -> HostedLevel:
        """The level at a place in the span; the ends are exactly those of the grid."""
        known, level = next(self._expected, (math.nan, self.start))
        if half_log_snr <= self.span[0]:
            return self.start
        if half_log_snr >= self.span[1]:
            return self.end
        if abs(known - half_log_snr) <= self._tolerance * max(1.0, abs(known)):
            return level
        wanted = torch.tensor([half_log_snr], dtype=torch.float64)
        return unbound(self._sde.at(self._sde.time(wanted)), self._device)[0]

    def slope(self, half_log_snr: float, x: Tensor, level: NoiseLevel) -> Tensor:
        """``eps`` at the state ``x = alpha y``; ``dy/dlambda`` is ``-sigma/alpha`` times it."""
        if self.nfe >= self._max_nfe:
            raise RuntimeError(
                f"no end after max_nfe={self._max_nfe} evaluations, {self.place(half_log_snr)}: "
                "loosen rtol and atol, use float64 states, or raise max_nfe"
            )
        self.nfe += 1
        return evaluated_eps(self._score_fn, x, level, self._index(level))

    def place(self, half_log_snr: float) -> str:
        """The time of a place, for messages."""
        low, high = self.span
        if not math.isfinite(half_log_snr):
            return "t unknown"
        return f"t = {self._sde.time(min(max(half_log_snr, low), high)).item():.6g}"

    def _index(self, level: NoiseLevel) -> int:
        """The grid's step that a level lies in; looked up only for the two-entry grid's only
        step."""
        if len(self.times) == 2:
            return 0
        passed = int((self.times > level.t.cpu()).sum())
        return min(max(passed - 1, 0), len(self.times) - 2)


class FlowIntegrator(Integrator):
    """An adapter that integrates the flow; a subclass is a frozen dataclass with these settings.

    Attributes:
        norm: ``sample``: every sample is integrated on its own; ``batch``: all at once, so that
            steps depend on the batch.
        max_nfe: evaluations after which a solve is given up.
    """

    norm: str
    max_nfe: int
    stochastic = False

    @property
    @abstractmethod
    def adaptive(self) -> bool:
        """Whether steps are chosen on the way; otherwise the grid's are taken."""

    @abstractmethod
    def integrate(self, flow: Flow, x: Tensor) -> tuple[Tensor, dict[str, int]]:
        """Carry ``x`` along the flow; the state at its end and counts for ``Solution.stats``."""

    def solve(
        self, score_fn: ScoreFn, sde: SDE, x: Tensor, times: Tensor, noise: Noise
    ) -> Solution:
        return self.carried(counting(score_fn), sde, x, times)

    def carried(
        self,
        score_fn: CountedScoreFn,
        sde: SDE,
        x: Tensor,
        times: Tensor,
        parameters: tuple[Tensor, ...] | None = None,
    ) -> Solution:
        """``solve``; with the adjoint equation's gradients of ``parameters`` where given."""
        if self.norm == "batch" or not self.adaptive:
            nfe_before, passes_before = score_fn.nfe, score_fn.network_passes
            flow = Flow(score_fn, sde, times, x, self.max_nfe, parameters)
            result, counts = self.integrate(flow, x)
            return Solution(
                result,
                score_fn.nfe - nfe_before,
                score_fn.network_passes - passes_before,
                times,
                stats=dict(counts),
            )
        flow = Flow(score_fn, sde, times, x, self.max_nfe, parameters)
        results = []
        nfe = torch.zeros(len(x), dtype=torch.long)
        passes = torch.zeros(len(x), dtype=torch.long)
        totals: dict[str, int] = {}
        for i in range(len(x)):
            counted = counting(select(score_fn, torch.tensor([i])))
            if parameters is None:
                flow.restart(counted)
            else:  # which goes on with its flow when the gradient comes
                flow = Flow(counted, sde, times, x, self.max_nfe, parameters)
            result, counts = self.integrate(flow, x[i : i + 1])
            results.append(result)
            nfe[i], passes[i] = counted.nfe, counted.network_passes
            for name, count in counts.items():
                totals[name] = totals.get(name, 0) + count
        share = max(1, len(x))
        return Solution(
            torch.cat([x[:0], *results]),
            nfe.sum().item() / share,
            passes.sum().item() / share,
            times,
            nfe_per_sample=nfe,
            stats={name: total / share for name, total in totals.items()},
        )


def check_flow_settings(
    method: str, methods: Sequence[str], rtol: float, atol: float, norm: str, max_nfe: int
) -> None:
    """What the two ODE adapters check in common."""
    if method not in methods:
        raise unknown_name("method", method, methods)
    require_finite("rtol", rtol, above=0.0)
    require_finite("atol", atol, above=0.0)
    if norm not in NORMS:
        raise unknown_name("norm", norm, NORMS)
    require_count("max_nfe", max_nfe)
