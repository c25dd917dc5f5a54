"""An experiment as a TOML file: what ``compare``'s options say, in a table ``[compare]``.

The keys are the fields of `CompareOptions`, by the names that the command line uses (``nfe`` for
``budgets``, ``guidance`` for ``guidances``); what is left out has the default it has there.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, Field, field, fields, make_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import ValidationError

from experiments.planning import CompareOptions
from experiments.results import write_whole
from sde_diffusion.errors import unknown_name
from sde_diffusion.toml_files import (
    first_complaint,
    parse_toml,
    read_text,
    toml_value,
    validated,
)

EXPERIMENT = "experiment.toml"
"""The file in a run folder that repeats the run."""

TABLE = "compare"
# Fields whose key in the file is another; and options whose field is another.
_KEYS = {"budgets": "nfe", "guidances": "guidance"}
_FIELDS = {
    **{key: name for name, key in _KEYS.items()},
    **{option: option + "s" for option in ("target", "model", "sde", "solver", "scale")},
}
_UNWRITTEN = ("force",)  # an order to this run, and no part of what it is


def key_of(name: str) -> str:
    """The key of a field of `CompareOptions` in a file."""
    return _KEYS.get(name, name)


def read_experiment(path: str | Path) -> dict[str, Any]:
    """The fields of `CompareOptions` that a file sets.

    Raises:
        ValueError: it cannot be read, is not TOML, or has keys or values that do not fit; the
            message names the file, the key and the value, and the nearest key that exists.
    """
    where = str(path)
    values = parse_toml(read_text(path, "experiment"), where)
    known = {key_of(f.name): f.name for f in fields(CompareOptions)}
    for name in values:
        if name in known:
            raise ValueError(
                f"{where}: {name} stands in no table; put a line [{TABLE}] above it, once"
            )
        if name != TABLE:
            raise ValueError(f"{where}: {unknown_name('table', name, [TABLE])}")
    table = values.get(TABLE, {})
    if not isinstance(table, Mapping):
        raise ValueError(f"{where}: [{TABLE}] must be a table of keys, got {table!r}")
    for key in table:
        if key not in known:
            raise ValueError(f"{where}: {unknown_name(f'key in [{TABLE}]', key, known)}")
    if type(table.get("label")) is int:  # a class may be written as the number it is
        table = {**table, "label": str(table["label"])}
    try:
        checked = getattr(validated(_file_type(), {TABLE: table}), TABLE)
    except ValidationError as error:
        raise ValueError(f"{where}: {first_complaint(error)}") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    read = {known[key]: getattr(checked, key) for key in table}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in read.items()}


def combined(
    command_line: CompareOptions, path: str | None, given: Collection[str]
) -> tuple[CompareOptions, dict[str, str]]:
    """A file's options, and over them those given on the command line.

    Args:
        command_line: all options as the command line has them, defaults too.
        path: the file; None: there is none.
        given: names of the options that were typed (``nfe``, ``batch_size``).

    Returns:
        The options, and the file of every key that a file set and nothing replaced.
    """
    if path is None:
        return command_line, {}
    typed = {_FIELDS.get(name, name) for name in given}
    known = {f.name for f in fields(CompareOptions)}
    read = {name: v for name, v in read_experiment(path).items() if name not in typed}
    own = {name: getattr(command_line, name) for name in typed & known}
    return replace(CompareOptions(), **read, **own), {key_of(name): path for name in read}


@contextmanager
def naming_keys(sources: Mapping[str, str]) -> Iterator[None]:
    """Errors that name an option name the file and the key too, where the value came from there."""
    try:
        yield
    except ValueError as error:
        for option in re.findall(r"--([a-z][a-z-]*)", str(error)):
            name = option.replace("-", "_")
            key = key_of(_FIELDS.get(name, name))
            if key in sources:
                raise ValueError(f"{sources[key]}, [{TABLE}] {key}: {error}") from error
        raise


def to_toml(options: CompareOptions) -> str:
    """The options as the text of a file; `read_experiment` is the inverse.

    What is None or empty has no value in TOML, and is named in a comment.
    """
    lines, left = [f"[{TABLE}]"], []
    for f in fields(options):
        value = getattr(options, f.name)
        if f.name in _UNWRITTEN:
            continue
        if value is None or (isinstance(value, list | tuple) and not value):
            left.append(key_of(f.name))
        else:
            lines.append(f"{key_of(f.name)} = {toml_value(value)}")
    lines += [f"# at their defaults: {', '.join(left)}"] if left else []
    return "\n".join(lines) + "\n"


def write_experiment(path: str, options: CompareOptions) -> None:
    """Write the options as a file, which must not exist.

    Raises:
        ValueError: there is such a file, or it cannot be written.
    """
    file = Path(path).expanduser()
    if file.exists():
        raise ValueError(f"--write-experiment {path!r} exists; name a new file, or - to print")
    try:
        write_whole(file, to_toml(options))
    except OSError as error:
        raise ValueError(
            f"--write-experiment {path!r} cannot be written ({error.strerror or error}); name a "
            "file in a folder that can be"
        ) from None


def _file_type() -> type:
    """A dataclass with the table as its field, for messages that name keys as they are typed."""
    hints = get_type_hints(CompareOptions)
    columns = [(key_of(f.name), hints[f.name], _same_default(f)) for f in fields(CompareOptions)]
    table = make_dataclass("Table", columns, frozen=True)
    return make_dataclass("File", [(TABLE, table)], frozen=True)


def _same_default(f: Field[Any]) -> Any:
    if f.default_factory is not MISSING:
        return field(default_factory=f.default_factory)
    return field(default=f.default)
