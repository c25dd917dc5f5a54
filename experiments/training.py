"""``sde-diffusion train``: a config from file and options, the run, and what it came to."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from experiments.generate import image_grid
from experiments.pictures import SampleGroup, samples_figure
from experiments.tables import make_console, number, wrote
from sde_diffusion.accelerated import is_main_process
from sde_diffusion.checkpoints import describe
from sde_diffusion.dataset import Dataset
from sde_diffusion.errors import require_count, unknown_name
from sde_diffusion.parametrization import ParametrizedModel, bind
from sde_diffusion.schedules import SDES
from sde_diffusion.training import SampleSheet, train
from sde_diffusion.training_config import (
    TrainConfig,
    completed,
    noise_scales_chosen,
    override,
    read_config,
    to_toml,
)
from solvers import ProbabilityFlow, sample

__all__ = ["TrainOptions", "run_train", "sample_sheet", "train_config", "training_config"]

SHEET_STEPS = 18  # of Heun's method: 35 evaluations
SHEET_SIZE = 64


@dataclass(frozen=True)
class TrainOptions:
    """The options of ``train``; None leaves what the config says."""

    data: str
    sde: str | None = None
    sigma_max: str | None = None
    steps: int | None = None
    seed: int | None = None
    labels: str | None = None
    out: str | None = None
    device: str | None = None
    checkpoint_every: int | None = None
    assignments: Sequence[str] = ()
    resume: bool = False
    overwrite: bool = False


def run_train(options: TrainOptions) -> None:
    """``sde-diffusion train``."""
    config = training_config(options)
    path = train_config(config, resume=options.resume, overwrite=options.overwrite)
    if is_main_process():
        make_console().print(f"next: sde-diffusion compare --model {path}", style="dim")


def train_config(config: TrainConfig, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Train what a config with an ``out`` says, the config and the outcome printed; the folder."""
    started = time.monotonic()
    console = make_console()
    console.quiet = not is_main_process()
    data = config.data.load()
    config, derivation = noise_scales_chosen(config, data)
    config = completed(config, data)
    console.print(to_toml(config), markup=False, highlight=False, soft_wrap=True)
    if derivation:
        console.print(derivation, markup=False, highlight=False, soft_wrap=True)
    classes = f"{data.num_classes} classes" if data.num_classes else "no labels"
    left_out = f", {data.skipped} unreadable left out" if data.skipped else ""
    console.print(
        f"{len(data.train_x):,} samples of shape {data.event_shape}, {classes}; "
        f"{len(data.test_x):,} held out{left_out}"
    )
    path = train(
        data,
        config.make_sde(),
        config.run.out or "",
        settings=config.settings(),
        options=config.options(),
        seed=config.run.seed,
        resume=resume,
        overwrite=overwrite,
        progress=make_console(error=True).is_terminal,
        sheet=sample_sheet(data, config.run.seed) if config.run.samples_every else None,
    )
    if not is_main_process():
        return path
    about = describe(path)
    training = about["training"]
    table = _by_time(training)
    if table is not None:
        console.print(table)
    accuracy = training.get("judge_accuracy")
    judged = "" if accuracy is None else f", judge right on {accuracy:.1%} of held-out data"
    skipped = sum(training.get("skipped", {}).values())
    noted = f"; {skipped} updates skipped, their loss not finite" if skipped else ""
    console.print(f"{about['parameters']:,} weights in the score network{judged}{noted}")
    wrote(console, path, sorted(p.name for p in path.iterdir()), started)
    return path


def training_config(options: TrainOptions) -> TrainConfig:
    """The config that file and options make together; an option wins over the file.

    Raises:
        ValueError: options or keys that do not fit.
    """
    for name, value, least in (
        ("--steps", options.steps, 1),
        ("--seed", options.seed, 0),
        ("--checkpoint-every", options.checkpoint_every, 1),
    ):
        if value is not None:
            require_count(name, value, least=least)
    if options.sde is not None and options.sde not in (*SDES, "ddpm"):
        raise unknown_name("--sde", options.sde, [*SDES, "ddpm"])
    from_file = Path(options.data).suffix.lower() == ".toml"
    config = read_config(options.data) if from_file else TrainConfig()
    if not from_file:
        config = replace(config, data=replace(config.data, source=options.data))
    if options.labels is not None:
        config = replace(config, data=replace(config.data, labels=options.labels))
    if options.sde is not None and options.sde != config.sde["kind"]:
        config = replace(config, sde={"kind": options.sde})
    if options.sigma_max is not None:
        config = replace(config, sde={**config.sde, "sigma_max": _sigma_max(options.sigma_max)})
    if options.steps is not None:
        config = config.with_steps(options.steps)
    given: dict[str, Any] = {
        "seed": options.seed,
        "out": options.out,
        "device": options.device,
        "checkpoint_every": options.checkpoint_every,
    }
    changes = {key: value for key, value in given.items() if value is not None}
    config = replace(config, run=replace(config.run, **changes))
    for assignment in options.assignments:
        config = override(config, assignment)
    if config.run.out is None:
        stem = Path(options.data).expanduser().resolve().stem or "data"
        name = re.sub(r"[^A-Za-z0-9_.+-]", "_", stem)
        name = name if from_file else f"{name}-{config.sde['kind']}"
        config = replace(config, run=replace(config.run, out=str(Path("runs") / name)))
    config.check_sde()
    return config


def _sigma_max(text: str) -> float | str:
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--sigma-max must be a number or auto, got {text!r}") from None


def sample_sheet(data: Dataset, seed: int) -> SampleSheet:
    """Draws the same sheet again and again: its noise and its labels stay, the model changes.

    Images become a grid, magnified; other samples a scatter or histogram beside held-out data.
    """
    truth = data.test_x[:SHEET_SIZE]

    def draw(model: ParametrizedModel, path: Path) -> None:
        label: Tensor | None = None
        if model.null_label is not None and data.num_classes is not None:
            label = torch.arange(SHEET_SIZE) % data.num_classes
        solution = sample(
            bind(model, label),
            model.sde,
            ProbabilityFlow("heun"),
            shape=(SHEET_SIZE, *data.event_shape),
            steps=SHEET_STEPS,
            seed=seed,
            device=next(model.parameters()).device,
        )
        x, file = solution.x.cpu(), path.with_suffix(".png")
        if len(data.event_shape) == 3:
            image_grid(file, data.scaling.to_unit(x), SHEET_SIZE)
        else:
            group = SampleGroup(f"step {int(path.name):,}", {"samples": x}, truth)
            samples_figure(file, [replace(group, truth_name="held-out data")], columns=2)

    return draw


def _by_time(training: dict[str, Any]) -> Table | None:
    """Loss of the score network and accuracy of the classifier on held-out data, by time."""
    losses = training["validation"][-1]["by_time"] if training.get("validation") else []
    accuracies = training.get("classifier_accuracy") or []
    if not losses:
        return None
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.title, table.title_justify = (
        "held-out data, by time: loss ||eps_theta - eps||^2 / D",
        "left",
    )
    for name in (
        "t",
        "log SNR",
        "loss",
        *(["classifier"] if accuracies else []),
    ):
        table.add_column(name, justify="left" if name == "t" else "right")
    for index, bucket in enumerate(losses):
        row = [
            f"{bucket['t_low']:.3g} – {bucket['t_high']:.3g}",
            f"{2 * bucket['half_log_snr_high']:.1f} … {2 * bucket['half_log_snr_low']:.1f}",
            number(bucket["mean"], bucket["stderr"]),
        ]
        if accuracies:
            row.append(f"{accuracies[index]['mean']:.1%}")
        table.add_row(*row)
    return table
