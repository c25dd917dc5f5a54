"""torchdiffeq's methods on the probability-flow ODE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sde_diffusion.prediction import ScoreFn
from sde_diffusion.sde import SDE
from solvers.adapters.adjoint import probe
from solvers.adapters.scaled import Flow, FlowIntegrator, check_flow_settings, counting
from solvers.noise import Noise
from solvers.solution import Solution

# Order, and where a step evaluates after what it inherits, as fractions of the step: only so that
# the levels of a step are computed together.
_ADAPTIVE: dict[str, tuple[int, tuple[float, ...]]] = {
    "adaptive_heun": (2, (1,)),
    "bosh3": (3, (1 / 2, 3 / 4, 1)),
    "dopri5": (5, (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)),
    "dopri8": (8, (
        1 / 18, 1 / 12, 1 / 8, 5 / 16, 3 / 8, 59 / 400, 93 / 200, 5490023248 / 9719169821, 13 / 20,
        1201146811 / 1299019798, 1, 1, 1,
    )),
    "fehlberg2": (2, (1 / 2, 1)),
}  # fmt: skip
_FIXED: dict[str, tuple[int, tuple[float, ...]]] = {
    "euler": (1, (0,)),
    "heun2": (2, (0, 1)),
    "heun3": (3, (0, 1 / 3, 2 / 3)),
    "midpoint": (2, (0, 1 / 2)),
    "rk4": (4, (0, 1 / 3, 2 / 3, 1)),
}
_METHODS = {**_ADAPTIVE, **_FIXED}


@dataclass(frozen=True)
class TorchdiffeqODE(FlowIntegrator):
    """torchdiffeq's Runge-Kutta methods on the probability-flow ODE, adaptive or on the grid.

    The equation is ``dy/dlambda = -exp(-lambda) eps`` in ``y = x / alpha`` (Karras et al. 2022,
    arXiv:2206.00364, eq. 4), in float64 where the device has it; the score is evaluated in the
    state's dtype. Adaptive methods need no steps: of the grid they take the two ends. Fixed ones
    (euler, midpoint, heun2, heun3, and rk4, which is the 3/8 rule) take the grid's own steps in
    lambda. The Adams methods are left out: torchdiffeq's coefficients assume equal steps.

    Args:
        method: adaptive_heun, bosh3, dopri5, dopri8, fehlberg2; euler, midpoint, heun2, heun3, rk4.
        rtol, atol: tolerances of an adaptive method, on y, which has the data's scale at the end.
            Errors at the end are some times the tolerance, with fehlberg2 some hundred times.
        norm: of an adaptive method's error. ``sample``: every sample is integrated on its own, so
            that it does not depend on its batch; ``batch``: the mean over the batch, one solve for
            all, much faster, for parity with a plain call of torchdiffeq.
        max_nfe: evaluations after which a solve stops with an error.

    ``sample``'s ``gradients=True`` records every evaluation; ``"adjoint"`` records none and
    integrates the adjoint equation back (Chen et al. 2018, arXiv:1806.07366, alg. 1; torchdiffeq's
    odeint_adjoint), with the same method, tolerances or grid: the gradient has an error of their
    size, where recording gives that of the steps taken.
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    norm: str = "sample"
    max_nfe: int = 100_000
    differentiable = (True, "adjoint")

    def __post_init__(self) -> None:
        check_flow_settings(
            self.method, tuple(_METHODS), self.rtol, self.atol, self.norm, self.max_nfe
        )

    @property
    def order(self) -> int:
        return _METHODS[self.method][0]

    @property
    def adaptive(self) -> bool:
        return self.method in _ADAPTIVE

    def integrate(self, flow: Flow, x: Tensor) -> tuple[Tensor, dict[str, int]]:
        from torchdiffeq import odeint, odeint_adjoint

        kind = _AdaptiveSlope if self.adaptive else _GridSlope
        slope = kind(flow, _METHODS[self.method][1], x.dtype)
        # In float32 the state's own rounding makes dopri8 reject steps (5 % more evaluations).
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        ends = torch.tensor(flow.span, dtype=wide, device=x.device)
        if self.adaptive:
            # Without step_t the last step would run past the end and be interpolated.
            options, back = ({"dtype": wide, "step_t": ends[[place]]} for place in (1, 0))
        else:
            grid = flow.grid.to(ends)
            options, back = (_on_grid(times) for times in (grid, grid.flip(0)))
        adjoint: dict[str, Any] = {}
        if flow.parameters is not None:
            adjoint = {"adjoint_params": flow.parameters, "adjoint_options": back}
        try:
            states = (odeint_adjoint if adjoint else odeint)(
                slope,
                x.to(wide) / flow.start.alpha,
                ends,
                rtol=self.rtol,
                atol=self.atol,
                method=self.method,
                options=options,
                **adjoint,
            )
        except AssertionError as error:
            raise RuntimeError(
                f"torchdiffeq's {self.method} failed at {flow.place(slope.at)}: {error}; "
                "loosen rtol and atol, or use float64 states"
            ) from error
        return (flow.end.alpha * states[-1]).to(x.dtype), slope.counts

    def solve_with_adjoint(
        self, score_fn: ScoreFn, sde: SDE, x: Tensor, times: Tensor, noise: Noise
    ) -> Solution:
        counted = counting(score_fn)
        probed = probe(counted, sde, x, times)
        return probed.added_to(self.carried(counted, sde, x, times, probed.parameters))


def _on_grid(times: Tensor) -> dict[str, Any]:
    return {"grid_constructor": lambda func, y0, t: times}


class _Slope:
    """``dy/dlambda`` as torchdiffeq calls it.

    Attributes:
        at: where it was called last.
        counts: of steps.
    """

    def __init__(self, flow: Flow, nodes: tuple[float, ...], dtype: torch.dtype) -> None:
        self.at = flow.span[0]
        self.counts = {"accepted": 0, "rejected": 0}
        self.flow = flow
        self.nodes = torch.tensor(nodes, dtype=torch.float64)
        self._dtype = dtype

    def __call__(self, half_log_snr: Tensor, y: Tensor) -> Tensor:
        self.at = half_log_snr.item()
        level = self.flow.level(self.at)
        state = (level.alpha * y).to(self._dtype)
        return self.flow.slope(self.at, state, level).to(y.dtype) * -level.host_ratio


class _GridSlope(_Slope):
    """For a fixed method: it takes the grid's steps, so that all levels are known beforehand."""

    def __init__(self, flow: Flow, nodes: tuple[float, ...], dtype: torch.dtype) -> None:
        super().__init__(flow, nodes, dtype)
        flow.expect((flow.grid[:-1, None] + flow.grid.diff()[:, None] * self.nodes).flatten())
        self.counts["accepted"] = len(flow.grid) - 1


class _AdaptiveSlope(_Slope):
    """For an adaptive method: torchdiffeq tells it, by these names, of its attempts."""

    def callback_step(self, half_log_snr: Tensor, y: Tensor, step: Tensor) -> None:
        # A recorded run is not to be differentiated through the choice of its steps: that adds the
        # derivative of an error, which is some hundred times the error.
        step.detach_()
        start = half_log_snr.item()
        span = min(step.item(), self.flow.span[1] - start)
        self.flow.expect(start + span * self.nodes)

    def callback_accept_step(self, half_log_snr: Tensor, y: Tensor, step: Tensor) -> None:
        self.counts["accepted"] += 1

    def callback_reject_step(self, half_log_snr: Tensor, y: Tensor, step: Tensor) -> None:
        self.counts["rejected"] += 1
