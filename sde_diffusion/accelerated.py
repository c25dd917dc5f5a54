"""The process this is among several, its device and its trackers: Hugging Face accelerate, set
up."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sde_diffusion.errors import unknown_name

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["PRECISIONS", "check_trackers", "is_main_process", "make_accelerator"]

PRECISIONS = ("no", "bf16", "fp16")
_PACKAGES = {"comet_ml": "comet_ml", "tensorboard": "tensorboard"}


def is_main_process() -> bool:
    """Whether this is the first of the processes that torchrun or accelerate started, or the only
    one; answers before any of them has met the others."""
    return os.environ.get("RANK", "0") == "0"


def make_accelerator(
    device: str = "cpu",
    mixed_precision: str = "no",
    trackers: Sequence[str] = (),
    logs: Path | None = None,
) -> Accelerator:
    """An accelerator for this process, among those that torchrun or ``accelerate launch`` started.

    Args:
        device: "cpu", or "cuda" for this process's own GPU.
        mixed_precision: "no", "bf16" or "fp16" (on a GPU only).
        trackers: names that accelerate knows.
        logs: folder for trackers that write files.

    Raises:
        ValueError: a device that is not there, a precision it does not have, an unknown tracker or
            one whose package is not installed.
    """
    if mixed_precision not in PRECISIONS:
        raise unknown_name("mixed_precision", mixed_precision, PRECISIONS)
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r} cannot be trained on here; use cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} is not available on this machine; use cpu")
    if kind == "cpu" and mixed_precision == "fp16":
        raise ValueError("mixed_precision='fp16' needs a GPU; on the CPU use 'bf16' or 'no'")
    check_trackers(trackers)
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    # accelerate keeps its settings for the whole process: one run's must not meet the next one's.
    # Several processes have met by the first one's device, and stay together.
    AcceleratorState._reset_state(reset_partial_state=os.environ.get("WORLD_SIZE", "1") == "1")
    GradientState._reset_state()
    return Accelerator(
        cpu=kind == "cpu",
        mixed_precision=mixed_precision,
        log_with=list(trackers) or None,
        project_dir=None if logs is None else str(logs),
    )


def check_trackers(names: Sequence[str]) -> None:
    """Raise ``ValueError`` unless accelerate knows every tracker and its package is installed."""
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise unknown_name("tracker", name, LOGGER_TYPE_TO_CLASS)
        if name in available and (
            name != "tensorboard" or importlib.util.find_spec("tensorboard") is not None
        ):
            continue
        package = 'the extra: python -m pip install "sde-diffusion[tensorboard]"'
        if name != "tensorboard":
            package = f"its package: python -m pip install {_PACKAGES.get(name, name)}"
        raise ValueError(f"tracker {name!r} is not installed; install {package}")
