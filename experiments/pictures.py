"""Pictures of the samples themselves: scatters over the true density, image grids, strips."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, sqrt

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.nn import functional

from experiments.canvas import GREY, WIDTH, picture

Density = Callable[[Tensor], Tensor]
POINTS = 600  # of a scatter; more hide the density below
_GRID = 160  # points of the density grid along each axis
_MASS = (0.99, 0.9, 0.5)  # contours that hold so much of the true probability
_POINT = "#C2410C"
_SHADES = ("#E4ECF5", "#BFD3E8", "#8FB2D6")
_HEAT = LinearSegmentedColormap.from_list("heat", ["white", "#8FB2D6", "#0072B2", "#00304F"])


@dataclass
class SampleGroup:
    """One row of panels: what several samplers made of one target.

    Attributes:
        title: e.g. "ring · VP, 50 evaluations".
        panels: sampler -> samples (N, *event); None where it failed.
        truth: true samples (M, *event), shown first; they also set the axes and the grey scale.
        density: log density of a 2-D target, (M, 2) -> (M,), drawn as contours.
        notes: sampler -> a short remark below its panel, such as a metric's value.
        truth_name: title of the panel of true samples.
    """

    title: str
    panels: Mapping[str, Tensor | None]
    truth: Tensor | None = None
    density: Density | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    truth_name: str = "true samples"


def samples_figure(
    path: str | os.PathLike[str], groups: Sequence[SampleGroup], *, columns: int = 5
) -> None:
    """Write one panel per sampler: scatter, histogram or image grid, as the samples' shape asks.

    Events ``()`` and ``(1,)``: histogram; ``(2,)``: scatter over the true density; ``(D,)``:
    two-dimensional histogram in the plane in which true samples vary most; ``(H, W)`` and
    ``(C, H, W)``: images.

    Args:
        path: the PNG to write.
        groups: one after another, each under its title.
        columns: panels side by side, at most.
    Raises:
        ValueError: there is nothing to draw, or events of another shape.
    """
    lists = [_panels_of(group) for group in groups]
    if not any(lists):
        raise ValueError("groups must hold at least one panel, got none")
    across = min(columns, max(map(len, lists)))
    side = WIDTH / across
    rows = [ceil(len(panels) / across) for panels in lists]
    heights = [
        0.27 + (side + (0.34 if group.notes else 0.18)) * n
        for group, n in zip(groups, rows, strict=True)
    ]
    with picture(path, height=sum(heights)) as figure:
        parts = figure.subfigures(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
        for part, group, panels, down in zip(parts, groups, lists, rows, strict=True):
            part.suptitle(group.title, x=0.008, ha="left", fontsize=10, fontweight="bold")
            axes = part.subplots(down, across, squeeze=False).ravel()
            known = [p for _, p in panels if p is not None]
            frame = _Frame(group.truth if group.truth is not None else known[0] if known else None)
            for ax in axes[len(panels) :]:
                ax.set_axis_off()
            for k, (ax, (name, samples)) in enumerate(zip(axes, panels, strict=False)):
                ax.set_title(name, fontsize=8.5, pad=3)
                ax.tick_params(labelleft=k % across == 0)
                if samples is None or len(samples) == 0:
                    _empty(ax, "failed")
                else:
                    frame.draw(ax, samples, group.density)
                if name in group.notes:
                    ax.set_xlabel(group.notes[name], fontsize=8, color=GREY, labelpad=3)


def strip_figure(
    path: str | os.PathLike[str],
    trajectory: Tensor,
    times: Tensor | Sequence[float],
    *,
    columns: int = 10,
    rows: int = 6,
    density: Density | None = None,
) -> None:
    """Write a strip of the denoising steps, noise at the left and samples at the right.

    Images: one line per sample, each column with its own grey scale (noise may be a thousand times
    larger than the image). Vectors: one scatter of all samples per time, with its own axes.

    Args:
        path: the PNG to write.
        trajectory: (T, B, *event), as in ``Solution.trajectory``.
        times: (T,) times of it.
        columns: moments shown, evenly spread, with the first and the last; of vectors at most 6.
        rows: images shown of each moment.
        density: log density of a 2-D target, drawn below the last scatter.
    Raises:
        ValueError: no moments, or times that do not fit.
    """
    moments = torch.as_tensor(times).detach().cpu().double().flatten()
    if trajectory.ndim < 2 or len(trajectory) == 0 or len(trajectory) != len(moments):
        raise ValueError(
            "trajectory must have shape (T, B, *event) with as many times, "
            f"got {tuple(trajectory.shape)} and {len(moments)} times"
        )
    last = len(moments) - 1
    images = trajectory.ndim > 3
    if not images:
        columns = min(columns, 6)  # axes with numbers need the room
    chosen = sorted({round(i * last / max(columns - 1, 1)) for i in range(columns)})
    states = [_cpu(trajectory[i]) for i in chosen]
    plane = _Plane.of(states[-1])
    down = min(rows, len(states[0])) if images else 1
    side = WIDTH / max(len(chosen), 4)
    with picture(path, height=0.3 + side * down + (0.0 if images else 0.05)) as figure:
        axes = figure.subplots(down, len(chosen), squeeze=False)
        for j, (index, state) in enumerate(zip(chosen, states, strict=True)):
            axes[0, j].set_title(f"t = {moments[index]:.3g}", fontsize=8, pad=3)
            if not images:
                ends = density if index == last else None
                _Frame(state, plane).draw(axes[0, j], state, ends, counted=False)
                axes[0, j].tick_params(labelsize=6.5)
                continue
            frame = _Frame(state)
            for i in range(down):
                frame.draw(axes[i, j], state[i : i + 1], None)


@dataclass(frozen=True)
class _Plane:
    """Where vectors of more than two numbers are seen from.

    Attributes:
        centre: (D,) mean of some samples.
        axes: (D, 2), the directions in which they vary most; the largest entry is positive.
    """

    centre: Tensor
    axes: Tensor

    @classmethod
    def of(cls, x: Tensor) -> _Plane | None:
        """Of samples (N, D); None where there is nothing to choose."""
        if x.ndim != 2 or x.shape[1] < 3:
            return None
        flat = x.double()
        centred = flat - flat.mean(0)
        _, axes = torch.linalg.eigh(centred.T @ centred)
        axes = axes[:, [-1, -2]]
        largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
        return cls(flat.mean(0), axes * largest.sign())

    def seen(self, x: Tensor) -> Tensor:
        """(N, D) -> (N, 2)."""
        return (x.double() - self.centre) @ self.axes


class _Frame:
    """The axes or grey scale that all panels of one target share."""

    def __init__(self, truth: Tensor | None, plane: _Plane | None = None) -> None:
        self.low, self.high = np.zeros(2), np.ones(2)
        self.plane = plane
        if truth is None:
            return
        x = _cpu(truth)
        if x.ndim > 2:
            self.low, self.high = np.quantile(x.numpy(), (0.001, 0.999))
            return
        self.plane = plane or _Plane.of(x)
        seen = x.reshape(len(x), -1) if self.plane is None else self.plane.seen(x)
        flat = seen.double().numpy()
        low, high = np.quantile(flat, (0.002, 0.998), axis=0)
        centre = (low + high) / 2
        # Square panels: one number on both axes has one length.
        reach = max(float((high - low).max()), 1e-12) / 2 * 1.3
        self.low, self.high = centre - reach, centre + reach

    def draw(
        self, ax: Axes, samples: Tensor, density: Density | None, *, counted: bool = True
    ) -> None:
        x = _cpu(samples)
        if x.ndim in (3, 4):
            self._images(ax, x)
        elif x.ndim > 4:
            raise ValueError(f"events of shape {tuple(x.shape[1:])} cannot be drawn")
        elif x.ndim == 1 or x.shape[1] == 1:
            self._histogram(ax, x.reshape(len(x)), density)
        elif x.shape[1] == 2:
            self._scatter(ax, x, density, counted)
        else:
            self._projected(ax, x)

    def _images(self, ax: Axes, x: Tensor) -> None:
        span = max(float(self.high - self.low), 1e-12)
        tiles = tile_images((x - float(self.low)) / span)
        ax.imshow(tiles, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        ax.set_axis_on()
        _bare(ax)

    def _scatter(self, ax: Axes, x: Tensor, density: Density | None, counted: bool) -> None:
        if density is not None:
            _contours(ax, density, self.low, self.high)
        shown = x[:POINTS].numpy()
        ax.scatter(shown[:, 0], shown[:, 1], s=2.0, color=_POINT, alpha=0.5, linewidths=0, zorder=3)
        self._square(ax)
        inside = (x.double().numpy() >= self.low) & (x.double().numpy() <= self.high)
        outside = 1 - float(inside.all(axis=1).mean())
        if counted and outside >= 0.005:
            _corner(ax, f"{outside:.0%} outside")

    def _projected(self, ax: Axes, x: Tensor) -> None:
        plane = self.plane or _Plane.of(x)
        if plane is None:
            raise ValueError(f"events of shape {tuple(x.shape[1:])} cannot be drawn")
        box = [[float(self.low[i]), float(self.high[i])] for i in (0, 1)]
        first, second = plane.seen(x).T.numpy()
        counts, _, _ = np.histogram2d(first, second, bins=48, range=box)
        ax.imshow(
            np.sqrt(counts.T),
            origin="lower",
            extent=(box[0][0], box[0][1], box[1][0], box[1][1]),
            cmap=_HEAT,
            aspect="auto",
        )
        self._square(ax)
        _corner(ax, f"{x.shape[1]}-D, projected")

    def _histogram(self, ax: Axes, x: Tensor, density: Density | None) -> None:
        low, high = float(self.low[0]), float(self.high[0])
        values = x.double().numpy()
        width = (high - low) / 40
        counts, edges = np.histogram(values, bins=40, range=(low, high))
        ax.stairs(counts / (len(values) * width), edges, fill=True, color=_SHADES[2])
        if density is not None:
            grid = torch.linspace(low, high, 400, dtype=torch.float64)[:, None]
            ax.plot(grid[:, 0], density(grid).exp().cpu(), color="black", linewidth=1)
        ax.set_xlim(low, high)
        ax.set_yticks([])
        ax.grid(False)

    def _square(self, ax: Axes) -> None:
        ax.set_xlim(self.low[0], self.high[0])
        ax.set_ylim(self.low[1], self.high[1])
        ax.set_box_aspect(1)
        ax.grid(False)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(3))
        ax.tick_params(labelsize=7, length=2, pad=1.5)
        ax.spines[["top", "right"]].set_visible(True)


def tile_images(x: Tensor, limit: int = 25) -> np.ndarray:
    """A nearly square grid of the first images: (H', W') grey or (H', W', 3), clipped to [0, 1].

    Args:
        x: (N, H, W) or (N, C, H, W), C = 3 for colour; of other numbers of channels the first.
        limit: at most so many images.
    """
    images = x if x.ndim == 4 else x[:, None]
    images = images if images.shape[1] == 3 else images[:, :1]
    images = images[:limit].float().clamp(0, 1)
    across = ceil(sqrt(len(images)))
    down = ceil(len(images) / across)
    pad = max(1, round(images.shape[-1] / 16))
    blank = images.new_ones(across * down - len(images), *images.shape[1:])
    framed = functional.pad(torch.cat([images, blank]), (0, pad, 0, pad), value=1.0)
    _, c, h, w = framed.shape
    grid = framed.reshape(down, across, c, h, w).permute(0, 3, 1, 4, 2)
    grid = grid.reshape(down * h, across * w, c)[:-pad, :-pad]
    return grid.squeeze(-1).numpy() if c == 1 else grid.numpy()


def _contours(ax: Axes, density: Density, low: np.ndarray, high: np.ndarray) -> None:
    """Filled regions of highest density that hold 99, 90 and 50 % of the probability."""
    xs, ys = (torch.linspace(low[i], high[i], _GRID, dtype=torch.float64) for i in (0, 1))
    points = torch.cartesian_prod(xs, ys)
    values = density(points).detach().cpu().double().exp().numpy()
    ordered = np.sort(values)[::-1]
    mass = np.cumsum(ordered) / ordered.sum()
    levels = sorted({float(ordered[np.searchsorted(mass, m)]) for m in _MASS})
    top = float(ordered[0])
    if not levels or not np.isfinite(top) or levels[-1] >= top:
        return
    grid = values.reshape(_GRID, _GRID).T
    ax.contourf(xs, ys, grid, levels=[*levels, top * 1.01], colors=_SHADES[-len(levels) :])


def _panels_of(group: SampleGroup) -> list[tuple[str, Tensor | None]]:
    first = [] if group.truth is None else [(group.truth_name, group.truth)]
    return [*first, *group.panels.items()]


def _corner(ax: Axes, text: str) -> None:
    ax.text(
        0.97,
        0.03,
        text,
        transform=ax.transAxes,
        ha="right",
        va="bottom",
        fontsize=7,
        bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1.5},
        zorder=5,
    )


def _empty(ax: Axes, text: str) -> None:
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=GREY)
    ax.set_box_aspect(1)
    _bare(ax)


def _bare(ax: Axes) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(False)
    ax.spines[:].set_visible(False)


def _cpu(x: Tensor) -> Tensor:
    return x.detach().cpu()
