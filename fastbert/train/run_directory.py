"""The directory of a run: the options it was begun with, and what becomes of a run cut short."""

import contextlib
import dataclasses
import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from fastbert import checkpoint
from fastbert.check import InputError, Stopped
from fastbert.config.pretrain import PretrainConfig
from fastbert.system.files import Unwritable, write_json
from fastbert.train.prepare import TEXT
from fastbert.train.recipe import Recipe

Config = TypeVar("Config", bound=PretrainConfig)

RUN = "run.json"
SUMMARY = "summary.json"


def open_run(config: PretrainConfig, out: Path, *, resume: bool) -> bool:
    """Notes the options in `out`; True unless it holds a run already, which is to be continued."""
    path = out / RUN
    if not path.exists():
        write_json(path, config.placed().to_json())
        return True
    if not resume:
        raise InputError(f"--out {out}: holds a run already; --resume continues it")
    earlier = read_run(out, type(config))
    assert earlier is not None
    earlier.same_run(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})
    write_json(path, config.placed().to_json())  # its paths may have moved
    return False


def abandon(out: Path, *, keep_text: bool) -> None:
    """Takes back a claim on a directory in which nothing was trained."""
    (out / RUN).unlink()
    if not keep_text:
        shutil.rmtree(out / TEXT, ignore_errors=True)


def read_run(out: Path, kind: type[Config]) -> Config | None:
    """The options of the run of that kind in `out`, None if there is none."""
    path = out / RUN
    if not path.exists():
        return None
    try:
        return kind.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: not a run's options ({error})") from None


@contextlib.contextmanager
def stoppable(recipe: Recipe, out: Path) -> Iterator[None]:
    """Turns Ctrl-C into a `Stopped` that says what is kept, and names what cannot be written."""
    try:
        yield
    except KeyboardInterrupt:
        kept = checkpoint.latest(out)
        what = "no checkpoint is written yet" if kept is None else f"{kept.name} is kept"
        again = shlex.join(["fastbert", recipe.command, "--resume", "--out", str(out)])
        raise Stopped(f"{out}: {what}; go on with: {again}") from None
    except OSError as error:
        if error.filename is None:  # of a library that does not say what it writes
            raise Unwritable.because(out, error) from error
        raise
