"""Solvers as text: ``probability_flow:method=rk4`` and back.

The grammar, with settings by the names of a solver's own fields::

    spec     = name [":" settings]             (name may be diffusers:ClassName, or a solver or
                                                function of one's own, package.module:Name)
    settings = key "=" value {"," key "=" value}
    value    = a number, a word, or, where a setting is itself a solver: name ["(" settings ")"]

as in ``predictor_corrector:predictor=euler_maruyama(eta=0.5),corrector=langevin(snr=0.1,steps=2)``.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal

from sde_diffusion.errors import unknown_name
from sde_diffusion.importing import is_import_path
from solvers import Corrector, Integrator, Solver, catalogue
from solvers.adapters.diffusers_ import PREFIX
from solvers.catalogue import name_of, named

Component = Solver | Corrector | Integrator
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def parse_solver(text: str, argument: str = "--solver") -> Solver | Integrator:
    """The solver that ``text`` names, with its settings.

    Raises:
        ValueError: unknown names (what exists and the nearest match are listed), values that do
            not fit, or a corrector, which samples only within ``predictor_corrector``.
    """
    name, colon, rest = text.strip().partition(":")
    if name + colon == PREFIX or (name not in catalogue() and _is_users(text)):
        second, more, rest = rest.partition(":")
        name, colon = f"{name}:{second}", more
    if "(" in name:  # the nested form is understood at the top as well
        name, settings = _call(text.strip(), argument)
    else:
        settings = read_settings(rest, argument)
        if colon and not settings:
            raise ValueError(
                f"{argument} {text!r}: no settings after the colon; leave the colon out"
            )
    component = _build(name, settings, argument)
    if isinstance(component, Corrector):
        raise ValueError(
            f"{argument} {name!r} is a corrector and does not sample by itself; "
            f"use predictor_corrector:corrector={name}"
        )
    return component


def _is_users(text: str) -> bool:
    """Whether ``package.module:Name`` comes first."""
    return is_import_path(":".join(text.split(":")[:2]))


def spec_of(solver: Component, *, nested: bool = False) -> str:
    """The shortest text that :func:`parse_solver` turns into ``solver``."""
    name = name_of(type(solver))
    shown = []
    for item in _fields(type(solver)).values():
        value = getattr(solver, item.name)
        if value != _default(item):
            text = spec_of(value, nested=True) if _is_component(value) else _text(value)
            shown.append(f"{item.name}={text}")
    if not shown:
        return name
    return f"{name}({','.join(shown)})" if nested else f"{name}:{','.join(shown)}"


def _build(name: str, settings: dict[str, str], argument: str) -> Component:
    name = name.strip()
    try:
        kind: Any = named(name)
    except (ValueError, ImportError) as error:
        raise ValueError(f"{argument}: {error}") from None
    return construct(kind, name, settings, argument)


def construct(kind: Any, name: str, settings: dict[str, str], argument: str) -> Component:
    """A solver of class ``kind``, called ``name`` in messages, with settings given as text."""
    fields = _fields(kind)
    hints = _hints(kind)
    values = {}
    for key, text in settings.items():
        if key not in fields:
            if not fields:
                raise ValueError(f"{argument} {name!r} has no settings, got {key}={text}")
            raise ValueError(f"{argument} {name!r}: {unknown_name('setting', key, fields)}")
        values[key] = _convert(text, hints.get(key, str), f"{argument} {name!r}: {key}")
    try:
        component: Component = kind(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{argument} {name!r}: {error}") from None
    return component


def _convert(text: str, hint: Any, what: str) -> Any:
    """``text`` as a value of the type a field is annotated with."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        choices = typing.get_args(hint)
        for choice in choices:
            if text == str(choice):
                return choice
        raise ValueError(f"{what}: {unknown_name('choice', text, map(str, choices))}")
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if type(None) in options and text.lower() == "none":
            return None
        problem: ValueError | None = None
        for option in options:
            if option is not type(None):
                try:
                    return _convert(text, option, what)
                except ValueError as error:
                    problem = problem or error
        raise problem or ValueError(f"{what} cannot be given as text, got {text!r}")
    if isinstance(hint, type) and issubclass(hint, Solver | Corrector | Integrator):
        name, settings = _call(text, what)
        component = _build(name, settings, what)
        if not isinstance(component, hint):
            raise ValueError(
                f"{what} must be a {hint.__name__.lower()}, got {text!r}: {_among(hint)}"
            )
        return component
    if hint is bool:
        if text.lower() not in _WORDS:
            raise ValueError(f"{what} must be true or false, got {text!r}")
        return _WORDS[text.lower()]
    if hint is int:
        try:
            return int(text)
        except ValueError:
            raise ValueError(f"{what} must be a whole number, got {text!r}") from None
    if hint is float:
        try:
            return float(text)
        except ValueError:
            raise ValueError(f"{what} must be a number, got {text!r}") from None
    if hint is str:
        return text
    raise ValueError(f"{what} cannot be set from the command line, got {text!r}; use Python")


def read_settings(text: str, argument: str) -> dict[str, str]:
    """``a=1,b=f(c=2,d=3)`` as ``{"a": "1", "b": "f(c=2,d=3)"}``."""
    settings: dict[str, str] = {}
    for part in _split(text, argument):
        key, equals, value = part.partition("=")
        key, value = key.strip(), value.strip()
        if not equals or not key or not value:
            raise ValueError(f"{argument}: settings are written key=value, got {part!r}")
        if key in settings:
            raise ValueError(f"{argument}: the setting {key!r} is given twice")
        settings[key] = value
    return settings


def _split(text: str, argument: str) -> list[str]:
    """At the commas that stand in no parentheses."""
    parts, depth, current = [], 0, ""
    for character in text:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth < 0:
            break
        if character == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += character
    if depth != 0:
        raise ValueError(f"{argument}: the parentheses in {text!r} do not match")
    parts.append(current)
    return parts if text.strip() else []


def _call(text: str, argument: str) -> tuple[str, dict[str, str]]:
    """``name`` or ``name(settings)``."""
    name, opened, rest = text.partition("(")
    if not opened:
        return name, {}
    if not rest.endswith(")"):
        raise ValueError(f"{argument}: write name(key=value,...), got {text!r}")
    return name, read_settings(rest[:-1], argument)


def _fields(kind: type[Component]) -> dict[str, dataclasses.Field[Any]]:
    if not dataclasses.is_dataclass(kind):
        return {}
    return {item.name: item for item in dataclasses.fields(kind) if item.init}


def _hints(kind: type[Component]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(kind)
    except NameError:  # an annotation that only a type checker sees: go by the defaults
        return {name: type(_default(item)) for name, item in _fields(kind).items()}


def _default(item: dataclasses.Field[Any]) -> Any:
    if item.default is not dataclasses.MISSING:
        return item.default
    return None if item.default_factory is dataclasses.MISSING else item.default_factory()


def _among(base: type) -> str:
    names = [n for n, entry in catalogue().items() if issubclass(entry.type, base)]
    return f"one of {', '.join(names)}"


def _is_component(value: object) -> bool:
    return isinstance(value, Solver | Corrector | Integrator)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
