"""What a run prints, and a standard output that never ends a run."""

import contextlib
import os
import sys
from typing import Any, TextIO

from rich.console import Console


class _Forgiving:
    """Standard output, or standard error, whatever that is at the moment.

    A character that it cannot show is written as its number, and what it no longer takes (a reader
    that is gone, a full disk) is dropped: a run's results are in files.
    """

    on_error = False  # whether standard error is meant

    @property
    def stream(self) -> TextIO:
        stream = sys.stderr if self.on_error else sys.stdout
        return getattr(stream, "rich_proxied_file", stream)  # while a bar is shown

    def write(self, text: str) -> int:
        stream = self.stream
        with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
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


def leave_standard_output() -> None:
    """What is said from now on goes to standard error: standard output carries a command's rows."""
    _output.on_error = True


def close_standard_streams() -> None:
    """Writes out what waits for standard output and error; what they do not take is dropped.

    Else Python would end with a message and a status of its own.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
