"""The command line: `fastbert pretrain`, `distill`, `finetune`, `predict`, `embed`, ..."""

import contextlib
import functools
import io
import sys
import warnings
from typing import Any

from fastbert.check import InputError, Stopped
from fastbert.cli import training, use
from fastbert.cli.app import app
from fastbert.cli.options import by_option_names
from fastbert.system.console import close_standard_streams

COMMANDS = training, use  # which add themselves to the app


def main() -> None:
    """Runs the command line and ends the process.

    What the user gave wrong is one line on stderr and exit code 2; Ctrl-C is one line that says
    what is kept, and 130.
    """
    warnings.filterwarnings("default", category=UserWarning, module="fastbert")
    warnings.showwarning = _warn
    _warn_once.cache_clear()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what an encoding lacks is shown by its number
            stream.reconfigure(errors="backslashreplace")
    status: str | int | None = 0
    try:
        app()
    except SystemExit as end:  # of the library that reads the command line
        status = end.code
    except InputError as error:
        status = _say("error", by_option_names(str(error)), 2)
    except Stopped as error:
        status = _say("stopped", error, 130)
    except OSError as error:
        # files that the user named, or a disk that is full: never a fault of the program's logic
        where = error.filename or "standard output, or a temporary file"
        status = _say("error", f"{where}: {error.strerror or error}", 2)
    close_standard_streams()
    sys.exit(status)


def _say(kind: str, message: object, status: int = 0) -> int:
    with contextlib.suppress(OSError, ValueError):
        print(f"fastbert: {kind}: {' '.join(str(message).split())}", file=sys.stderr)
    return status


@functools.cache  # so that options which are read twice are warned of once
def _warn_once(message: str) -> None:
    _say("warning", message)


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    _warn_once(by_option_names(str(message)))
