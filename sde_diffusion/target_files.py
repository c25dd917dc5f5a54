"""Exact targets from a TOML file: a mixture's own numbers, or a rule that makes them.

The keys of each kind are the arguments of the function of that name below; docs/targets.md shows
them.
"""

from __future__ import annotations

import inspect
import itertools
import math
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sde_diffusion.data import data_names
from sde_diffusion.empirical import empirical_mixture, empirical_target
from sde_diffusion.errors import require_count, require_finite, unknown_name
from sde_diffusion.targets import GaussianMixture

MOST_COMPONENTS, MOST_DIMENSIONS = 100_000, 4096


def load_target(path: str | Path) -> GaussianMixture:
    """The mixture that a TOML file describes.

    Raises:
        ValueError: no such file, not TOML, an unknown, missing or wrong key; the message names the
            file and the key.
    """
    file = Path(path).expanduser()
    try:
        with file.open("rb") as stream:
            keys = tomllib.load(stream)
    except OSError as error:
        raise ValueError(f"target file {str(path)!r} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"target file {str(path)!r} is not TOML: {error}") from None
    try:
        return _made(keys, file.parent)
    except (ValueError, TypeError) as error:
        raise ValueError(f"target file {str(path)!r}: {error}") from None


def mixture(
    folder: Path,
    means: Any,
    covariances: Any,
    weights: Any = None,
    labels: Any = None,
    event_shape: Any = None,
) -> GaussianMixture:
    """The arguments of `GaussianMixture`, as nested lists or names of .npy files beside the TOML;
    ``covariances`` also one number, the variance of every component in every direction."""
    centres = _array("means", means, folder)
    if isinstance(covariances, (int, float)) and not isinstance(covariances, bool):
        widths = torch.full((len(centres),), float(covariances), dtype=torch.float64)
    else:
        widths = _array("covariances", covariances, folder)
    classes = None if labels is None else _array("labels", labels, folder)
    if classes is not None and bool((classes == classes.round()).all()):
        classes = classes.long()
    shape = event_shape
    if shape is not None:
        if not isinstance(shape, list):
            raise TypeError(f"event_shape must be a list of whole numbers, got {shape!r}")
        shape = [require_count("event_shape", size) for size in shape]
    return GaussianMixture(
        centres,
        widths,
        None if weights is None else _array("weights", weights, folder),
        classes,
        shape,
    )


def grid(
    folder: Path, side: Any, dimension: Any = 2, std: Any = 0.1, classes: Any = None
) -> GaussianMixture:
    """``side ** dimension`` components on a regular grid of unit variance along every axis."""
    side = require_count("side", side, least=2)
    dimension = require_count("dimension", dimension, most=MOST_DIMENSIONS)
    if dimension * math.log(side) > math.log(MOST_COMPONENTS):
        raise ValueError(
            f"side = {side} in dimension = {dimension} makes more than {MOST_COMPONENTS:,} "
            "components; lower one of them"
        )
    axis = torch.linspace(-1, 1, side, dtype=torch.float64)
    axis = axis / axis.square().mean().sqrt()
    means = torch.tensor(
        list(itertools.product(axis.tolist(), repeat=dimension)), dtype=torch.float64
    )
    return _spheres(means, std, classes)


def ring(
    folder: Path, components: Any, dimension: Any = 2, std: Any = 0.1, classes: Any = None
) -> GaussianMixture:
    """``components`` on a circle in the first two of ``dimension`` coordinates, of unit variance
    along both."""
    count = require_count("components", components, most=MOST_COMPONENTS)
    dimension = require_count("dimension", dimension, least=2, most=MOST_DIMENSIONS)
    angle = torch.arange(count, dtype=torch.float64) * (2 * math.pi / count)
    means = torch.zeros(count, dimension, dtype=torch.float64)
    means[:, 0], means[:, 1] = math.sqrt(2) * angle.cos(), math.sqrt(2) * angle.sin()
    return _spheres(means, std, classes)


def random(
    folder: Path,
    components: Any,
    dimension: Any,
    seed: Any = 0,
    std: Any = 0.1,
    classes: Any = None,
) -> GaussianMixture:
    """``components`` whose means are drawn from N(0, I); ``std`` one number, or [low, high]: one
    drawn for each component and axis, evenly in its logarithm."""
    count = require_count("components", components, most=MOST_COMPONENTS)
    dimension = require_count("dimension", dimension, most=MOST_DIMENSIONS)
    seed = require_count("seed", seed, least=0)
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(count, dimension, generator=generator, dtype=torch.float64)
    if not isinstance(std, list):
        return _spheres(means, std, classes)
    if len(std) != 2:
        raise ValueError(f"std must be a number or [low, high], got {std!r}")
    low, high = (_positive("std", value) for value in std)
    share = torch.rand(count, dimension, generator=generator, dtype=torch.float64)
    variances = (low * (high / low) ** share) ** 2
    return GaussianMixture(means, variances, labels=_classes(count, classes))


def empirical(folder: Path, data: Any, std: Any = 0.0, classes: Any = None) -> GaussianMixture:
    """The law of the samples of ``data``, a name or path as ``--data`` takes it; relative paths
    start at the TOML. See `empirical_mixture`; ``classes = false`` leaves them out."""
    if not isinstance(data, str):
        raise TypeError(f"data must be a name or path, got {data!r}")
    known = data in data_names() or not (folder / data).exists()
    made = empirical_target(data if known else folder / data, std)
    if classes is None or classes is True:
        return made
    if classes is not False:
        raise TypeError(f"classes must be true or false for kind = 'empirical', got {classes!r}")
    return empirical_mixture(made.means.reshape(-1, *made.event_shape), None, std)


KINDS: dict[str, Callable[..., GaussianMixture]] = {
    "empirical": empirical,
    "grid": grid,
    "mixture": mixture,
    "random": random,
    "ring": ring,
}


def _made(keys: dict[str, Any], folder: Path) -> GaussianMixture:
    keys = dict(keys)
    kind = keys.pop("kind", "mixture")
    if kind not in KINDS:
        raise unknown_name("kind", kind, KINDS)
    known = dict(inspect.signature(KINDS[kind]).parameters)
    del known["folder"]
    for key in keys:
        if key not in known:
            raise unknown_name("key", key, [*known, "kind"])
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in keys:
            raise ValueError(f"the key {key!r} is missing; kind = {kind!r} needs it")
    return KINDS[kind](folder, **keys)


def _spheres(means: Tensor, std: Any, classes: Any) -> GaussianMixture:
    variances = torch.full((len(means),), _positive("std", std) ** 2, dtype=torch.float64)
    return GaussianMixture(means, variances, labels=_classes(len(means), classes))


def _classes(count: int, classes: Any) -> Tensor:
    """Component k has class ``k mod classes``; by default every component its own, up to 10."""
    most = min(count, 10) if classes is None else require_count("classes", classes, most=count)
    return torch.arange(count) % most


def _positive(name: str, value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    require_finite(name, value, above=0.0)
    return float(value)


def _array(name: str, value: Any, folder: Path) -> Tensor:
    """Nested lists of numbers, or a .npy file's, in float64."""
    if isinstance(value, str):
        try:
            found = np.load(folder / value, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"{name} = {value!r} is no .npy file of numbers: {error}") from None
        if not isinstance(found, np.ndarray) or found.dtype.kind not in "fiu":
            raise ValueError(f"{name} = {value!r} is no .npy file of numbers")
        return torch.from_numpy(found.astype(np.float64))
    if not isinstance(value, Sequence) or _odd(value):
        raise TypeError(f"{name} must be a list of numbers, as deep everywhere, or a .npy file")
    try:
        return torch.tensor(value, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a list of numbers, as deep everywhere: {error}") from None


def _odd(value: Any) -> bool:
    """Whether anything in nested lists is neither a list nor a number."""
    if isinstance(value, list):
        return any(_odd(each) for each in value)
    return isinstance(value, bool) or not isinstance(value, (int, float))
