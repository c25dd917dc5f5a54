"""diffusers' schedulers that there is an adapter to, and what must be known of each."""

from __future__ import annotations

from dataclasses import dataclass

PREFIX = "diffusers:"


@dataclass(frozen=True)
class Kind:
    """What the loop must know of a scheduler class.

    Attributes:
        space: ``vp``: the state is ``y / sqrt(1 + s^2)``; ``sigma``: it is ``y``; ``edm``: it is
            ``y``, with sigmas instead of a chain and the output in EDM's preconditioned form.
        order: declared order, or the name of the setting that is it.
        stochastic: whether it draws noise, whatever its settings.
        spacing: default of ``timestep_spacing``, where the library's starts short of the end.
        interpolated: where in ``sigmas_interpol`` the level of a second stage is.
    """

    space: str
    order: int | str
    stochastic: bool = False
    spacing: str | None = None
    interpolated: int | None = None


SCHEDULERS = {
    "DDIMScheduler": Kind("vp", 1, spacing="trailing"),
    "DDPMScheduler": Kind("vp", 1, stochastic=True, spacing="linspace"),
    "DEISMultistepScheduler": Kind("vp", "solver_order"),
    "DPMSolverMultistepScheduler": Kind("vp", "solver_order"),
    "DPMSolverSinglestepScheduler": Kind("vp", "solver_order"),
    "EDMDPMSolverMultistepScheduler": Kind("edm", "solver_order"),
    "EDMEulerScheduler": Kind("edm", 1),
    "EulerAncestralDiscreteScheduler": Kind("sigma", 1, stochastic=True),
    "EulerDiscreteScheduler": Kind("sigma", 1),
    "HeunDiscreteScheduler": Kind("sigma", 2),
    "KDPM2AncestralDiscreteScheduler": Kind("sigma", 1, stochastic=True, interpolated=-1),
    "KDPM2DiscreteScheduler": Kind("sigma", 2, interpolated=0),
    "LMSDiscreteScheduler": Kind("sigma", "order"),
    "PNDMScheduler": Kind("vp", 2, spacing="trailing"),
    "SASolverScheduler": Kind("vp", "predictor_order", stochastic=True),
    "UniPCMultistepScheduler": Kind("vp", "solver_order"),
}
