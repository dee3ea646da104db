"""Errors about a caller's input, in one form: who refuses it, what was expected, what came."""

import importlib
from collections.abc import Iterable


class InputError(ValueError):
    """Something the user named (a file, a corpus, a checkpoint, an option) cannot be used.

    The message is one line that names it and, where there is one, the remedy; the command line
    prints it as it is and exits with code 2.
    """


class Stopped(Exception):
    """The user stopped a command with Ctrl-C; the message says what is saved and how to resume."""


def require(condition: bool, who: str, expected: str, got: object, remedy: str = "") -> None:
    """Raises `ValueError("who: expected ..., got ...; remedy")` unless `condition` holds."""
    if not condition:
        raise ValueError(f"{who}: expected {expected}, got {got}{'; ' if remedy else ''}{remedy}")


def require_libraries(who: str, names: Iterable[str], extra: str) -> None:
    """Raises InputError, which begins with `who`, unless these modules can be imported.

    extra: of fastbert, which installs them
    """
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            missing = (error.name or name).partition(".")[0].replace("_", "-")
            raise InputError(f"{who} needs {missing}: pip install 'fastbert[{extra}]'") from None
