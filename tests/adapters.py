"""What the tests of adapters share: solvers, starts, the exact flow of one Gaussian, a count."""

import torch

from sde_diffusion import EDMSDE, VESDE, VPSDE, SubVPSDE, TabulatedVPSDE
from solvers import ScipyODE, TorchdiffeqODE, TorchsdeSDE

DDPM = TabulatedVPSDE.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
SDES = [VPSDE(), VESDE(), SubVPSDE(), EDMSDE()]
IDS = [type(sde).__name__ for sde in SDES]
FIXED = {"euler": (1, 1), "midpoint": (2, 2), "heun2": (2, 2), "heun3": (3, 3), "rk4": (4, 4)}
ACCURATE = [
    *(TorchdiffeqODE(method, rtol=1e-8, atol=1e-8) for method in ("dopri5", "dopri8")),
    *(ScipyODE(method, rtol=1e-8, atol=1e-8) for method in ("RK45", "DOP853", "LSODA")),
]
LOOSE = [
    *(
        TorchdiffeqODE(method, rtol=1e-4, atol=1e-4)
        for method in ("bosh3", "adaptive_heun", "fehlberg2")
    ),
    *(ScipyODE(method, rtol=1e-4, atol=1e-4) for method in ("RK23", "Radau", "BDF")),
]
EVERY = [
    TorchdiffeqODE(),
    TorchdiffeqODE("rk4"),
    ScipyODE(),
    ScipyODE("LSODA"),
    *(TorchsdeSDE(method) for method in ("srk", "euler", "milstein")),
]


def start(sde, n, dimension=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(n, dimension, generator=generator, dtype=dtype) * sde.prior_std().to(dtype)


def exact_flow(target, sde, x):
    """The probability-flow map of one Gaussian: affine along each of its eigenvectors."""
    first, last = sde.at(float(sde.t_max)), sde.at(float(sde.t_min))
    eigenvectors = torch.eye(len(x[0]), dtype=x.dtype)
    if target.rotation is not None:
        eigenvectors = target.rotation[0]
    deviations = [
        torch.sqrt(level.alpha**2 * target.variances[0] + level.sigma**2) for level in (first, last)
    ]
    offset = (x - first.alpha * target.means[0]) @ eigenvectors
    return last.alpha * target.means[0] + (offset * deviations[1] / deviations[0]) @ eigenvectors.T


def name(solver):
    return f"{type(solver).__name__}-{solver.method}"


class Counter:
    """Counts calls and samples evaluated, on its own."""

    def __init__(self, score_fn):
        self.score_fn = score_fn
        self.calls = 0
        self.samples = 0
        self.times = []

    def __call__(self, x, level):
        self.calls += 1
        self.samples += len(x)
        self.times.append(float(level.t))
        return self.score_fn(x, level)
