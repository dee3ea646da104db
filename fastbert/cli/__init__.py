"""The command line: `fastbert pretrain`, `distill`, `finetune`, `predict`, `embed`, ..."""

import contextlib
import functools
import io
import sys
import warnings
from typing import Any

from fastbert.backend import BackendUnavailable
from fastbert.check import InputError, Stopped
from fastbert.cli import training, use
from fastbert.cli.app import app
from fastbert.system.console import close_standard_streams

COMMANDS = training, use  # modules whose import adds their commands to the app


def main() -> None:
    """Runs the command line and ends the process with its exit status.

    A user's mistake (InputError, OSError, a backend that FASTBERT_BACKEND forces but that cannot
    run) prints one line to stderr, with status 2. Ctrl-C prints one line that says what is kept,
    with status 130.
    """
    warnings.filterwarnings("default", category=UserWarning, module="fastbert")
    warnings.showwarning = _warn
    _warn_once.cache_clear()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # escape characters that the encoding lacks
            stream.reconfigure(errors="backslashreplace")
    status: str | int | None = 0
    try:
        app()
    except SystemExit as end:  # click ends every command with it
        status = end.code
    except InputError as error:
        status = _say("error", error, 2)
    except BackendUnavailable as error:  # in a command, only the variable can force a backend
        status = _say("error", f"FASTBERT_BACKEND: {error}", 2)
    except Stopped as error:
        status = _say("stopped", error, 130)
    except OSError as error:
        # an unusable file or a full disk is not a bug, so there is no traceback
        where = error.filename or "standard output, or a temporary file"
        status = _say("error", f"{where}: {error.strerror or error}", 2)
    close_standard_streams()
    sys.exit(status)


def _say(kind: str, message: object, status: int = 0) -> int:
    with contextlib.suppress(OSError, ValueError):
        print(f"fastbert: {kind}: {' '.join(str(message).split())}", file=sys.stderr)
    return status


@functools.cache  # prints each warning once, though options may be checked twice
def _warn_once(message: str) -> None:
    _say("warning", message)


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    _warn_once(str(message))
