"""What is being solved: SDEs, score functions, guidance and exact targets."""

from sde_diffusion.errors import NonFiniteError
from sde_diffusion.guidance import classifier_free_guided, classifier_guided
from sde_diffusion.named_targets import TARGETS, named_target
from sde_diffusion.parametrization import (
    EDMModel,
    EpsModel,
    ScoreModel,
    VModel,
    X0Model,
    bind,
    continuous_time,
    edm_noise_label,
    no_time,
    scaled_time,
    table_index,
)
from sde_diffusion.prediction import Prediction, ScoreFn
from sde_diffusion.schedules import SDES, named_sde, sde_from_config
from sde_diffusion.sde import EDMSDE, SDE, VESDE, VPSDE, CosineVPSDE, NoiseLevel, SubVPSDE
from sde_diffusion.tabulated import TabulatedVPSDE
from sde_diffusion.targets import GaussianMixture

__all__ = [
    "EDMSDE",
    "SDE",
    "SDES",
    "TARGETS",
    "VESDE",
    "VPSDE",
    "CosineVPSDE",
    "EDMModel",
    "EpsModel",
    "GaussianMixture",
    "NoiseLevel",
    "NonFiniteError",
    "Prediction",
    "ScoreFn",
    "ScoreModel",
    "SubVPSDE",
    "TabulatedVPSDE",
    "VModel",
    "X0Model",
    "bind",
    "classifier_free_guided",
    "classifier_guided",
    "continuous_time",
    "edm_noise_label",
    "named_sde",
    "named_target",
    "no_time",
    "scaled_time",
    "sde_from_config",
    "table_index",
]
