"""The SDEs by name, for files and the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sde_diffusion.errors import require_count, unknown_name
from sde_diffusion.sde import EDMSDE, SDE, VESDE, VPSDE, CosineVPSDE, SubVPSDE
from sde_diffusion.tabulated import TabulatedVPSDE

SDES: dict[str, type[SDE]] = {
    "vp": VPSDE,
    "cosine": CosineVPSDE,
    "subvp": SubVPSDE,
    "ve": VESDE,
    "edm": EDMSDE,
}


def named_sde(name: str) -> SDE:
    """The SDE called ``name`` (``vp``, ``cosine``, ``subvp``, ``ve``, ``edm``) with its default
    settings."""
    if name not in SDES:
        raise unknown_name("SDE", name, SDES)
    return SDES[name]()


@dataclass(frozen=True)
class LinearChain:
    """A DDPM chain of T steps of noise, its variance linear from beta_1 to beta_T (Ho et
    al. 2020, section 4)."""

    beta_1: float = 1e-4
    beta_T: float = 0.02  # noqa: N815 - the paper's letter
    T: int = 1000

    def __post_init__(self) -> None:
        require_count("T", self.T, least=2)

    def sde(self) -> TabulatedVPSDE:
        """The chain as a continuous SDE."""
        betas = torch.linspace(self.beta_1, self.beta_T, self.T, dtype=torch.float64)
        return TabulatedVPSDE.from_betas(betas)


def sde_from_config(config: dict[str, Any]) -> SDE:
    """The SDE whose ``config()`` this is.

    Raises:
        ValueError: an unknown kind, or settings that this kind does not take.
    """
    every: list[type[SDE]] = [*SDES.values(), TabulatedVPSDE]
    kinds = {kind.__name__: kind for kind in every}
    settings = dict(config)
    kind = settings.pop("kind", None)
    if kind not in kinds:
        raise unknown_name("SDE kind", kind, kinds)
    if kind == "TabulatedVPSDE" and "betas" in settings:
        settings["betas"] = tuple(settings["betas"])
    try:
        return kinds[kind](**settings)
    except TypeError as error:
        raise ValueError(f"settings of SDE kind {kind!r} do not fit: {error}") from None
