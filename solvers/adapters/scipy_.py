"""scipy's methods on the probability-flow ODE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sde_diffusion.errors import require_between
from solvers.adapters.scaled import Flow, FlowIntegrator, check_flow_settings

_ORDERS = {"RK23": 3, "RK45": 5, "DOP853": 8, "Radau": 5, "BDF": 1, "LSODA": 1}


@dataclass(frozen=True)
class ScipyODE(FlowIntegrator):
    """scipy's adaptive methods (RK45, DOP853, LSODA, ...) on the probability-flow ODE.

    The equation is ``dy/dlambda = -exp(-lambda) eps`` in ``y = x / alpha`` (Karras et al. 2022,
    arXiv:2206.00364, eq. 4), in float64 on the host; the score is evaluated in the state's dtype,
    on its device. No steps are needed: of the grid its two ends are taken.

    The order declared is that of the solution carried on (RK23 3, RK45 5, DOP853 8, Radau 5); BDF
    and LSODA vary theirs from 1 up and declare 1. The implicit methods take Jacobians by finite
    differences, one evaluation per element.

    Args:
        method: RK23, RK45, DOP853, Radau, BDF or LSODA.
        rtol, atol: tolerances on y, which has the data's scale at the end; rtol at least 1e-13.
        norm: ``sample``: every sample is integrated on its own, so that it does not depend on its
            batch; ``batch``: one solve for all, much faster, with an error norm that couples them.
        max_nfe: evaluations after which a solve stops with an error.
    """

    method: str = "RK45"
    rtol: float = 1e-5
    atol: float = 1e-5
    norm: str = "sample"
    max_nfe: int = 100_000
    adaptive = True

    def __post_init__(self) -> None:
        check_flow_settings(
            self.method, tuple(_ORDERS), self.rtol, self.atol, self.norm, self.max_nfe
        )
        require_between("rtol", self.rtol, 1e-13, float("inf"))

    @property
    def order(self) -> int:
        return _ORDERS[self.method]

    def integrate(self, flow: Flow, x: Tensor) -> tuple[Tensor, dict[str, int]]:
        import scipy.integrate

        # solve_ivp would keep every state of the run; its solvers keep one.
        solver_type: Any = getattr(scipy.integrate, self.method)
        nodes = getattr(solver_type, "C", None)

        def slope(half_log_snr: float, y: np.ndarray) -> np.ndarray:
            level = flow.level(half_log_snr)
            state = torch.from_numpy(level.alpha.item() * y).to(x).view(x.shape)
            eps = flow.slope(half_log_snr, state, level).detach().cpu()
            return eps.numpy().reshape(-1).astype(np.float64) * -level.host_ratio

        y = x.detach().cpu().numpy().reshape(-1).astype(np.float64) / flow.start.alpha.item()
        solver = solver_type(slope, flow.span[0], y, flow.span[1], rtol=self.rtol, atol=self.atol)
        accepted = 0
        while solver.status == "running":
            if nodes is not None:
                flow.expect(_places(solver, nodes))
            message = solver.step()
            if solver.status == "failed":
                raise RuntimeError(
                    f"scipy's {self.method} failed at {flow.place(solver.t)}: {message} "
                    "Loosen rtol and atol, or use float64 states."
                )
            accepted += 1
        end = torch.from_numpy(flow.end.alpha.item() * solver.y)
        return end.to(x).view(x.shape), {"accepted": accepted}


def _places(solver: Any, nodes: np.ndarray) -> list[float]:
    """Where an explicit Runge-Kutta method of scipy will evaluate in its next attempt."""
    start = solver.t
    least = 10 * abs(np.nextafter(start, np.inf) - start)
    end = min(start + max(solver.h_abs, least), solver.t_bound)
    step = end - start
    return [*(start + nodes[1:] * step).tolist(), start + step]
