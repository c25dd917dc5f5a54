"""The two pictures of docs/ito.md: ``python -m experiments.ito_pictures docs``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from experiments.canvas import COLOURS, picture
from sde_diffusion import GaussianMixture
from sde_diffusion.ito import (
    CriticallyDampedLangevin,
    GammaMixture,
    SquareRootProcess,
    gradient_of,
)
from solvers import ito, sample_ito


def langevin_picture(path: Path) -> None:
    """Position and velocity of a one-dimensional mixture, forward and back, and the end's law."""
    langevin = CriticallyDampedLangevin()
    target = GaussianMixture(
        torch.tensor([[-1.2], [0.9]]), torch.tensor([0.04, 0.12]), torch.tensor([0.4, 0.6])
    )
    exact, sde = langevin.exact(target), langevin.sde()
    times = (langevin.t_min, 0.15, 0.4, 1.0)
    run = sample_ito(
        sde.reverse(exact.score),
        ito.EulerMaruyama(),
        shape=(4000, 2, 1),
        steps=400,
        grid="quadratic",
        trajectory=True,
        dtype=torch.float64,
    )
    if run.trajectory is None or run.trajectory_times is None:
        raise RuntimeError("the run kept no trajectory")
    with picture(path, height=4.0) as figure:
        upper = figure.subplots(2, 4, sharex=True, gridspec_kw={"height_ratios": (3, 2)})
        for k, t in enumerate(times):
            index = int((run.trajectory_times - t).abs().argmin())
            states = run.trajectory[index]
            at = torch.tensor(t, dtype=torch.float64)
            _phase(upper[0, k], states, lambda u, at=at: exact.log_prob(u, at))  # type: ignore[misc]
            upper[0, k].set_title(f"t = {t:g}")
            _positions(upper[1, k], states[:, 0, 0], exact.sample(200_000, 1, t)[:, 0, 0])
            upper[1, k].set_xlabel("position")
        upper[0, 0].set_ylabel("velocity")
        upper[1, 0].set_ylabel("density")
        upper[1, 0].set_ylim(0, 1.2)
        upper[1, 0].legend(loc="upper right", fontsize=7.5)


def _phase(axes: Axes, states: Tensor, log_prob: Callable[[Tensor], Tensor]) -> None:
    x, v = np.meshgrid(np.linspace(-3, 3, 121), np.linspace(-1.8, 1.8, 121))
    grid = torch.from_numpy(np.stack([x.ravel(), v.ravel()], 1))[:, :, None]
    density = log_prob(grid).exp().reshape(x.shape).numpy()
    shown = states[:600, :, 0].numpy()
    axes.scatter(shown[:, 0], shown[:, 1], s=2.5, color=COLOURS[0], alpha=0.5, linewidths=0)
    axes.contour(x, v, density, levels=4, colors=COLOURS[1], linewidths=0.8)
    axes.set_ylim(-1.8, 1.8)


def _positions(axes: Axes, found: Tensor, exact: Tensor) -> None:
    bins = list(np.linspace(-3, 3, 61))
    axes.hist(found.numpy(), bins, density=True, color=COLOURS[0], alpha=0.5, label="reverse SDE")
    axes.hist(exact.numpy(), bins, density=True, histtype="step", color=COLOURS[1], label="exact")


def square_root_picture(path: Path) -> None:
    """The square-root process restoring a gamma mixture: SDE, ODE, without the divergence, and one
    class by its classifier."""
    process = SquareRootProcess()
    data = GammaMixture(process, torch.tensor([0.08, 1.0]), torch.tensor([0.4, 0.6]))
    sde = process.sde()
    forgetful = replace(sde, divergence=lambda x, t: torch.zeros_like(x))
    guidance = gradient_of(data.log_posterior(1))
    panels = (
        ("reverse SDE", sde.reverse(data.score), ito.EulerMaruyama(), None),
        ("probability-flow ODE", sde.flow(data.score), ito.RungeKutta("rk4"), None),
        ("SDE without div(GGᵀ)", forgetful.reverse(data.score), ito.EulerMaruyama(), None),
        ("SDE guided to class 1", sde.reverse(data.score, guidance), ito.EulerMaruyama(), 1),
    )
    x = torch.linspace(0.01, 5, 500, dtype=torch.float64)
    t = torch.tensor(process.t_min, dtype=torch.float64)
    with picture(path, height=2.4) as figure:
        for axes, (title, equation, solver, label) in zip(
            figure.subplots(1, 4, sharex=True), panels, strict=True
        ):
            run = sample_ito(
                equation,
                solver,
                shape=(20_000, 1),
                steps=200,
                grid="quadratic",
                dtype=torch.float64,
            )
            bins = list(np.linspace(0, 5, 101))
            axes.hist(
                run.x[:, 0].numpy(), bins, density=True, color=COLOURS[0], alpha=0.5, label="found"
            )
            density = data.log_prob(x, t)
            if label is not None:
                density = density + data.log_posterior(label)(x, t) - data.weights[label].log()
            axes.plot(x.numpy(), density.exp().numpy(), color=COLOURS[1], lw=1.2, label="exact")
            axes.set_title(title)
            axes.set_xlabel("x")
            axes.set_yscale("log")
            axes.set_ylim(0.005, 4)
        figure.axes[0].set_ylabel("density")
        figure.axes[0].legend()


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs")
    langevin_picture(folder / "ito-langevin.png")
    square_root_picture(folder / "ito-square-root.png")


if __name__ == "__main__":
    main()
