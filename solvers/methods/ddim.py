"""DDIM: ancestral sampling without its noise."""

from __future__ import annotations

from dataclasses import dataclass

from solvers.methods.ancestral import Ancestral


@dataclass(frozen=True)
class DDIM(Ancestral):
    """Exact ODE step for a constant eps (Song, Meng & Ermon 2021, arXiv:2010.02502); eta as in
    Ancestral."""

    eta: float = 0.0
