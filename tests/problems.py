"""What the tests share: SDEs, names of exact targets, and the closed-form problems of the
certificates (``experiments.certify.problems``), which are importable from here as well."""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.certify.problems import (
    AffineRun,
    GaussianProblem,
    IsotropicScore,
    Moments,
    NotAffineError,
    affine_run,
    fine_flow,
    fitted_order,
    measured_order,
    uniform_grid,
    warped_grid,
)
from sde_diffusion import (
    EDMSDE,
    SDE,
    VESDE,
    VPSDE,
    CosineVPSDE,
    SubVPSDE,
    TabulatedVPSDE,
)

__all__ = [
    "DDPM_BETAS",
    "EXACT_TARGETS",
    "SDES",
    "SHORT_BETAS",
    "AffineRun",
    "GaussianProblem",
    "IsotropicScore",
    "Moments",
    "NotAffineError",
    "affine_run",
    "assert_close_to_monte_carlo",
    "fine_flow",
    "fitted_order",
    "inner_times",
    "measured_order",
    "uniform_grid",
    "warped_grid",
]

# DDPM's table (Ho et al. 2020), at its own length and at one that short runs use in full.
DDPM_BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
SHORT_BETAS = torch.linspace(1e-2, 0.4, 20, dtype=torch.float64)

SDES: dict[str, SDE] = {
    "vp": VPSDE(),
    "cosine": CosineVPSDE(),
    "subvp": SubVPSDE(),
    "ve": VESDE(),
    "edm": EDMSDE(),
    "tabulated": TabulatedVPSDE.from_betas(DDPM_BETAS),
}
"""One of every kind, with its default settings: ``pytest.mark.parametrize("name", SDES)``."""

EXACT_TARGETS = ("gaussian", "ring", "moons", "spiral", "gmm16")
"""Names for ``named_target``."""


def inner_times(sde: SDE, count: int = 5) -> list[float]:
    """``count`` times from ``t_min`` to ``t_max``, both included, uniform in log-SNR in between."""
    low, high = (sde.at(float(t)).half_log_snr for t in (sde.t_max, sde.t_min))
    between = sde.time(torch.linspace(float(high), float(low), count, dtype=torch.float64))
    return [float(sde.t_min), *between[1:-1].tolist(), float(sde.t_max)]


def assert_close_to_monte_carlo(
    found: Tensor, expected: Tensor | float, stderr: Tensor | float, z: float = 5.0
) -> None:
    """``found`` lies within ``z`` standard errors: at z = 5 one in 1.7 million would not by chance,
    and the seeds are fixed besides."""
    excess = ((found - expected).abs() / torch.as_tensor(stderr)).max()
    assert excess < z, f"{float(excess):.2f} standard errors away: {found} against {expected}"
