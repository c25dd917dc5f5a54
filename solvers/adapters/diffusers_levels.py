"""The levels of diffusers' schedulers: the chain they are given, the steps they make of it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sde_diffusion.sde import SDE
from solvers.adapters.diffusers_kinds import PREFIX, Kind

CHAIN_LEVELS = 1000
_SAME_LEVEL = 1e-3  # relative; float32 tables are off by 1e-4 where alpha_bar is near 1


def chain_of(sde: SDE, times: Tensor) -> Tensor:
    """``sigma / alpha`` at the chain's levels, increasing, float64."""
    low, high = times[-1].item(), times[0].item()
    own = getattr(sde, "times", None)
    if own is not None and low <= own[0] and high >= own[-1]:
        return torch.exp(-sde.at(own).half_log_snr)
    return torch.exp(
        -sde.at(torch.linspace(low, high, CHAIN_LEVELS, dtype=torch.float64)).half_log_snr
    )


def set_timesteps(scheduler: Any, kind: Kind, name: str, steps: int, device: torch.device) -> int:
    """Choose the discretisation that has ``steps`` steps down to ``t_min``; the calls it makes."""
    for asked in (steps, steps + 1):
        try:
            scheduler.set_timesteps(asked, device=device)
        except (IndexError, ValueError) as error:
            raise ValueError(f"{PREFIX}{name} cannot make {steps} steps: {error}") from error
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)  # rounded timesteps repeat: go by place, not by value
        calls = len(scheduler.timesteps)
        bottom = _lowest(scheduler) * (1 + _SAME_LEVEL)
        start, end = ratios_of(scheduler, kind, calls - 1)
        if start > bottom >= end:
            return calls
    if start > bottom or calls < 2:
        raise ValueError(f"{PREFIX}{name} does not come down to t_min in {steps} steps")
    return calls - 1


def _lowest(scheduler: Any) -> float:
    """``sigma / alpha`` at the chain's first level."""
    alpha_bars = getattr(scheduler, "alphas_cumprod", None)
    if alpha_bars is None:
        return float(scheduler.config.sigma_min)
    return math.sqrt((1 - alpha_bars[0].item()) / alpha_bars[0].item())


def ratios_of(scheduler: Any, kind: Kind, call: int) -> tuple[float, float]:
    """``sigma / alpha`` that the scheduler computes with in this call, and at the step's end."""
    if not hasattr(scheduler, "sigmas") or not hasattr(scheduler, "step_index"):
        return _table_ratios(scheduler, call)
    sigmas = scheduler.sigmas
    if getattr(scheduler, "state_in_first_order", True):
        return sigmas[call].item(), sigmas[call + 1].item()
    if kind.interpolated is None:
        return sigmas[call].item(), sigmas[call].item()
    return scheduler.sigmas_interpol[call + kind.interpolated].item(), sigmas[call].item()


def _table_ratios(scheduler: Any, call: int) -> tuple[float, float]:
    """Of a scheduler that goes by timesteps."""
    timestep = int(scheduler.timesteps[call])
    if hasattr(scheduler, "previous_timestep"):
        previous = int(scheduler.previous_timestep(scheduler.timesteps[call]))
    else:
        previous = timestep - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    start = scheduler.alphas_cumprod[timestep].item()
    final = getattr(scheduler, "final_alpha_cumprod", torch.ones(()))
    end = (scheduler.alphas_cumprod[previous] if previous >= 0 else final).item()
    return math.sqrt((1 - start) / start), math.sqrt((1 - end) / end)
