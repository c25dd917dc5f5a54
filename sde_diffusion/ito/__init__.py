"""General Ito SDEs: state-dependent and matrix-valued noise, their reverses and what learns them.

``solvers.sample_ito`` solves them. The linear SDEs of ``sde_diffusion.sde`` have faster solvers;
``ItoSDE.from_linear`` and ``score_from`` bring one here.
"""

from sde_diffusion.ito import losses as ito_losses
from sde_diffusion.ito.bridge import score_fn_from, score_from
from sde_diffusion.ito.equations import Charted, Equation, Forward, Reverse
from sde_diffusion.ito.fields import Field, Normals, Score
from sde_diffusion.ito.geometric import GeometricBrownianMotion, LogNormal, correlated_geometric
from sde_diffusion.ito.langevin import CriticallyDampedLangevin, LangevinMixture
from sde_diffusion.ito.laws import (
    DensityTransition,
    GaussianPrior,
    Prior,
    ScaledTransition,
    Transition,
    gradient_of,
    normals_from,
)
from sde_diffusion.ito.sde import ItoSDE
from sde_diffusion.ito.simulation import simulated
from sde_diffusion.ito.square_root import GammaMixture, GammaPrior, SquareRootProcess

__all__ = [
    "Charted",
    "CriticallyDampedLangevin",
    "DensityTransition",
    "Equation",
    "Field",
    "Forward",
    "GammaMixture",
    "GammaPrior",
    "GaussianPrior",
    "GeometricBrownianMotion",
    "ItoSDE",
    "LangevinMixture",
    "LogNormal",
    "Normals",
    "Prior",
    "Reverse",
    "ScaledTransition",
    "Score",
    "SquareRootProcess",
    "Transition",
    "correlated_geometric",
    "gradient_of",
    "ito_losses",
    "normals_from",
    "score_fn_from",
    "score_from",
    "simulated",
]
