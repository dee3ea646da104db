"""The command line, run in this process, or in forks of one: what imports cost is paid once."""

import os
import subprocess
import sys
from pathlib import Path

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


def main(*arguments) -> None:
    """In a process of its own: ends as `fastbert` does, but lets nothing else end with it."""
    sys.argv = ["fastbert", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as end:
        if end.code:
            raise


# Imports the modules of the first argument, then runs `fastbert` with each other one, whose words
# have tabs between them, all at once, in forks. What they say and how they end is in files.
FORKS = """
import importlib, os, sys
from fastbert import cli
for module in sys.argv[1].split():
    importlib.import_module(module)
children = []
for number, words in enumerate(sys.argv[2:]):
    children.append(os.fork())
    if children[-1] == 0:
        for descriptor, name in enumerate(("out", "err"), 1):
            os.dup2(os.open(f"{number}.{name}", os.O_WRONLY | os.O_CREAT), descriptor)
        sys.argv = ["fastbert", *words.split("\\t")]
        try:
            cli.main()
        except SystemExit as end:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code or 0)  # taking down the copy of what was imported takes seconds
for number, child in enumerate(children):
    with open(f"{number}.status", "w") as file:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=file)
"""


def forked(
    folder: Path, *commands: list, imports: str = "", **environment: str
) -> list[tuple[int, bytes, bytes]]:
    """(exit status, standard output, standard error) of each command, of processes of their own.

    imports: modules, with spaces between them, that the commands import and share
    """
    folder.mkdir()
    words = [b"\t".join(os.fsencode(w if isinstance(w, bytes) else str(w)) for w in command)
             for command in commands]  # fmt: skip
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    program = [sys.executable, "-c", FORKS, imports, *words]
    subprocess.run(program, env=os.environ | path | environment, cwd=folder, check=True)
    return [
        (int((folder / f"{number}.status").read_text()),
         *((folder / f"{number}.{name}").read_bytes() for name in ("out", "err")))
        for number in range(len(commands))
    ]  # fmt: skip
