"""A recipe: what is trained, and what is then measured and drawn, as one TOML file.

    title                       one line
    [train.TABLE]               the training config, as `sde-diffusion train` takes it
    [variants.NAME.TABLE]       tables put over it, for each of several models; without: one model
    [shipped]                   NAME = "digits-vp": a shipped model stands for a variant
    [experiment]                judge, samples, repeats, seed
    [[experiment.compare]]      solvers, nfe, denoise, grid, drawn, name: quality by evaluations
    [experiment.sweep]          guidances, scales, solver, nfe: quality by guidance scale
    [experiment.strip]          label, scale, solver, nfe: from noise to sample

A key that does not exist, or a value of the wrong type, is an error that names the nearest key.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from experiments.conditions import GUIDANCES
from experiments.planning import steps_within
from experiments.spec import parse_solver
from sde_diffusion.checkpoints import shipped_models
from sde_diffusion.errors import require_count, require_finite, unknown_name
from sde_diffusion.training_config import TrainConfig, overlaid
from solvers import Integrator

__all__ = ["Comparison", "Experiment", "Recipe", "Strip", "Sweep", "find_recipes", "read_recipe"]

Table = TypeVar("Table")
_PACKAGE = Path(__file__).parent
# In a checkout beside the packages, in an installed wheel inside this one.
_FOLDERS = (_PACKAGE.parent / "recipes", _PACKAGE / "recipes")


@dataclass(frozen=True)
class Comparison:
    """``[[experiment.compare]]``: solvers at equal numbers of evaluations, on every model.

    Attributes:
        solvers: as ``--solver`` takes them.
        nfe: score evaluations per sample.
        denoise: end with the estimate of x0, one evaluation of the budget.
        grid: times of the steps; None: the SDE's own.
        drawn: whether it is in the picture, as well as in the table.
        name: of its single solver, where its settings are too long for a picture.
    """

    solvers: tuple[str, ...]
    nfe: tuple[int, ...]
    denoise: bool = False
    grid: str | None = None
    drawn: bool = True
    name: str | None = None

    def __post_init__(self) -> None:
        if self.name is not None and len(self.solvers) != 1:
            raise ValueError(f"name={self.name!r} needs a single solver, got {len(self.solvers)}")
        for text in self.solvers:
            for budget in self.nfe:
                steps_within(parse_solver(text), require_count("nfe", budget), self.denoise)


@dataclass(frozen=True)
class Sweep:
    """``[experiment.sweep]``: one solver at one NFE, guidances at several scales."""

    guidances: tuple[str, ...] = ("classifier", "cfg")
    scales: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
    solver: str = "ancestral"
    nfe: int = 50

    def __post_init__(self) -> None:
        for guidance in self.guidances:
            if guidance not in GUIDANCES[1:]:
                raise unknown_name("guidances", guidance, GUIDANCES[1:])
        for scale in self.scales:
            require_finite("scales", scale)
        steps_within(parse_solver(self.solver), require_count("nfe", self.nfe), False)


@dataclass(frozen=True)
class Strip:
    """``[experiment.strip]``: one class from noise to sample, guided in every way there is."""

    label: int = 3
    scale: float = 2.0
    solver: str = "ancestral"
    nfe: int = 50

    def __post_init__(self) -> None:
        require_count("label", self.label, least=0)
        require_finite("scale", self.scale)
        solver = parse_solver(self.solver)
        if isinstance(solver, Integrator):
            raise ValueError(
                f"solver {self.solver!r} owns its loop and keeps no states; name another"
            )
        steps_within(solver, require_count("nfe", self.nfe), False)


@dataclass(frozen=True)
class Experiment:
    """``[experiment]``: what is measured and drawn.

    Attributes:
        judge: the shipped model whose judge measures; None: the model's own. One judge for all
            recipes on one data set makes their figures comparable.
        samples: in a repeat.
        repeats: for standard errors.
        seed: of the noise.
    """

    judge: str | None = None
    samples: int = 100
    repeats: int = 3
    seed: int = 0
    compare: tuple[Comparison, ...] = ()
    sweep: Sweep | None = None
    strip: Strip = Strip()

    def __post_init__(self) -> None:
        require_count("samples", self.samples, least=2)
        require_count("repeats", self.repeats)
        require_count("seed", self.seed, least=0)
        if self.judge is not None:
            _require_shipped("judge", self.judge)

    def quick(self) -> Experiment:
        """The same with few samples and evaluations: whether it runs, not what it finds."""

        def fewest(one: Comparison) -> Comparison:
            return replace(one, nfe=(min(QUICK_NFE, *one.nfe),) if one.nfe else ())

        sweep = self.sweep
        if sweep is not None:
            sweep = replace(sweep, scales=sweep.scales[:: max(1, len(sweep.scales) - 1)])
            sweep = replace(sweep, nfe=min(QUICK_NFE, sweep.nfe))
        return replace(
            self,
            samples=20,
            repeats=2,
            compare=tuple(fewest(one) for one in self.compare),
            sweep=sweep,
            strip=replace(self.strip, nfe=min(QUICK_NFE, self.strip.nfe)),
        )


QUICK_NFE = 12
QUICK_STEPS = 6  # of training


@dataclass(frozen=True)
class Recipe:
    """A recipe, checked.

    Attributes:
        name: of its file.
        title: one line.
        models: name -> training config.
        shipped: name -> the shipped model that stands for it.
        experiment: what is measured.
    """

    name: str
    title: str
    models: Mapping[str, TrainConfig]
    shipped: Mapping[str, str]
    experiment: Experiment

    def with_steps(self, steps: int) -> Recipe:
        """The same with other numbers of training steps; shipped models no longer stand for it."""
        models = {name: config.with_steps(steps) for name, config in self.models.items()}
        return replace(self, models=models, shipped={})

    def quick(self) -> Recipe:
        """The same at the size of a test: a few steps of training, a few samples."""
        models = {name: config.with_steps(QUICK_STEPS) for name, config in self.models.items()}
        return replace(self, models=models, experiment=self.experiment.quick())


def find_recipes() -> dict[str, Path]:
    """The recipes that come with the program, by name."""
    folder = next((f for f in _FOLDERS if f.is_dir()), None)
    return {} if folder is None else {p.stem: p for p in sorted(folder.glob("*.toml"))}


def read_recipe(name: str) -> Recipe:
    """Read a recipe by its name or its file.

    Raises:
        ValueError: there is none, it is not TOML, or has keys or values that do not fit.
    """
    path = Path(name).expanduser()
    if path.suffix.lower() != ".toml":
        known = find_recipes()
        if name not in known:
            raise unknown_name("recipe", name, known)
        path = known[name]
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"recipe {str(path)!r} cannot be read ({reason})") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    return _recipe(path.stem, values, str(path))


def _recipe(name: str, values: Mapping[str, Any], where: str) -> Recipe:
    tables = ("title", "train", "variants", "shipped", "experiment")
    for key in values:
        if key not in tables:
            raise ValueError(f"{where}: {unknown_name('table', key, tables)}")
    base = overlaid(TrainConfig(), values.get("train", {}), f"{where} [train]")
    variants = values.get("variants") or {name: {}}
    models = {
        variant: overlaid(base, tables, f"{where} [variants.{variant}]")
        for variant, tables in variants.items()
    }
    for variant, config in models.items():
        try:
            config.check_sde()
        except ValueError as error:
            raise ValueError(f"{where}, model {variant!r}: {error}") from None
    shipped = values.get("shipped", {})
    for variant, model in shipped.items():
        if variant not in models:
            raise ValueError(f"{where}: {unknown_name('variant in [shipped]', variant, models)}")
        _require_shipped(f"{where}: [shipped] {variant}", model)
    experiment = _read(Experiment, values.get("experiment", {}), f"{where} [experiment]")
    return Recipe(name, str(values.get("title", name)), models, shipped, experiment)


def _require_shipped(what: str, name: str) -> None:
    if name not in shipped_models():
        raise unknown_name(what, name, shipped_models())


_PARTS: dict[str, type] = {"compare": Comparison, "sweep": Sweep, "strip": Strip}


def _read(kind: type[Table], values: Mapping[str, Any], where: str) -> Table:
    """A table as a dataclass: keys known, types checked strictly, parts read one by one."""
    _check_keys(kind, values, where)
    for key, part in _PARTS.items():
        entries = values.get(key, [])
        for entry in entries if isinstance(entries, list) else [entries]:
            _check_keys(part, entry, f"{where} {key}")
    try:
        return TypeAdapter(kind).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{where} {place}: {message}") from None


def _check_keys(kind: Any, values: Any, where: str) -> None:
    known = [f.name for f in fields(kind)]
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be a table of {', '.join(known)}; got {values!r}")
    for key in values:
        if key not in known:
            raise ValueError(f"{where}: {unknown_name('key', key, known)}")
