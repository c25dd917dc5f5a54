"""Pictures are made, have the size they should, and warn of nothing (a warning fails a test)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from experiments import plots
from experiments.canvas import DPI, picture
from experiments.pictures import SampleGroup, samples_figure, strip_figure, tile_images
from experiments.quality import primary_metric
from experiments.slopes import fit_slope


def row(**changes: Any) -> dict[str, Any]:
    given = {
        "solver": "ancestral",
        "settings": {"eta": 1.0},
        "sde": "vp",
        "target": "ring",
        "guidance": "none",
        "scale": None,
        "steps": 10,
        "nfe": 10,
        "network_passes": 10,
        "seconds": 0.1,
        "samples": 500,
        "metrics": {"energy": {"value": 0.1, "stderr": 0.01}},
    }
    return {**given, **changes}


def table() -> list[dict[str, Any]]:
    return [
        row(
            solver=solver,
            sde=sde,
            target=target,
            nfe=n,
            steps=n,
            seconds=n / 100,
            metrics={metric: {"value": scale / n, "stderr": 0.1 / n}},
        )
        for target, metric in (("ring", "energy"), ("digits", "frechet"))
        for sde in ("vp", "ve")
        for solver, scale in (("ancestral", 1.0), ("ddim", 0.5))
        for n in (10, 20, 50)
    ]


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.load()
        assert np.asarray(image.convert("L")).std() > 1  # something is drawn
        return image.size


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("draw", [plots.quality_vs_nfe, plots.quality_vs_seconds])
def test_quality_curves(tmp_path: Path, draw: Any) -> None:
    floor = {"ring": {"energy": {"value": 0.01, "stderr": 0.002}}}
    before = dict(matplotlib.rcParams)
    draw(tmp_path / "q.png", table(), floor)
    width, height = size(tmp_path / "q.png")
    assert width == 8 * DPI
    assert width / 2 < height < width  # two rows of panels
    assert [p.name for p in tmp_path.iterdir()] == ["q.png"]
    assert dict(matplotlib.rcParams) == before


def test_quality_curves_take_what_a_run_may_hold(tmp_path: Path) -> None:
    rows = [
        row(metrics={}),  # failed
        row(metrics={"energy": {"value": None, "stderr": None}}),  # not finite
        row(nfe=20, metrics={"energy": {"value": 0.02, "stderr": None}}),  # one repetition
        row(nfe=40, metrics={"energy": {"value": 0.01, "stderr": 0.05}}),  # bar below zero
        row(nfe=40, metrics={"energy": {"value": 1e6, "stderr": 1.0}}, solver="ddim"),
        row(target="digits", metrics={"accuracy": {"value": 0.9, "stderr": 0.01}}),
    ]
    floor = {"ring": {"energy": {"value": 0.001, "stderr": None}}}
    plots.quality_vs_nfe(tmp_path / "q.png", rows, floor)
    size(tmp_path / "q.png")
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.quality_vs_nfe(tmp_path / "none.png", rows[:2])
    assert not (tmp_path / "none.png").exists()


def test_the_metric_can_be_chosen(tmp_path: Path) -> None:
    rows = [
        row(metrics={"w2": {"value": 1.0, "stderr": 0.1}, "energy": {"value": 2.0, "stderr": 0}})
    ]
    assert primary_metric(rows, "ring") == "energy"
    plots.quality_vs_nfe(tmp_path / "q.png", rows, metrics={"ring": "w2"})
    with pytest.raises(ValueError, match="finite value of rms"):
        plots.quality_vs_nfe(tmp_path / "q.png", rows, metrics={"ring": "rms"})


def test_labels_show_what_differs() -> None:
    rows = [row(), row(settings={"eta": 0.5}), row(solver="ddim")]
    assert [plots.row_label(r, rows) for r in rows] == [
        "ancestral (eta=1)",
        "ancestral (eta=0.5)",
        "ddim",
    ]
    rows = [row(), row(guidance="cfg", scale=2.0)]
    assert [plots.row_label(r, rows) for r in rows] == ["ancestral, unguided", "ancestral, cfg γ=2"]
    assert plots.row_label(row(solver_label="mine")) == "mine"


def test_error_against_steps(tmp_path: Path) -> None:
    rows = [
        row(solver=s, steps=n, metrics={"rms": {"value": 3 * n**-order, "stderr": None}})
        for s, order in (("heun", 2.0), ("rk4", 4.0))
        for n in (8, 16, 32, 64)
    ]
    rows.append(row(solver="once", metrics={"rms": {"value": 0.5, "stderr": None}}))
    plots.error_vs_steps(tmp_path / "e.png", rows)
    size(tmp_path / "e.png")
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.error_vs_steps(tmp_path / "e.png", [row()])


def test_fitted_slope() -> None:
    steps = [8, 16, 32, 64, 128, 256]
    exact = fit_slope(steps, [5 * n**-3.0 for n in steps])
    assert exact is not None
    assert exact.order == pytest.approx(3.0, abs=1e-10)
    assert exact.constant == pytest.approx(5.0)
    assert exact.error(10) == pytest.approx(5e-3)
    assert exact.stderr == pytest.approx(0.0, abs=1e-10)
    assert (exact.first, exact.last) == (64, 256)
    # Coarse grids do not count, nor those where only rounding is left, nor what is not finite.
    noisy = [9.0, math.nan, 32**-2.0, 64**-2.0, 128**-2.0, 1e-5]
    kept = fit_slope(steps, noisy, floor=1e-5)
    assert kept is not None
    assert (kept.order, kept.last) == (pytest.approx(2.0), 128)
    assert fit_slope([8], [1.0]) is None
    assert fit_slope([8, 8], [1.0, 2.0]) is None
    two = fit_slope([8, 16], [1.0, 0.5])
    assert two is not None
    assert (two.order, two.stderr) == (pytest.approx(1.0), None)


def test_samples_of_every_shape(tmp_path: Path) -> None:
    def density(x: Tensor) -> Tensor:
        return -0.5 * (x**2).sum(1) - x.shape[1] / 2 * math.log(2 * math.pi)

    groups = [
        SampleGroup("points", {"a": randn(50, 2), "b": None}, randn(60, 2), density, {"a": "0.1"}),
        SampleGroup("numbers", {"a": randn(50), "b": randn(50, 1)}, randn(60), density),
        SampleGroup("vectors", {"a": randn(50, 5)}),
        SampleGroup(
            "images", {"a": randn(9, 1, 6, 6), "b": randn(3, 3, 4, 4), "c": randn(9, 5, 7)}
        ),
        SampleGroup("all failed", {"a": None}),
        SampleGroup("far away", {"a": randn(50, 2) + 1e4, "b": torch.zeros(5, 2)}, randn(50, 2)),
        SampleGroup("many", {str(i): randn(20, 2) for i in range(7)}),
    ]
    samples_figure(tmp_path / "s.png", groups)
    assert size(tmp_path / "s.png")[0] == 8 * DPI
    with pytest.raises(ValueError, match="at least one panel"):
        samples_figure(tmp_path / "none.png", [])
    with pytest.raises(ValueError, match="cannot be drawn"):
        samples_figure(tmp_path / "none.png", [SampleGroup("", {"a": randn(3, 2, 2, 2, 2)})])
    assert [p.name for p in tmp_path.iterdir()] == ["s.png"]


def test_tiles_keep_order_and_fill_with_white() -> None:
    images = torch.arange(5.0)[:, None, None, None].expand(5, 1, 8, 8) / 10
    tiles = tile_images(images)
    assert tiles.shape == (2 * 8 + 1, 3 * 8 + 2)
    assert [tiles[0, 0], tiles[0, 9], tiles[0, 18], tiles[9, 0]] == pytest.approx(
        [0, 0.1, 0.2, 0.3]
    )
    assert tiles[9, 18] == 1.0
    assert tile_images(randn(50, 3, 8, 8)).shape == (5 * 8 + 4, 5 * 8 + 4, 3)


@pytest.mark.parametrize("event", [(), (2,), (16,), (8, 8), (1, 8, 8), (3, 8, 8)])
def test_strips(tmp_path: Path, event: tuple[int, ...]) -> None:
    times = torch.linspace(1, 1e-3, 21)
    scale = 50 ** times.reshape(-1, *[1] * (1 + len(event)))
    strip_figure(tmp_path / "strip.png", randn(21, 4, *event) * scale, times)
    assert size(tmp_path / "strip.png")[0] == 8 * DPI


def test_a_strip_of_one_moment_and_bad_times(tmp_path: Path) -> None:
    strip_figure(tmp_path / "one.png", randn(1, 4, 2), [0.5])
    with pytest.raises(ValueError, match="as many times"):
        strip_figure(tmp_path / "bad.png", randn(3, 4, 2), [0.5])


def test_a_picture_that_fails_leaves_no_file(tmp_path: Path) -> None:
    def fail() -> None:
        with picture(tmp_path / "p.png", 2.0):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []
