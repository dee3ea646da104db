"""Errors about a caller's input, in one form: who refuses it, what was expected, what came."""


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
