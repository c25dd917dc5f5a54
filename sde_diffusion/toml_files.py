"""TOML files of settings: read, checked against a dataclass, written."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

__all__ = ["first_complaint", "parse_toml", "read_text", "toml_value", "validated"]


def read_text(path: str | Path, what: str) -> str:
    """The text of a file; `what` it is stands in the message.

    Raises:
        ValueError: it cannot be read, or is not UTF-8.
    """
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"{what} {str(path)!r} cannot be read ({reason}); give a TOML file"
        ) from error


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """The values of a TOML text; `where` is its name in the message.

    Raises:
        ValueError: it is not TOML.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{where} is not TOML: {error}") from error


def validated(kind: type, values: Mapping[str, Any]) -> Any:
    """`values` as a dataclass, types checked strictly: no number is read from a text."""
    try:
        text = json.dumps(values)
    except TypeError as error:
        raise ValueError(f"a value is of a kind that no key takes ({error})") from None
    return _adapter(kind).validate_json(text, strict=True)


@cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def first_complaint(error: ValidationError) -> str:
    """pydantic's first complaint in one line."""
    first = error.errors(include_url=False)[0]
    place = [str(part) for part in first["loc"]]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error" or not place:
        return f"[{place[0]}] {message}" if place else message
    table = f"[{place[0]}] " if len(place) > 1 else ""
    key = ".".join(place[1:] if len(place) > 1 else place)
    return f"{table}{key}: {message[0].lower()}{message[1:]}, got {first['input']!r}"


def toml_value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {toml_value(v)}" for key, v in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(entry) for entry in value) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False)
