"""Errors about what the caller gave, in one form: who refuses it, what was expected, what came."""


class InputError(ValueError):
    """Something the user named (a file, a corpus, a checkpoint, an option) cannot be used.

    The message is one line that names it and, where there is one, the remedy; the command line
    prints it as it is and exits with code 2.
    """


class Stopped(Exception):
    """The user has stopped a command, by Ctrl-C; the message says what is kept and how to go on."""


def require(condition: bool, who: str, expected: str, got: object, remedy: str = "") -> None:
    """Raises `ValueError("who: expected ..., got ...; remedy")` unless `condition` holds."""
    if not condition:
        raise ValueError(f"{who}: expected {expected}, got {got}{'; ' if remedy else ''}{remedy}")
