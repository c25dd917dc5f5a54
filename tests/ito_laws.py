"""What the tests of worked Ito examples share."""

import torch

from sde_diffusion import GaussianMixture
from sde_diffusion.ito import CriticallyDampedLangevin
from tests.problems import assert_close_to_monte_carlo

LANGEVIN = CriticallyDampedLangevin(beta=3.0, mass=0.3, gamma=0.05)
MIXTURE = GaussianMixture(
    torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.0, 1.5]]),
    torch.tensor([[[0.1, 0.05], [0.05, 0.1]], [[0.05, 0.0], [0.0, 0.1]], [[0.2, 0.0], [0.0, 0.1]]]),
    weights=torch.tensor([0.5, 0.3, 0.2]),
    labels=torch.tensor([0, 1, 1]),
)
EXACT = LANGEVIN.exact(MIXTURE)


def time(t):
    return torch.tensor(t, dtype=torch.float64)


def same_mean(found, exact):
    """Means of two samples, ``(n, k)`` and ``(m, k)``, agree within their standard errors."""
    stderr = (found.var(0) / len(found) + exact.var(0) / len(exact)).sqrt()
    assert_close_to_monte_carlo(found.mean(0), exact.mean(0), stderr)
