"""Runs of `fastbert pretrain` as processes: `main(CORPUS, ROOT, OPTIONS)`, in one of its own.

Each is a fork of that process, which has imported everything and computed nothing. ROOT/whole is
left alone, and what it prints is in ROOT/said. ROOT/killed is begun twice, and killed in its
second step, then in its fifth.
"""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from fastbert import cli

KILLED_AT = ("step 2/9", "step 5/9")  # before the first checkpoint, and between two


def started(arguments: list[str]) -> tuple[int, Iterator[str]]:
    """A process of the command, and the lines that it prints."""
    reads, writes = os.pipe()
    if (child := os.fork()) == 0:
        os.dup2(writes, 1)
        os.close(reads)
        os.close(writes)
        sys.argv = ["fastbert", "pretrain", *arguments]
        cli.main()
    os.close(writes)
    return child, os.fdopen(reads)


def status(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(corpus: Path, root: Path, options: list[str]) -> None:
    given = ["--corpus", str(corpus), *options]
    child, lines = started(["--out", str(root / "whole"), *given])
    (root / "said").write_text("".join(lines))
    assert status(child) == 0
    for step in KILLED_AT:
        child, lines = started(["--out", str(root / "killed"), "--resume", *given])
        for line in lines:
            if line.startswith(step):
                os.kill(child, signal.SIGKILL)
                break
        assert status(child) == -signal.SIGKILL
