"""What a certificate consists of, and how much is measured for one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

TOLERANCE = 0.25  # by which a measured order may miss the declared one


@dataclass(frozen=True)
class Curve:
    """Errors against numbers of steps on one problem; ``slope`` is fitted to the finest."""

    problem: str
    steps: tuple[int, ...]
    errors: tuple[float, ...]
    declared: float
    slope: float | None

    @property
    def passed(self) -> bool:
        """Whether the declared order is met; no slope: the errors are rounding, the order
        infinite."""
        return self.slope is None or self.slope >= self.declared - TOLERANCE


@dataclass(frozen=True)
class Check:
    """One row of a certificate.

    Attributes:
        key: ``uniform``, ``uneven``, ``start``, ``strong``, ``limit``, ``nfe``, ``split``,
            ``short``.
        name: what was checked, in words.
        declared, measured: what is compared, as printed.
        passed: ``None``: could not be measured, for the reason in ``note``.
        curves: what an order was fitted to, the worst first.
    """

    key: str
    name: str
    declared: str
    measured: str
    passed: bool | None
    note: str = ""
    curves: tuple[Curve, ...] = ()


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        flows: ``(target, SDE)`` of deterministic orders.
        laws: SDEs of weak orders.
        paths: SDEs of strong orders.
        tolerances: of adaptive methods.
        most: steps up to which grids are refined when a slope misses.
        scale: factor on the first numbers of steps.
    """

    flows: tuple[tuple[str, str], ...] = tuple(
        (target, sde) for target in ("ring", "gaussian") for sde in ("vp", "ve", "subvp")
    )
    laws: tuple[str, ...] = ("vp", "ve", "subvp")
    paths: tuple[str, ...] = ("vp", "ve")
    tolerances: tuple[float, ...] = (1e-4, 1e-6, 1e-8)
    most: int = 3200
    scale: float = 1.0


FULL = Sizes()
QUICK = Sizes(
    flows=(("ring", "vp"), ("gaussian", "ve")),
    laws=("vp", "ve"),
    paths=("vp",),
    tolerances=(1e-4, 1e-6),
    most=1600,
    scale=0.75,
)


@dataclass
class Certificate:
    """All checks of one solver.

    Attributes:
        name: as on the command line.
        kind: ``ODE`` or ``SDE``.
        order, weak_order: declared.
        peer: whether it is another library's: its misses are shown, and are not ours.
    """

    name: str
    kind: str
    order: float
    weak_order: float
    settings: dict[str, Any]
    checks: list[Check] = field(default_factory=list)
    seconds: float = 0.0
    peer: bool = False

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.passed is not False for check in self.checks)

    def get(self, key: str) -> Check | None:
        """The check with a key, the failed one if there are several."""
        found = [check for check in self.checks if check.key == key]
        return min(found, key=lambda c: c.passed is not False, default=None)
