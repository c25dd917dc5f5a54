"""Every solver by name, found by walking ``methods`` and ``adapters``: nothing to register."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from sde_diffusion.errors import unknown_name
from sde_diffusion.importing import imported, is_import_path
from solvers import adapters, methods
from solvers.adapters import callables, diffusers_
from solvers.base import Corrector, Integrator, Solver

Kind = Literal["ODE", "SDE", "corrector"]
_HERE = ("solvers.", "sde_diffusion.", "experiments.")
SolverType = type[Solver] | type[Corrector] | type[Integrator]


@dataclass(frozen=True)
class Entry:
    """A solver class as the catalogue lists it, with its default settings.

    Attributes:
        name: the class name in snake case.
        type: the class.
        kind: ``ODE`` (draws no noise by default), ``SDE`` or ``corrector``.
        order: declared order at default settings; ``None`` for a corrector.
        settings: field name -> default.
        summary: first line of the docstring.
        adapter: whether another library owns the loop.
    """

    name: str
    type: SolverType
    kind: Kind
    order: int | None
    settings: dict[str, Any]
    summary: str
    adapter: bool


@cache
def catalogue() -> dict[str, Entry]:
    """All solvers, correctors and adapters by name, in alphabetical order."""
    entries: dict[str, Entry] = {}
    for package in (methods, adapters):
        for module in pkgutil.iter_modules(package.__path__):
            for member in vars(
                importlib.import_module(f"{package.__name__}.{module.name}")
            ).values():
                if _is_solver(member) and member.__module__ == f"{package.__name__}.{module.name}":
                    entry = _entry(member)
                    entries[entry.name] = entry
    return dict(sorted(entries.items()))


@cache
def peers() -> dict[str, Entry]:
    """Schedulers of diffusers by name, ``diffusers:<ClassName>``; none where it is not
    installed."""
    if not diffusers_.installed():
        return {}
    kinds = map(diffusers_.scheduler_type, diffusers_.SCHEDULERS)
    return {name_of(kind): _entry(kind) for kind in kinds}


def is_peer(solver: Solver | Corrector | Integrator) -> bool:
    """Whether it is a scheduler of diffusers."""
    return name_of(type(solver)).startswith(diffusers_.PREFIX)


def named(name: str) -> SolverType:
    """The class called ``name`` in snake case, ``diffusers:<ClassName>``, or a user's own,
    ``package.module:Name``: a class, or a function (`solvers.adapters.callables`).

    Raises:
        ValueError: unknown; lists the names and the nearest match. A module that does not import,
            or what it holds under that name is no solver.
        ImportError: a scheduler of diffusers, which is not installed.
    """
    if name.startswith(diffusers_.PREFIX):
        return diffusers_.scheduler_type(name.removeprefix(diffusers_.PREFIX))
    if is_import_path(name):
        return _users(name)
    entries = catalogue()
    if name not in entries:
        raise unknown_name("solver", name, entries)
    return entries[name].type


def name_of(solver_type: type) -> str:
    """The name under which a solver class is found: its own in snake case, unless it has another
    (``catalogue_name``); ``module:Name`` of a user's."""
    name: str = getattr(solver_type, "catalogue_name", None) or snake_case(solver_type.__name__)
    if ":" in name or solver_type.__module__.startswith(_HERE):
        return name
    return f"{solver_type.__module__}:{solver_type.__qualname__}"


def is_users(solver: Solver | Corrector | Integrator) -> bool:
    """Whether it is a user's own, of which nothing is known but what it shows when it is run."""
    return is_import_path(name_of(type(solver)))


def _users(path: str) -> SolverType:
    found = imported(path, hint="; a solver of the catalogue is written NAME:key=value")
    if inspect.isclass(found) and issubclass(found, (Solver, Corrector, Integrator)):
        if inspect.isabstract(found):
            missing = ", ".join(sorted(found.__abstractmethods__))
            raise ValueError(f"{path} lacks {missing}")
        return found
    if inspect.isclass(found) or not callable(found):
        raise ValueError(
            f"{path} is not a solver; derive it from solvers.Solver, or name a function "
            f"{callables.FORMS}"
        )
    return callables.sampler_type(path)


def snake_case(name: str) -> str:
    """``ProbabilityFlow`` -> ``probability_flow``, ``DDIM`` -> ``ddim``, ``ScipyODE`` ->
    ``scipy_ode``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def settings_of(solver: Solver | Corrector | Integrator) -> dict[str, Any]:
    """A solver's settings, nested solvers as ``{"name": ..., settings}``; JSON-able."""
    settings = {}
    for item in dataclasses.fields(solver):  # type: ignore[arg-type]
        value = getattr(solver, item.name)
        if isinstance(value, (Solver, Corrector)):
            value = {"name": name_of(type(value)), **settings_of(value)}
        settings[item.name] = value
    return settings


def _is_solver(member: object) -> bool:
    return (
        inspect.isclass(member)
        and issubclass(member, (Solver, Corrector, Integrator))
        and not inspect.isabstract(member)
        and not member.__name__.startswith("_")
    )


def _entry(solver_type: SolverType) -> Entry:
    solver = solver_type()
    corrector = isinstance(solver, Corrector)
    kind: Kind = (
        "corrector" if isinstance(solver, Corrector) else "SDE" if solver.stochastic else "ODE"
    )
    return Entry(
        name=name_of(solver_type),
        type=solver_type,
        kind=kind,
        order=None if isinstance(solver, Corrector) else solver.order,
        settings={} if corrector and not dataclasses.is_dataclass(solver) else settings_of(solver),
        summary=(inspect.getdoc(solver_type) or "").split("\n")[0],
        adapter=solver_type.__module__.startswith(adapters.__name__),
    )
