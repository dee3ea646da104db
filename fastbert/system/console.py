"""The console of all commands; a failure to print never ends a run."""

import contextlib
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TextIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, track

T = TypeVar("T")


class _Forgiving:
    """The current standard output or error, as a file that never fails.

    A character that the encoding lacks is written as a backslash escape. If output fails (a closed
    pipe, a full disk), it is dropped, because a run's results are in files.
    """

    on_error = False  # whether to write to standard error

    @property
    def stream(self) -> TextIO:
        stream = sys.stderr if self.on_error else sys.stdout
        return getattr(stream, "rich_proxied_file", stream)  # rich wraps it while it shows a bar

    def write(self, text: str) -> int:
        stream = self.stream
        with contextlib.suppress(OSError, ValueError):  # ValueError: a closed stream
            stream.write(_sayable(text, stream))
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _sayable(text: str, stream: TextIO) -> str:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


_output = _Forgiving()

console = Console(file=_output, soft_wrap=True, highlight=False, markup=False)  # type: ignore[arg-type]


def tracked(items: Sequence[T], doing: str) -> Iterable[T]:
    """The items, with a progress bar until the last one is done, if the output is a terminal."""
    return track(items, doing, console=console, transient=True, disable=not console.is_terminal)


def bar(what: str) -> Progress:
    """A live bar between a text and its task's field `line`, shown if the output is a terminal.

    what: the text, in which rich fills in fields such as "{task.completed}"
    """
    return Progress(
        TextColumn(what),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[line]}"),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        console=console,
        disable=console.quiet or not console.is_terminal,
    )


def leave_standard_output() -> None:
    """Sends later messages to standard error, for a command that writes rows to standard output."""
    _output.on_error = True


def close_standard_streams() -> None:
    """Flushes standard output and error, and drops what cannot be written.

    Otherwise Python's flush at exit would fail, print a message and change the exit status.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
