"""Messages for bad input: every one names the argument, the value and what would be right."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable


class NonFiniteError(ArithmeticError):
    """A score function returned NaN or infinity while sampling.

    Attributes:
        step: index of the first step whose result was not finite.
        time: SDE time at which that step started.
    """

    def __init__(self, message: str, step: int, time: float) -> None:
        super().__init__(message)
        self.step = step
        self.time = time


def unknown_name(kind: str, name: object, known: Iterable[str]) -> ValueError:
    """A ``ValueError`` that says which names exist and which one was probably meant."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return ValueError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(names)}.")


def require_finite(name: str, value: float, *, above: float = -math.inf) -> None:
    """Raise ``ValueError`` unless ``value`` is a finite number greater than ``above``."""
    try:
        ok = math.isfinite(value) and value > above
    except TypeError:
        raise TypeError(
            f"{name} must be a number, got {value!r} ({type(value).__name__})"
        ) from None
    if not ok:
        bound = "" if above == -math.inf else f" greater than {above:g}"
        raise ValueError(f"{name} must be a finite number{bound}, got {value!r}")


def require_between(name: str, value: float, low: float, high: float) -> None:
    """Raise ``ValueError`` unless ``low <= value <= high``."""
    require_finite(name, value)
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}], got {value!r}")


def require_count(name: str, value: object, *, least: int = 1, most: int | None = None) -> int:
    """``value`` as an ``int``; raises unless it is a whole number in ``least .. most``."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be a whole number, got {value!r} ({type(value).__name__})")
    count = value.__index__()
    if count < least:
        raise ValueError(f"{name} must be at least {least}, got {count}")
    if most is not None and count > most:
        raise ValueError(f"{name} must be at most {most}, got {count}")
    return count
