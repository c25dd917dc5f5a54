"""What a user sees when something is wrong: one line that says what and what to do."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import typer
from typer.core import TyperGroup

P = ParamSpec("P")
R = TypeVar("R")

# Typer's own, wherever it has click from: a dependency once, a part of it now.
_USAGE_ERROR: Any = typer.BadParameter.__mro__[1]
_CLICK_ERROR: Any = typer.BadParameter.__mro__[2]

USAGE, FAILED, PARTLY, INTERRUPTED = 2, 1, 3, 130
TRACEBACK = "SDE_DIFFUSION_TRACEBACK"  # set it to anything to see where an error came from


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """A command whose errors become one line on stderr and an exit code.

    2: the arguments do not fit (``ValueError``, ``TypeError``; nothing was done). 1: the run
    failed: a score that is not finite, a solver that gave up, a disk that is full. 3: some cells of
    a comparison failed, the others are there. 130: Ctrl-C.
    """

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort, _CLICK_ERROR):
            raise
        except KeyboardInterrupt as error:
            say(str(error) or "interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except (ValueError, TypeError) as error:
            if os.environ.get(TRACEBACK):
                raise
            say(str(error))
            raise typer.Exit(USAGE) from None
        except (ArithmeticError, RuntimeError, OSError, ImportError) as error:
            if os.environ.get(TRACEBACK):
                raise
            say(str(error) or type(error).__name__)
            raise typer.Exit(FAILED) from None

    return wrapped


class OneLineGroup(TyperGroup):
    """Commands whose usage errors are one line as well."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command; as click's, but for what is printed."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        try:
            result = super().main(
                args, prog_name, complete_var, False, windows_expand_args, **extra
            )
        except _USAGE_ERROR as error:
            path = error.ctx.command_path if error.ctx else "sde-diffusion"
            say(f"{error.format_message().rstrip('.')}; see: {path} --help")
            sys.exit(USAGE)
        except _CLICK_ERROR as error:
            say(error.format_message())
            sys.exit(error.exit_code)
        except (typer.Abort, KeyboardInterrupt):
            say("interrupted")
            sys.exit(INTERRUPTED)
        sys.exit(result if isinstance(result, int) else 0)


def say(message: str) -> None:
    """One line on stderr."""
    line = " ".join(message.split())
    typer.echo(f"{typer.style('error:', fg='red', bold=True)} {line}", err=True)
