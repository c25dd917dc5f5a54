"""Feature extractors by name: for networks without a judge, or another judge than theirs."""

from __future__ import annotations

import hashlib
import inspect
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sde_diffusion.checkpoints import MODEL_FILE, CheckpointError, load_model
from sde_diffusion.data import Dataset
from sde_diffusion.importing import imported, is_import_path
from sde_diffusion.networks import RandomFeatures
from sde_diffusion.seeding import generator_for
from sde_diffusion.storage import read_json

FORMS = "raw, random, inception, the folder of a model trained here, or package.module:function"
WIDEST = 4096  # raw events, whose covariance is a matrix
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"  # as torch-fidelity names it


class Raw(nn.Module):
    """A sample's values as they are."""

    def features(self, x: Tensor) -> Tensor:
        """(N, *event) -> (N, D)."""
        return x.flatten(1) if x.ndim > 1 else x[:, None]


class Named(nn.Module):
    """A user's function of samples."""

    def __init__(self, path: str, function: Any) -> None:
        super().__init__()
        self.path = path
        self.function = function

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """(N, *event) -> (N, F)."""
        found = self.function(x)
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(x):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"--features {self.path} must give a tensor ({len(x)}, F) for samples "
                f"{tuple(x.shape)}, got {got}"
            )
        return found.detach().cpu()


class Inception(nn.Module):
    """The 2,048 pooled features of the Inception network that FID is defined by."""

    def __init__(self) -> None:
        super().__init__()
        from torchmetrics.image.fid import NoTrainInceptionV3

        try:
            self.network = NoTrainInceptionV3("inception-v3-compat", ["2048"])
        except ModuleNotFoundError as error:
            raise ValueError(
                "--features inception needs torch-fidelity; install it with: "
                "python -m pip install 'sde-diffusion[fid]'"
            ) from error
        except OSError as error:  # no network
            folder = Path(torch.hub.get_dir()) / "checkpoints"
            raise ValueError(
                f"--features inception needs the network's weights, which cannot be downloaded "
                f"({error}); put {INCEPTION} of torch-fidelity's releases into {folder}, or use "
                "--features random"
            ) from error

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """(N, 1 or 3, H, W) in [-1, 1] -> (N, 2048)."""
        levels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        found: Tensor = self.network(levels.expand(-1, 3, -1, -1))
        return found


def make_extractor(
    text: str, event_shape: tuple[int, ...], data: Dataset
) -> tuple[nn.Module, dict[str, Any]]:
    """The extractor that ``--features`` names, and what it is known by in keys.

    Args:
        event_shape: of the samples; they are in the scaling of ``data``.
    Raises:
        ValueError: an unknown name, a missing package or file, or samples it cannot take.
    """
    extractor: nn.Module
    known: dict[str, Any] = {"features": text}
    if text == "raw":
        size = torch.Size(event_shape).numel()
        if size > WIDEST:
            raise ValueError(
                f"--features raw of samples with {size} values has a covariance too large to "
                f"compare (at most {WIDEST}); use random, inception, or a function of your own"
            )
        extractor = Raw()
    elif text == "random":
        extractor = RandomFeatures(event_shape).fit(data.train_x, generator_for(0))
    elif text == "inception":
        if len(event_shape) != 3 or event_shape[0] not in (1, 3):
            raise ValueError(
                f"--features inception needs images (1 or 3, H, W), and samples are {event_shape}; "
                "use raw or random"
            )
        extractor = Inception()
    elif is_import_path(text):
        found = imported(text, "--features")
        function = found() if inspect.isclass(found) else found
        if not callable(function):
            raise ValueError(f"--features {text} is not a function of samples (N, *event)")
        extractor = Named(text, function)
        known |= {"source": source_digest(text)}
    else:
        extractor, files = _of_folder(text, event_shape)
        known = {"features": files}
    extractor.eval().requires_grad_(False)
    features: Any = extractor
    features.features(data.train_x[torch.arange(min(2, len(data.train_x)))])  # its mistakes, now
    return extractor, known


def source_digest(path: str) -> str:
    """Of the file that ``package.module:name`` is written in."""
    module = sys.modules[path.partition(":")[0]]
    try:
        text = inspect.getsource(module)
    except (OSError, TypeError):
        return path
    return hashlib.sha256(text.encode()).hexdigest()


def _of_folder(text: str, event_shape: tuple[int, ...]) -> tuple[nn.Module, dict[str, Any]]:
    try:
        model = load_model(text)
    except CheckpointError as error:
        raise ValueError(f"--features must be {FORMS}; got {text!r}: {error}") from None
    if model.event_shape != event_shape:
        raise ValueError(
            f"--features {text!r} judges samples of shape {model.event_shape}, and these are "
            f"{event_shape}; give a model trained on such samples, or random"
        )
    return model.judge, read_json(model.path / MODEL_FILE)["files"]
