"""The command line, run in this process: what imports cost is paid once."""

import sys

import pytest
from _pytest.capture import FDCapture

from fastbert import cli
from fastbert.system import console


def call(*arguments) -> tuple[int, str, str]:
    """(exit status, standard output, standard error)."""
    captures = [FDCapture(1), FDCapture(2)]
    argv = sys.argv
    sys.argv = ["fastbert", *map(str, arguments)]
    console._output.on_error = False
    for capture in captures:
        capture.start()
    try:
        with pytest.raises(SystemExit) as end:
            cli.main()
    finally:
        sys.argv = argv
        said = [capture.snap() for capture in captures]
        for capture in captures:
            capture.done()
    return end.value.code, *said
