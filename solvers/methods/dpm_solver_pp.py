"""DPM-Solver++ multistep and its stochastic form."""

from __future__ import annotations

from dataclasses import dataclass

from sde_diffusion.errors import require_between, require_count
from solvers.multistep import DataPrediction


@dataclass(frozen=True)
class DPMSolverPP(DataPrediction):
    """DPM-Solver++ multistep: exponential, in x0 and half_log_snr; eta > 0 is SDE-DPM-Solver++.

    With ``h = half_log_snr(u) - half_log_snr(t)`` and ``a = 1 + eta^2``,
    ``x_u = sigma_u/sigma_t e^(-eta^2 h) x_t + alpha_u a int e^(-a (l_u - l)) x0(l) dl + sigma_u
    sqrt(1 - e^(-2 eta^2 h)) z`` (Lu et al. 2022, arXiv:2211.01095, eq. 8 and 19, for any eta of the
    reverse family). eta = 1 at order 1 is ancestral sampling.

    x0 is interpolated in l and the integral then taken exactly, at every order. So order 3 has
    order 3, unlike the published code's: see ``solvers.multistep``. Order 2 is not algorithm 2
    (k-diffusion's ``sample_dpmpp_2m``, diffusers' default): that weighs the slope ``dx0/dl`` by
    ``h/2 (1 - e^(-h))``, this by ``h - 1 + e^(-h)``, as diffusers' ``solver_type="heun"`` does.
    They are ``h^3/12`` apart, of one order and limit; on the named targets the published one's
    median error at 16 steps was 0.6 to 0.7 of this one's. Near a border between modes so small a
    difference can decide for another mode.

    Args:
        order: 1 to 3; steps with a shorter history use what there is. With eta > 0 the weak order
            is 2 at most: order 3 then has the smaller error, not the steeper one.
        eta: in [0, 1].
    """

    order: int = 2
    eta: float = 0.0

    def __post_init__(self) -> None:
        require_count("order", self.order, most=3)
        require_between("eta", self.eta, 0, 1)

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    @property
    def weak_order(self) -> int:
        return min(self.order, 2) if self.stochastic else self.order
