"""Time grids: ``(sde, steps) -> times``, decreasing, ``(steps + 1,)`` float64 on the CPU.

A grid owns both its ends, ``t_max`` and ``t_min``. Zero noise is never an entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sde_diffusion.errors import require_count, require_finite, unknown_name
from sde_diffusion.sde import SDE

Grid = Callable[[SDE, int], Tensor]


def time(sde: SDE, steps: int) -> Tensor:
    """Uniform in t. For VE this is uniform in log-SNR too."""
    return torch.linspace(sde.t_max, sde.t_min, steps + 1, dtype=torch.float64)


def quadratic(sde: SDE, steps: int) -> Tensor:
    """Uniform in sqrt(t) (Song, Meng & Ermon 2021, arXiv:2010.02502, app. D.2)."""
    roots = torch.linspace(
        math.sqrt(sde.t_max), math.sqrt(sde.t_min), steps + 1, dtype=torch.float64
    )
    return _pinned(roots**2, sde)


def cosine(sde: SDE, steps: int) -> Tensor:
    """Chebyshev points in t: dense at both ends."""
    angle = torch.linspace(0, math.pi, steps + 1, dtype=torch.float64)
    return sde.t_min + (sde.t_max - sde.t_min) * 0.5 * (1 + angle.cos())


def log_snr(sde: SDE, steps: int) -> Tensor:
    """Uniform in log-SNR (Lu et al. 2022, arXiv:2206.00927, sec. 3.4)."""
    low, high = _ends(sde)
    return _pinned(sde.time(torch.linspace(low, high, steps + 1, dtype=torch.float64)), sde)


def karras(sde: SDE, steps: int, rho: float = 7.0) -> Tensor:
    """Uniform in ``(sigma / alpha)^(1 / rho)`` (Karras et al. 2022, arXiv:2206.00364, eq. 5)."""
    require_finite("rho", rho, above=0.0)
    return karras_between(sde, float(sde.t_max), float(sde.t_min), steps, rho)


def karras_between(sde: SDE, first: float, last: float, steps: int, rho: float = 7.0) -> Tensor:
    """``karras`` on a part of the range, from time ``first`` down to ``last``."""
    ends = torch.tensor([first, last], dtype=torch.float64)
    largest, smallest = (math.exp(-v / rho) for v in sde.at(ends).half_log_snr.tolist())
    roots = torch.linspace(largest, smallest, steps + 1, dtype=torch.float64)
    times = sde.time(-rho * roots.log())
    times[0], times[-1] = first, last
    return times


def arctan(sde: SDE, steps: int, rho: float = 3.0, scale: float = 0.5) -> Tensor:
    """Uniform in ``arctan((sigma / (alpha scale))^(1 / rho))``: dense where noise and data compare.

    Where the noise outweighs the data, or is below its finest detail, x0 hardly changes; a grid
    uniform in log-SNR spends most steps there. At rho = 1 the variable is the
    angle of Lu & Song 2024 (arXiv:2410.11081, TrigFlow), with ``scale`` their sigma_d, and their
    0.5 as default; the root tempers it as in
    ``karras``, which is the limit of large ``scale``. As rho grows the grid becomes ``log_snr``.

    Args:
        rho: above 0. More steps, or solvers of higher order, want less of it: 4 at 5 steps and 2
            at 20 and above were best on the mixtures of ``benchmarks/accuracy.py``.
        scale: above 0, in units of the data; detail that is finer than 0.5 wants it smaller.
    """
    require_finite("rho", rho, above=0.0)
    require_finite("scale", scale, above=0.0)
    middle = -math.log(scale)
    widest, least = (math.atan(math.exp((middle - value) / rho)) for value in _ends(sde))
    angles = torch.linspace(widest, least, steps + 1, dtype=torch.float64)
    return _pinned(sde.time(middle - rho * angles.tan().log()), sde)


def table(sde: SDE, steps: int) -> Tensor:
    """The SDE's own discrete times, evenly thinned; uniform in t where more are asked for than it
    has."""
    own = getattr(sde, "times", None)
    if own is None:
        raise ValueError(
            f"grid 'table' needs an SDE with times of its own (TabulatedVPSDE), got {sde!r}"
        )
    inner = own[(own > sde.t_min * (1 + 1e-12)) & (own < sde.t_max * (1 - 1e-12))]
    own = torch.cat([own.new_tensor([sde.t_min]), inner, own.new_tensor([sde.t_max])])
    if steps >= len(own):
        return time(sde, steps)
    chosen = torch.linspace(len(own) - 1, 0, steps + 1, dtype=torch.float64).round().long()
    return own[chosen].clone()


GRIDS: dict[str, Grid] = {
    "arctan": arctan,
    "cosine": cosine,
    "karras": karras,
    "log_snr": log_snr,
    "quadratic": quadratic,
    "table": table,
    "time": time,
}


def _pinned(times: Tensor, sde: SDE) -> Tensor:
    """``times`` with both ends exactly the SDE's, which a change of variables gives to rounding."""
    times[0], times[-1] = sde.t_max, sde.t_min
    return times


def _ends(sde: SDE) -> tuple[float, float]:
    """``half_log_snr`` at ``t_max`` and at ``t_min``."""
    return sde.at(float(sde.t_max)).half_log_snr.item(), sde.at(
        float(sde.t_min)
    ).half_log_snr.item()


def resolve(
    grid: str | Grid | Sequence[float] | Tensor | None, sde: SDE, steps: int | None
) -> Tensor:
    """The times that ``sample``'s arguments ``grid`` and ``steps`` stand for, checked.

    Args:
        grid: a name in ``GRIDS``, a callable, decreasing times, or ``None`` for the SDE's default.
        steps: number of steps; may be left out when times are given.
    Raises:
        ValueError: unknown name, no steps, times that are not finite, not positive, beyond
            ``t_max`` or not strictly decreasing (naming the index).
    """
    if grid is None or isinstance(grid, str) or callable(grid):
        if steps is None:
            raise ValueError("steps is missing: give the number of steps, or times as grid")
        count = require_count("steps", steps)
        times = _checked(_named(grid or sde.default_grid)(sde, count), sde)
    else:
        times = _checked(torch.as_tensor(grid, dtype=torch.float64), sde)
        count = len(times) - 1 if steps is None else require_count("steps", steps)
    if len(times) != count + 1:
        raise ValueError(
            f"grid has {len(times)} times, which make {len(times) - 1} steps, but steps={count}"
        )
    return times


def _named(grid: str | Grid) -> Grid:
    if not isinstance(grid, str):
        return grid
    if grid not in GRIDS:
        raise unknown_name("grid", grid, GRIDS)
    return GRIDS[grid]


def _checked(times: Tensor, sde: SDE) -> Tensor:
    times = torch.as_tensor(times, dtype=torch.float64).detach().cpu()
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(
            f"grid must hold at least two times in one dimension, got shape {tuple(times.shape)}"
        )
    # A float32 time may round up; NaN compares false.
    outside = ~((times > 0) & (times <= sde.t_max * (1 + 1e-6)))
    if bool(outside.any()):
        index = int(outside.nonzero()[0])
        t = times[index].item()
        if math.isfinite(t) and t > 0:
            raise ValueError(f"grid[{index}]={t!r} lies beyond t_max={sde.t_max!r}")
        raise ValueError(
            f"grid[{index}] must be a finite time above 0, got {t!r}: "
            f"grids end at t_min={sde.t_min:g}"
        )
    rising = (times.diff() >= 0).nonzero()
    if len(rising):
        index = int(rising[0]) + 1
        pair = times[index - 1 : index + 1].tolist()
        raise ValueError(
            f"grid must decrease strictly, but grid[{index}]={pair[1]!r} follows {pair[0]!r}"
        )
    return times


def __getattr__(name: str) -> Any:
    """``grids.fit`` is ``solvers.fitted_grid.fit``; it samples, and sampling needs this module."""
    if name == "fit":
        from solvers.fitted_grid import fit

        return fit
    raise AttributeError(f"module 'solvers.grids' has no attribute {name!r}")
