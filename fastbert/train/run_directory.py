"""The directory of a run: the options that it was started with, and how it is interrupted."""

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
    """Writes the options into `out`; returns whether the run is new, not a resumed one.

    Raises InputError if `out` has a run and `resume` is False, or if the options would change the
    results of that run.
    """
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
    """Removes the options, and unless `keep_text` the text, of a run that has not trained."""
    (out / RUN).unlink()
    if not keep_text:
        shutil.rmtree(out / TEXT, ignore_errors=True)


def read_run(out: Path, kind: type[Config]) -> Config | None:
    """The options of the run in `out`, None if there is none; InputError if they are not `kind`."""
    path = out / RUN
    if not path.exists():
        return None
    try:
        return kind.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: not a run's options ({error})") from None


@contextlib.contextmanager
def stoppable(recipe: Recipe, out: Path) -> Iterator[None]:
    """Turns Ctrl-C into `Stopped`, which says what is kept, and a nameless OSError into Unwritable.

    The OSErrors that name a file are raised as they are.
    """
    try:
        yield
    except KeyboardInterrupt:
        kept = checkpoint.latest(out)
        what = "no checkpoint is written yet" if kept is None else f"{kept.name} is kept"
        again = shlex.join(["fastbert", recipe.command, "--resume", "--out", str(out)])
        raise Stopped(f"{out}: {what}; go on with: {again}") from None
    except OSError as error:
        if error.filename is None:  # from a library that does not name the file
            raise Unwritable.because(out, error) from error
        raise
