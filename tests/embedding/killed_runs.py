"""Runs of `embed_corpus` that are killed: `main(CASE)`, in a process of its own.

Each run is a fork of that process, which has imported everything and computed nothing. `moments`
kills one directory's run at random times until it has lived six times shorter than it needs;
`points` kills a run at each call that changes a file, the first, the second, ..., each in a
directory of its own, and lets a second run end it. Each has its options in the case, and a
directory of its name. Prints how many of each were killed.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fastbert.embedding.shards import embed_corpus
from fastbert.system.console import console


def forked(work: Callable[[], object], seconds: float | None = None) -> int:
    """The status of a process that does the work, or is killed after some seconds."""
    if (child := os.fork()) == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def dies_at(count: int) -> None:
    """From now on, this process kills itself in place of the call number `count`, from 0."""
    left = [count]

    def mortal(owner: object, name: str) -> None:
        real = getattr(owner, name)

        def call(*args, **kwargs):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return real(*args, **kwargs)

        setattr(owner, name, call)

    for owner, name in ((os, "fsync"), (Path, "replace")):
        mortal(owner, name)


def kill(mode: str, model: str, source: Path, out: Path, options: dict) -> int:
    out.mkdir()

    def run(place: Path) -> None:
        embed_corpus(model, source, place, **options)

    def mortal_run(place: Path, count: int) -> None:
        dies_at(count)
        run(place)

    killed = 0
    if mode == "moments":
        start = time.perf_counter()
        assert forked(lambda: run(out / "whole")) == 0
        needed = time.perf_counter() - start
        draw = random.Random(0)
        while killed < 6:
            moment = draw.uniform(0.02, needed / 3.5)
            killed += forked(lambda: run(out / "killed"), moment) == -signal.SIGKILL
        assert forked(lambda: run(out / "killed")) == 0
        return killed
    status = -signal.SIGKILL
    while status == -signal.SIGKILL:
        place, count = out / str(killed), killed
        status = forked(lambda place=place, count=count: mortal_run(place, count))
        killed += status == -signal.SIGKILL
        assert forked(lambda place=place: run(place)) == 0
    assert status == 0
    return killed


def main(case: dict) -> None:
    console.quiet = True
    source, out = Path(case["source"]), Path(case["out"])
    killed = {
        mode: kill(mode, case["model"], source, out / mode, options)
        for mode, options in case["modes"].items()
    }
    print(json.dumps(killed))
