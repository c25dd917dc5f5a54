"""Pretrained diffusers networks on disk as score functions; extra `diffusers`.

A folder that diffusers wrote says in JSON what its `UNet2DModel` predicts and on which noise table
it was trained. The wrapper made here owns the network's time labels, so that no solver needs to
know whether they are integers or noise levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sde_diffusion.errors import unknown_name
from sde_diffusion.parametrization import (
    EpsModel,
    ParametrizedModel,
    ScoreModel,
    VModel,
    X0Model,
    table_index,
)
from sde_diffusion.sde import SDE, VESDE, NoiseLevel
from sde_diffusion.storage import CheckpointError, read_json
from sde_diffusion.tabulated import TabulatedVPSDE

__all__ = ["DiffusersModel", "from_diffusers"]

NETWORK = "UNet2DModel"
VE_SCHEDULER = "ScoreSdeVeScheduler"
_TABLE_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
_PREDICTIONS: dict[str, type[ParametrizedModel]] = {
    "epsilon": EpsModel,
    "v_prediction": VModel,
    "sample": X0Model,
}


@dataclass(frozen=True)
class DiffusersModel:
    """A diffusers network, read.

    Attributes:
        path: the folder.
        model: called (x, level, label=None) -> Prediction; in eval mode, without gradients to
            weights. ``bind(model, None)`` is a ScoreFn.
        sde: `TabulatedVPSDE` of its betas, exact at the integer steps it was trained on; `VESDE`
            for score_sde's NCSN++.
        event_shape: (C, H, W), or None where the folder does not tell the image size.
        num_classes: number of classes, or None.
        scheduler: the scheduler's configuration, as found.
    """

    path: Path
    model: ParametrizedModel
    sde: SDE
    event_shape: tuple[int, int, int] | None
    num_classes: int | None
    scheduler: dict[str, Any]


class _Network(nn.Module):
    """A UNet2DModel, called as this package calls its networks."""

    def __init__(self, unet: nn.Module, num_classes: int | None, halve: bool) -> None:
        super().__init__()
        self.unet = unet
        self.num_classes = num_classes
        self.halve = halve

    def forward(self, x: Tensor, time_label: Tensor, label: Tensor | None = None) -> Tensor:
        """(B, C, H, W), (B,) time labels of the network's own, (B,) classes -> (B, C, H, W)."""
        if self.num_classes is None:
            label = None
        output: Tensor = self.unet(x, time_label, class_labels=label).sample
        return output[:, : x.shape[1]] if self.halve else output


def from_diffusers(
    path: str | Path,
    *,
    scheduler: dict[str, Any] | None = None,
    null_label: int | None = None,
) -> DiffusersModel:
    """Read a local diffusers folder with a `UNet2DModel`: a pipeline's, or the network's alone.

    A scheduler with a table of betas (DDPM, DDIM and their kin) gives a `TabulatedVPSDE` and the
    integer labels 0..N-1, label i at time (i + 1) / N; between these times the nearest label is
    used. `prediction_type` epsilon, v_prediction or sample says what the output is. A
    `ScoreSdeVeScheduler` gives a `VESDE`, sigma as the label, and the score as the output
    (Song et al. 2021, arXiv:2011.13456). Where a network predicts variances too (twice the
    channels), they are left aside. The scheduler's own clipping of x0 is not applied.

    Args:
        path: pipeline folder with ``unet/`` and ``scheduler/``, or a folder with ``config.json``
            and weights, and ``scheduler_config.json`` beside them. Weights are safetensors.
        scheduler: the scheduler's configuration, in place of the folder's, with ``_class_name``,
            for example ``{"_class_name": "DDPMScheduler", "beta_schedule": "linear"}``.
        null_label: the class that was trained as "no class", for classifier-free guidance. A
            class-conditional network without one needs a label in every call.

    Raises:
        ValueError: diffusers is missing (the extra is named), no scheduler, or settings that have
            no meaning here.
        CheckpointError: no such folder, another kind of network, pickled weights only, or weights
            that do not fit the configuration.
    """
    folder = Path(path).expanduser()
    home = folder / "unet" if (folder / "unet").is_dir() else folder
    if not (home / "config.json").is_file():
        raise CheckpointError(
            f"{str(folder)!r} is not a diffusers folder: no config.json there or in unet/; "
            "give a folder written by save_pretrained"
        )
    config = read_json(home / "config.json", "write the folder again with save_pretrained")
    kind = config.get("_class_name")
    if kind != NETWORK:
        raise CheckpointError(
            f"{str(home)!r} holds a {kind}, and only {NETWORK} can be read (no text conditions); "
            "give the folder of such a model"
        )
    _require_safetensors(home)
    table = scheduler or _scheduler_config(folder, home)
    unet, betas = _load(home, table)
    channels, outputs = int(config["in_channels"]), int(config["out_channels"])
    if outputs not in (channels, 2 * channels):
        raise CheckpointError(
            f"{str(home)!r} maps {channels} channels to {outputs}; a score has as many channels as "
            "the image, or twice as many with variances"
        )
    known = config.get("num_class_embeds")
    classes = None if known is None else int(known) - (null_label is not None)
    if null_label is not None and (known is None or not 0 <= null_label < int(known)):
        raise ValueError(
            f"null_label={null_label} is no class of the network in {str(home)!r}, which has "
            f"{known or 'none'}; leave it out, or give one of them"
        )
    net = _Network(unet, classes, outputs == 2 * channels)
    model, sde = _parametrized(net, table, betas, null_label)
    side = config.get("sample_size")
    sides = (side, side) if isinstance(side, int) else tuple(side or ())
    return DiffusersModel(
        path=folder,
        model=model.eval().requires_grad_(False),
        sde=sde,
        event_shape=(channels, int(sides[0]), int(sides[1])) if sides else None,
        num_classes=classes,
        scheduler=table,
    )


def _require_safetensors(home: Path) -> None:
    if any(home.glob("*.safetensors")):
        return
    pickled = sorted(f.name for f in home.iterdir() if f.suffix in {".bin", ".pt", ".pth", ".ckpt"})
    if pickled:
        raise CheckpointError(
            f"{str(home)!r} has its weights in {pickled[0]!r} only, a pickled file, which can run "
            "code when it is read, and is refused; load it where it is trusted and write it with "
            "save_pretrained(path, safe_serialization=True)"
        )
    raise CheckpointError(
        f"{str(home)!r} holds no weights (*.safetensors); write them with save_pretrained"
    )


def _scheduler_config(folder: Path, home: Path) -> dict[str, Any]:
    for place in (folder / "scheduler", home, home.parent / "scheduler"):
        if (place / "scheduler_config.json").is_file():
            return read_json(place / "scheduler_config.json", "write it again with save_pretrained")
    raise ValueError(
        f"{str(folder)!r} holds no scheduler_config.json, which says on which noise levels the "
        "network was trained; give the pipeline's folder, or scheduler={'_class_name': "
        "'DDPMScheduler', 'beta_schedule': ..., 'prediction_type': ...}"
    )


def _load(home: Path, table: dict[str, Any]) -> tuple[nn.Module, Tensor | None]:
    """The network, and the betas of its table; None under a VE scheduler."""
    try:
        import diffusers
    except ImportError as error:
        raise ValueError(
            "reading a diffusers folder needs diffusers, which is not installed; install it with: "
            "python -m pip install 'sde-diffusion[diffusers]'"
        ) from error
    try:
        with torch.random.fork_rng(
            devices=[]
        ):  # its initial weights are drawn before they are read
            unet, found = diffusers.UNet2DModel.from_pretrained(
                str(home),
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{str(home)!r} cannot be loaded ({error}); restore the folder as save_pretrained "
            "wrote it"
        ) from error
    problems = [f"{key} is missing" for key in found["missing_keys"]]
    problems += [f"{key} is not in the network" for key in found["unexpected_keys"]]
    problems += [f"{key[0]} has another shape" for key in found["mismatched_keys"]]
    if problems:
        raise CheckpointError(
            f"the weights in {str(home)!r} do not match its config.json: "
            f"{'; '.join(problems[:6])}{'; ...' if len(problems) > 6 else ''}; restore the folder"
        )
    if table.get("_class_name") == VE_SCHEDULER:
        return unet, None
    settings = {key: table[key] for key in _TABLE_KEYS if table.get(key) is not None}
    try:
        betas: Tensor = diffusers.DDPMScheduler(**settings).betas
    except (NotImplementedError, TypeError, ValueError, KeyError) as error:
        raise ValueError(
            f"scheduler {table.get('_class_name')!r} has no table of betas that can be read "
            f"({error}); give scheduler= with a DDPMScheduler's settings"
        ) from error
    return unet, betas


def _parametrized(
    net: nn.Module, table: dict[str, Any], betas: Tensor | None, null_label: int | None
) -> tuple[ParametrizedModel, SDE]:
    if betas is None:
        ve = VESDE(
            sigma_min=float(table.get("sigma_min", 0.01)),
            sigma_max=float(table.get("sigma_max", 1348.0)),
            t_min=float(table.get("sampling_eps", 1e-5)),
        )
        return ScoreModel(net, ve, time_label=_noise_level, null_label=null_label), ve
    if table.get("rescale_betas_zero_snr"):
        raise ValueError(
            "rescale_betas_zero_snr=true ends at pure noise (alpha = 0), where the log-SNR of no "
            "SDE here is finite; such a network cannot be read"
        )
    kind = table.get("prediction_type", "epsilon")
    if kind not in _PREDICTIONS:
        raise unknown_name("prediction_type", kind, _PREDICTIONS)
    vp = TabulatedVPSDE.from_betas(betas.to(torch.float64))
    label = table_index(len(betas))
    return _PREDICTIONS[kind](net, vp, time_label=label, null_label=null_label), vp


def _noise_level(level: NoiseLevel) -> Tensor:
    return level.sigma
