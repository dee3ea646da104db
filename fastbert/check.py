"""Errors about a caller's input, in one form: who refuses it, what was expected, what was got."""

import contextlib
import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any


class InputError(ValueError):
    """Something the user named (a file, a corpus, a checkpoint, an option) cannot be used.

    The message is one line that names it and, where there is one, the remedy; the command line
    prints it as it is and exits with code 2.
    """


class Stopped(Exception):
    """The user stopped a command with Ctrl-C; the message says what is saved and how to resume."""


@contextlib.contextmanager
def stopping(said: Callable[[], str]) -> Iterator[None]:
    """Turns Ctrl-C into `Stopped`; said: returns its message."""
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(said()) from None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def require(condition: bool, who: str, expected: str, got: object, remedy: str = "") -> None:
    """Raises `ValueError("who: expected ..., got ...; remedy")` unless `condition` holds."""
    if not condition:
        raise ValueError(f"{who}: expected {expected}, got {got}{'; ' if remedy else ''}{remedy}")


def require_floats(who: str, **tensors: Any) -> None:
    """Raises ValueError unless the tensors are floating: results in integers would be rounded."""
    for name, x in tensors.items():
        if not x.is_floating_point():
            require(False, who, f"{name} of a floating-point dtype", x.dtype)


def require_shape(who: str, shape: Sequence[int], **tensors: Any) -> None:
    """Raises ValueError unless all of these tensors that are not None have this shape."""
    for name, x in tensors.items():
        if x is not None and x.shape != shape:
            require(False, who, f"{name} of shape {tuple(shape)}", tuple(x.shape))


def require_rows(who: str, x: Any, **vectors: Any) -> None:
    """Raises ValueError unless x is (..., H) of a floating-point dtype, and the vectors (H,)."""
    require_floats(who, x=x)
    require(x.ndim > 0, who, "x of shape (..., hidden)", "()")
    require_shape(who, x.shape[-1:], **vectors)


def require_libraries(who: str, names: Iterable[str], extra: str) -> None:
    """Raises InputError, which begins with `who`, unless these modules can be imported.

    extra: the extra of fastbert that installs them
    """
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            missing = (error.name or name).partition(".")[0].replace("_", "-")
            raise InputError(f"{who} needs {missing}: pip install 'fastbert[{extra}]'") from None
