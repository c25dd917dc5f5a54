"""An experiment as a TOML file: a command's options, in a table that bears the command's name.

The keys are the fields of the command's options by the names that the command line uses (``nfe``
for ``budgets``, say); what is left out has the default it has there. A file is of one command, the
one that its table names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Generic, NamedTuple, TypeVar, get_type_hints

import pydantic
from pydantic import ValidationError

from experiments.results import write_whole
from experiments.tables import make_console
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

COMMANDS = ("compare", "steps", "guidance", "error-budget")
"""Commands that take a file, and the tables in it."""

_UNWRITTEN = ("force",)  # an order to this run, and no part of what it is
O = TypeVar("O")  # noqa: E741


class Texts(NamedTuple):
    """How the entries of a field that TOML has no type for stand in a file, as texts.

    Attributes:
        read: the entries of a list of texts; raises ValueError.
        write: the text of an entry.
    """

    read: Callable[[list[str]], Sequence[Any]]
    write: Callable[[Any], str]


@dataclass(frozen=True)
class ExperimentFile(Generic[O]):
    """The files of one command.

    Attributes:
        table: the command, and the table of its files; one of `COMMANDS`.
        options: a dataclass whose fields all have defaults.
        keys: field -> key, where the key is another.
        absent: fields that the command has no option for.
        texts: field -> how its entries are written, where TOML has no type for them.
    """

    table: str
    options: type[O]
    keys: Mapping[str, str] = field(default_factory=dict)
    absent: Collection[str] = ()
    texts: Mapping[str, Texts] = field(default_factory=dict)

    def key_of(self, name: str) -> str:
        """The key of a field in a file."""
        return self.keys.get(name, name)

    def read(self, path: str | Path) -> dict[str, Any]:
        """The fields of the options that a file sets.

        Raises:
            ValueError: it cannot be read, is not TOML, is another command's, or has keys or values
                that do not fit; the message names the file, the key and the value, and the nearest
                key or the command that there is.
        """
        where, name_of = str(path), {self.key_of(f.name): f.name for f in self._fields()}
        table = self._table(where, parse_toml(read_text(path, "experiment"), where), name_of)
        try:
            checked = validated(self._type(), {self.table: table}).table
        except ValidationError as error:
            raise ValueError(f"{where}: {first_complaint(error)}") from None
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        return {name_of[key]: self._value(where, key, getattr(checked, key)) for key in table}

    def combined(
        self, command_line: O, path: str | None, given: Collection[str]
    ) -> tuple[O, dict[str, str]]:
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
        typed = {self._field_of(name) for name in given} - {None}
        read = {name: v for name, v in self.read(path).items() if name not in typed}
        own = {name: getattr(command_line, name) for name in typed if name is not None}
        made: Any = self.options()
        return replace(made, **read, **own), {self.key_of(name): path for name in read}

    @contextmanager
    def naming_keys(self, sources: Mapping[str, str]) -> Iterator[None]:
        """Errors that name an option name the file and the key too, where the value came from
        there."""
        try:
            yield
        except ValueError as error:
            for option in re.findall(r"--([a-z][a-z-]*)", str(error)):
                name = self._field_of(option.replace("-", "_"))
                key = "" if name is None else self.key_of(name)
                if key in sources:
                    raise ValueError(f"{sources[key]}, [{self.table}] {key}: {error}") from error
            raise

    def to_toml(self, options: O) -> str:
        """The options as the text of a file; `read` is the inverse.

        What is None or empty has no value in TOML, and is named in a comment.
        """
        lines, left = [f"[{self.table}]"], []
        for f in self._fields():
            value = getattr(options, f.name)
            if f.name in _UNWRITTEN:
                continue
            if value is None or (isinstance(value, list | tuple) and not value):
                left.append(self.key_of(f.name))
                continue
            if f.name in self.texts:
                value = [self.texts[f.name].write(entry) for entry in value]
            lines.append(f"{self.key_of(f.name)} = {toml_value(value)}")
        lines += [f"# at their defaults: {', '.join(left)}"] if left else []
        return "\n".join(lines) + "\n"

    def put(self, options: O, path: str) -> None:
        """``--write-experiment``: write the options as a file, or print them (``-``), and say so.

        Raises:
            ValueError: there is such a file, or it cannot be written.
        """
        if path == "-":
            make_console().print(self.to_toml(options), end="", markup=False, soft_wrap=True)
            return
        file = Path(path).expanduser()
        if file.exists():
            raise ValueError(f"--write-experiment {path!r} exists; name a new file, or - to print")
        try:
            write_whole(file, self.to_toml(options))
        except OSError as error:
            raise ValueError(
                f"--write-experiment {path!r} cannot be written ({error.strerror or error}); name "
                "a file in a folder that can be"
            ) from None
        make_console().print(f"wrote {path}")

    def _fields(self) -> list[Field[Any]]:
        kind: Any = self.options
        return [f for f in fields(kind) if f.name not in self.absent]

    def _field_of(self, option: str) -> str | None:
        """The field that an option sets: of its name, its key, or several of it."""
        known = {f.name for f in self._fields()}
        named = {key: name for name, key in self.keys.items()}.get(option)
        found = (name for name in (named, option, f"{option}s") if name in known)
        return next(found, None)

    def _table(
        self, where: str, values: Mapping[str, Any], known: Collection[str]
    ) -> Mapping[str, Any]:
        """The command's table, whose keys are known."""
        for name, value in values.items():
            if name == self.table:
                continue
            if name in COMMANDS and isinstance(value, Mapping):  # "guidance" is a key, too
                raise ValueError(
                    f"{where}: [{name}] is of another command than {self.table}; run: "
                    f"sde-diffusion {name} {where}"
                )
            if name in known:
                raise ValueError(
                    f"{where}: {name} stands in no table; put a line [{self.table}] above it, once"
                )
            raise ValueError(f"{where}: {unknown_name('table', name, [self.table])}")
        table = values.get(self.table, {})
        if not isinstance(table, Mapping):
            raise ValueError(f"{where}: [{self.table}] must be a table of keys, got {table!r}")
        for key in table:
            if key not in known:
                raise ValueError(f"{where}: {unknown_name(f'key in [{self.table}]', key, known)}")
        if type(table.get("label")) is int:  # a class may be written as the number it is
            table = {**table, "label": str(table["label"])}
        return table

    def _value(self, where: str, key: str, value: Any) -> Any:
        texts = {self.key_of(name): texts for name, texts in self.texts.items()}.get(key)
        if texts is not None:
            try:
                value = texts.read(value)
            except ValueError as error:
                raise ValueError(f"{where}, [{self.table}] {key}: {error}") from None
        return tuple(value) if isinstance(value, list) else value

    def _type(self) -> type:
        """A dataclass with the table as its field; messages name keys as they are typed."""
        hints = get_type_hints(self.options)
        hints |= dict.fromkeys(self.texts, list[str])
        columns = [(self.key_of(f.name), hints[f.name], _same_default(f)) for f in self._fields()]
        table = make_dataclass("Table", columns, frozen=True)
        # By an alias: a command's name need be none in Python.
        named = Annotated[table, pydantic.Field(alias=self.table)]  # type: ignore[valid-type]
        return make_dataclass("File", [("table", named)], frozen=True)


def _same_default(f: Field[Any]) -> Any:
    if f.default_factory is not MISSING:
        return field(default_factory=f.default_factory)
    return field(default=f.default)
