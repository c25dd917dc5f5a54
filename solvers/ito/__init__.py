"""Solvers of general SDEs: ``sample_ito`` runs them.

``EulerMaruyama``, ``Milstein`` and ``Torchsde`` for equations with noise; ``RungeKutta`` and
``Torchdiffeq`` for the probability-flow ODE. Linear SDEs have faster ones in ``solvers``.
"""

from solvers.ito.base import ItoIntegrator, ItoSolver, brownian_path
from solvers.ito.ordinary import RungeKutta, Torchdiffeq
from solvers.ito.run import sample_ito
from solvers.ito.stochastic import EulerMaruyama, Milstein
from solvers.ito.torchsde_ import Torchsde

__all__ = [
    "EulerMaruyama",
    "ItoIntegrator",
    "ItoSolver",
    "Milstein",
    "RungeKutta",
    "Torchdiffeq",
    "Torchsde",
    "brownian_path",
    "sample_ito",
]
