"""What is being solved: SDEs, score functions, guidance and exact targets."""

from sde_diffusion.contrasts import autoguided, thresholded
from sde_diffusion.empirical import empirical_mixture
from sde_diffusion.energies import energy_guided, noised_energy_guided
from sde_diffusion.errors import NonFiniteError
from sde_diffusion.guidance import classifier_free_guided, classifier_guided
from sde_diffusion.ito import ItoSDE
from sde_diffusion.linear_maps import Blur, LinearMap, Matrix, gaussian_kernel
from sde_diffusion.measurements import (
    Colorization,
    Downsampling,
    Inpainting,
    LinearMeasurement,
    Measurement,
)
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
from sde_diffusion.restoration import dps_guided, pigdm_guided
from sde_diffusion.scales import below
from sde_diffusion.schedules import SDES, named_sde, sde_from_config
from sde_diffusion.sde import EDMSDE, SDE, VESDE, VPSDE, CosineVPSDE, NoiseLevel, SubVPSDE
from sde_diffusion.tabulated import TabulatedVPSDE
from sde_diffusion.target_files import load_target
from sde_diffusion.targets import GaussianMixture

__all__ = [
    "EDMSDE",
    "SDE",
    "SDES",
    "TARGETS",
    "VESDE",
    "VPSDE",
    "Blur",
    "Colorization",
    "CosineVPSDE",
    "Downsampling",
    "EDMModel",
    "EpsModel",
    "GaussianMixture",
    "Inpainting",
    "ItoSDE",
    "LinearMap",
    "LinearMeasurement",
    "Matrix",
    "Measurement",
    "NoiseLevel",
    "NonFiniteError",
    "Prediction",
    "ScoreFn",
    "ScoreModel",
    "SubVPSDE",
    "TabulatedVPSDE",
    "VModel",
    "X0Model",
    "autoguided",
    "below",
    "bind",
    "classifier_free_guided",
    "classifier_guided",
    "continuous_time",
    "dps_guided",
    "edm_noise_label",
    "empirical_mixture",
    "energy_guided",
    "gaussian_kernel",
    "load_target",
    "named_sde",
    "named_target",
    "no_time",
    "noised_energy_guided",
    "pigdm_guided",
    "scaled_time",
    "sde_from_config",
    "table_index",
    "thresholded",
]
