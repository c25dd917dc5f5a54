"""What the tests of training share: small data, short runs, and whether two ended alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sde_diffusion import SDE, VPSDE
from sde_diffusion.data import Dataset, Scaling
from sde_diffusion.loop import StageSettings
from sde_diffusion.storage import read_tensors
from sde_diffusion.training import (
    Progress,
    RunOptions,
    TrainSettings,
    train,
)

SETTINGS = TrainSettings(
    score=StageSettings(steps=8, batch_size=16),
    classifier=StageSettings(steps=6, batch_size=16),
    judge=StageSettings(steps=4, batch_size=16),
)


def points(event: tuple[int, ...] = (2,), classes: int | None = 2, n: int = 40) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 2
    x = 0.2 * torch.randn(n, *event, generator=generator)
    x = x + (y * 1.0 - 0.5).reshape(n, *(1,) * len(event))
    cut = n * 4 // 5
    labels = (y[:cut], y[cut:]) if classes else (None, None)
    names = tuple("ab") if classes else ()
    return Dataset(
        "points", x[:cut], labels[0], x[cut:], labels[1], classes, Scaling(-1.0, 1.0), names
    )


def run(out: Path, data: Dataset | None = None, sde: SDE | None = None, **settings) -> Path:
    options = RunOptions(checkpoint_every=3)
    defaults = {"progress": False, "settings": SETTINGS, "options": options}
    return train(data or points(), sde or VPSDE(), out, **{**defaults, **settings})


def stop_at(stage: str, step: int) -> Callable[[Progress], None]:
    def on_step(event: Progress) -> None:
        if event.stage == stage and event.step == step:
            raise KeyboardInterrupt

    return on_step


def weights(folder: Path) -> dict[str, Tensor]:
    return {
        f"{file.stem}.{name}": tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in read_tensors(file)[0].items()
    }


def assert_same(one: Path, two: Path) -> None:
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
