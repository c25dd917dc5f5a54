"""Training a model folder from data: score network, classifier of noised inputs, judge of clean
ones.

The three are trained in this order by `Loop`s. A run that is interrupted, or killed, leaves its
``checkpoints`` in the output folder; resumed, it ends with the same weights, bit for bit on one CPU
process, as a run that was not.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sde_diffusion.data import Dataset, load_data
from sde_diffusion.loop import NonFiniteLossError, StageSettings
from sde_diffusion.samples import all_finite
from sde_diffusion.sde import SDE
from sde_diffusion.training_run import Run
from sde_diffusion.training_settings import (
    Progress,
    RunOptions,
    SampleSheet,
    TrainingInterrupted,
    TrainSettings,
)

__all__ = [
    "NonFiniteLossError",
    "Progress",
    "RunOptions",
    "SampleSheet",
    "StageSettings",
    "TrainSettings",
    "TrainingInterrupted",
    "train",
]


def train(
    data: str | Path | Dataset,
    sde: SDE,
    out: str | Path,
    *,
    steps: int | None = None,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    settings: TrainSettings | None = None,
    on_step: Callable[[Progress], None] | None = None,
    options: RunOptions | None = None,
    sheet: SampleSheet | None = None,
) -> Path:
    """Train the networks of a model folder and write it.

    With labels: a class-conditional score network, a classifier of noised inputs, and a judge.
    Without: an unconditional score network, no classifier, and `RandomFeatures` of the data in the
    judge's place. What `settings` leave open is chosen so: images get a U-Net, other shapes an MLP;
    where the SDE scales the signal down (VP, sub-VP, cosine) the network predicts eps and times are
    uniform; where it does not (VE, EDM) it is EDM-preconditioned and noise levels are log-normal.

    Started by ``torchrun`` or ``accelerate launch``, each process takes its share of every batch;
    the first one writes the files.

    Args:
        data: as `load_data` takes it, or a `Dataset`.
        sde: the SDE to train under.
        out: the model folder to write.
        steps: of the score network; the others follow in proportion. Default: as in `settings`.
        seed: of initial weights, batches, times and noise. The global generator is not used.
        resume: go on from the last checkpoint in `out`; data, SDE, seed and settings must be those
            it was started with.
        overwrite: replace a model that is already in `out`.
        progress: show a bar.
        settings: everything else that the weights depend on.
        on_step: called after every step; a KeyboardInterrupt it raises stops training like Ctrl-C
            (where there is one process).
        options: checkpoints, validation, sample sheets, trackers, device.
        sheet: draws a sample sheet, every ``options.samples_every`` steps.

    Raises:
        ValueError: arguments or data that do not fit.
        CheckpointError: `out` cannot be used, or there is nothing (or something else) to resume.
        TrainingInterrupted: Ctrl-C or SIGTERM; a checkpoint was written.
        NonFiniteLossError: the loss is NaN or infinite for as many steps as a stage's patience; the
            last checkpoint is kept.
    """
    dataset = data if isinstance(data, Dataset) else load_data(data)
    settings = settings or TrainSettings()
    if steps is not None:
        settings = settings.with_steps(steps)
    _check_labels(dataset)
    run = Run(dataset, sde, Path(out).expanduser(), settings, seed, options or RunOptions(), sheet)
    if not run.prepare(resume, overwrite):
        return run.out
    with _bar(run.lengths, progress and run.main) as show, _deferred_interrupt() as interrupted:

        def report(event: Progress) -> bool:
            show(event)
            if on_step is not None:
                on_step(event)
            return interrupted()

        for stage in run.lengths:
            run.train_stage(stage, report)
    return run.finish()


def _check_labels(data: Dataset) -> None:
    for name, label, x in (
        ("train_y", data.train_y, data.train_x),
        ("test_y", data.test_y, data.test_x),
    ):
        if (label is None) != (data.num_classes is None):
            raise ValueError(f"{name} and num_classes must both be given or both be None")
        if label is None or data.num_classes is None:
            continue
        if label.shape != (len(x),):
            raise ValueError(f"{name} has shape {tuple(label.shape)}; expected ({len(x)},)")
        low, high = (int(label.min()), int(label.max())) if len(label) else (0, 0)
        if low < 0 or high >= data.num_classes:
            raise ValueError(
                f"{name} holds the label {low if low < 0 else high}; labels must lie in "
                f"0..{data.num_classes - 1} for num_classes={data.num_classes}"
            )
    if not all_finite(data.train_x):
        raise ValueError("train_x holds NaN or infinite values; remove or replace them")


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Hold the first Ctrl-C or SIGTERM back until a step is over; a second one acts at once."""
    pressed = False
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    kinds = (signal.SIGINT, signal.SIGTERM)
    previous = {kind: signal.getsignal(kind) for kind in kinds}

    def hold(signum: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    for kind in kinds:
        signal.signal(kind, hold)
    try:
        yield lambda: pressed
    finally:
        for kind, handler in previous.items():
            signal.signal(kind, handler)


@contextlib.contextmanager
def _bar(lengths: dict[str, int], shown: bool) -> Iterator[Callable[[Progress], None]]:
    """A progress bar, one line per stage, on stderr."""
    if not shown:
        yield lambda event: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True)) as bar:
        tasks = {
            stage: bar.add_task(stage, total=steps, loss="-", start=False)
            for stage, steps in lengths.items()
        }
        started: set[str] = set()

        def show(event: Progress) -> None:
            if event.stage not in started:
                bar.start_task(tasks[event.stage])
                started.add(event.stage)
            if event.step % 10 == 0 or event.step == event.steps:
                skipped = f", {event.skipped} skipped" if event.skipped else ""
                loss = f"{event.loss:.4f}{skipped}"
                bar.update(tasks[event.stage], completed=event.step, loss=loss)

        yield show
