"""Ends the command `fastbert` in one line where its imports, which take seconds, do not end well.

`fastbert.cli.main` does so once it runs.
"""

import multiprocessing
import os
import signal
import sys
from pathlib import Path
from types import TracebackType


def is_command() -> bool:
    """Whether this process is the command: no worker of one, nor a script that imports fastbert."""
    if multiprocessing.parent_process() is not None:
        return False
    program = Path(sys.argv[0] if sys.argv else "").name  # "-m" while packages are imported
    return program == "fastbert" or (program == "-m" and "fastbert.cli" in sys.orig_argv)


def stop(*_: object) -> None:
    """Ends the process at Ctrl-C: an import that is left in the middle may hide the exception."""
    os.write(2, b"fastbert: stopped: before anything was done\n")
    os._exit(130)


def refuse(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An excepthook: one line for an environment variable that is refused while it is imported."""
    if not (issubclass(kind, ValueError) and str(error).startswith("FASTBERT_")):
        return sys.__excepthook__(kind, error, trace)
    print(f"fastbert: error: {error}", file=sys.stderr)
    sys.exit(2)


def end() -> None:
    """From here on, Ctrl-C is an exception again."""
    if signal.getsignal(signal.SIGINT) is stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if is_command():
    sys.excepthook = refuse
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it may be ignored
        signal.signal(signal.SIGINT, stop)
