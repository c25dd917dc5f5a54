"""What a user names as ``package.module:name``."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from typing import Any

from sde_diffusion.errors import unknown_name

_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def is_import_path(text: str) -> bool:
    """Whether ``text`` has the form ``package.module:name``."""
    return _PATH.fullmatch(text.strip()) is not None


def imported(path: str, argument: str = "", hint: str = "") -> Any:
    """What ``package.module:name`` stands for; modules of the current directory count.

    Args:
        argument: what the path was given for, as messages begin.
        hint: what else could have been meant, for the message.
    Raises:
        ValueError: a module that does not import, whatever it raised, or lacks the name.
    """
    module, _, name = (part.strip() for part in path.partition(":"))
    before = f"{argument}: " if argument else ""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever a user's module does when it is run
        why = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{before}the module {module!r} cannot be imported from here ({why}){hint}"
        ) from error
    if not hasattr(found, name):
        names = [n for n, member in vars(found).items() if _of_interest(n, member)]
        raise ValueError(f"{before}{module}: {unknown_name('name', name, names)}")
    return getattr(found, name)


def _of_interest(name: str, member: object) -> bool:
    return not name.startswith("_") and callable(member) and not inspect.ismodule(member)
