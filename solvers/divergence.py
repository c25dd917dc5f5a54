"""Traces of the Jacobian of a prediction's noise: exact, Hutchinson's estimate, Hutch++.

An exact trace takes one product with the Jacobian per dimension, an estimate one per probe; how
they are made stands in ``solvers.jacobian``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sde_diffusion.errors import require_count, unknown_name
from solvers.jacobian import Jacobian
from solvers.noise import CounterNoise

LAWS = ("rademacher", "gaussian")
_PROBES, _SKETCH = 1, 2  # slots of the counter noise


class Divergence(ABC):
    """A way to the trace of a Jacobian. Frozen dataclass of settings."""

    @property
    @abstractmethod
    def values(self) -> int:
        """Values per sample that an estimate has: one for each independent probe."""

    @property
    def exact(self) -> bool:
        """Whether the value is the trace itself."""
        return False

    def draw(self, x: Tensor, noise: CounterNoise) -> Tensor:
        """What is fixed along the path, ``(vectors, B, D)``, for ``x`` of ``(B, D)``."""
        return x.new_empty(0, *x.shape)

    @abstractmethod
    def products(self, dimension: int) -> int:
        """Products with the Jacobian that one evaluation takes."""

    @abstractmethod
    def estimate(self, jacobian: Jacobian, drawn: Tensor) -> Tensor:
        """``(B, values)``."""


@dataclass(frozen=True)
class Exact(Divergence):
    """The trace, by one product for each dimension."""

    @property
    def values(self) -> int:
        return 1

    @property
    def exact(self) -> bool:
        return True

    def products(self, dimension: int) -> int:
        return dimension

    def estimate(self, jacobian: Jacobian, drawn: Tensor) -> Tensor:
        count, dimension = jacobian.shape
        total = jacobian.eps.new_zeros(count)
        for chosen in torch.arange(dimension).split(jacobian.vectors):
            basis = jacobian.eps.new_zeros(len(chosen), count, dimension)
            basis[torch.arange(len(chosen)), :, chosen] = 1
            rows = jacobian(basis)
            for row, place in zip(rows, chosen.tolist(), strict=True):  # one order, whatever passes
                total = total + row[:, place]
        return total[:, None]


@dataclass(frozen=True)
class Hutchinson(Divergence):
    """``E[v J v] = tr J`` (Hutchinson 1990; Grathwohl et al. 2019, arXiv:1810.01367, sec. 3.1).

    Args:
        probes: independent vectors v, the same along the whole path.
        law: of v: ``rademacher`` (signs; the smaller variance) or ``gaussian``.
    """

    probes: int = 1
    law: Literal["rademacher", "gaussian"] = "rademacher"

    def __post_init__(self) -> None:
        require_count("probes", self.probes)
        if self.law not in LAWS:
            raise unknown_name("law", self.law, LAWS)

    @property
    def values(self) -> int:
        return self.probes

    def draw(self, x: Tensor, noise: CounterNoise) -> Tensor:
        return _vectors(x, noise, self.probes, _PROBES, self.law)

    def products(self, dimension: int) -> int:
        return self.probes

    def estimate(self, jacobian: Jacobian, drawn: Tensor) -> Tensor:
        return jacobian.quadratic(drawn).mT.contiguous()


@dataclass(frozen=True)
class HutchPlusPlus(Divergence):
    """The trace on the range of a random sketch, and an estimate of the rest.

    With Q an orthonormal basis of the range of ``S J``: ``tr(Q^T J Q)``, and for the rest ``(D - k)
    E[u J u]``, u uniform on the unit sphere of the complement of Q's k columns (Meyer, Musco, Musco
    & Woodruff 2021, arXiv:2010.09649, alg. 1; probes normalised as in Epperly, Tropp & Webber 2024,
    arXiv:2301.07825, sec. 2.3: otherwise a multiple of the identity, which these Jacobians nearly
    are at high noise, would have a variance). Gaussian S and u, fixed along the path.

    Args:
        probes: products in one evaluation, at least 3: a third for the sketch, a third for its
            trace, the others for the rest. Exact from ``3 D`` on.
    """

    probes: int = 3

    def __post_init__(self) -> None:
        require_count("probes", self.probes, least=3)

    @property
    def sketch(self) -> int:
        """Columns of S."""
        return self.probes // 3

    @property
    def values(self) -> int:
        return self.probes - 2 * self.sketch

    def draw(self, x: Tensor, noise: CounterNoise) -> Tensor:
        return torch.cat(
            [
                _vectors(x, noise, self.sketch, _SKETCH, "gaussian"),
                _vectors(x, noise, self.values, _PROBES, "gaussian"),
            ]
        )

    def products(self, dimension: int) -> int:
        return self.probes

    def estimate(self, jacobian: Jacobian, drawn: Tensor) -> Tensor:
        sketch, probes = drawn[: self.sketch], drawn[self.sketch :]
        # (B, D, columns); no more columns than dimensions.
        basis = torch.linalg.qr(jacobian(sketch).permute(1, 2, 0)).Q.permute(2, 0, 1).contiguous()
        left = drawn.shape[2] - len(basis)
        for vector in basis:
            probes = probes - (probes * vector).sum(-1, keepdim=True) * vector
        if left:
            probes = probes / probes.norm(dim=-1, keepdim=True)
        both = jacobian.quadratic(torch.cat([basis, probes]))
        known = both[0]
        for more in both[1 : len(basis)]:
            known = known + more
        return (known + left * both[len(basis) :]).mT.contiguous()


def named_divergence(name: str | Divergence, probes: int, law: str) -> Divergence:
    """``exact``, ``hutchinson`` or ``hutch++`` with so many probes; a ``Divergence`` as it is."""
    if isinstance(name, Divergence):
        return name
    kinds: dict[str, Callable[[], Divergence]] = {
        "exact": Exact,
        "hutchinson": lambda: Hutchinson(probes, law),  # type: ignore[arg-type]
        "hutch++": lambda: HutchPlusPlus(probes),
    }
    if name not in kinds:
        raise unknown_name("divergence", name, kinds)
    return kinds[name]()


def _vectors(x: Tensor, noise: CounterNoise, count: int, slot: int, law: str) -> Tensor:
    normal = torch.stack([noise.normal(x, index, slot) for index in range(count)])
    return normal if law == "gaussian" else torch.where(normal < 0, -1.0, 1.0).to(x.dtype)
