"""The directory of a run: the options that it was started with, and its interruption."""

import contextlib
import dataclasses
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from fastbert import checkpoint
from fastbert.check import InputError, stopping
from fastbert.checkpoint import RUN
from fastbert.config.pretrain import AUTO, PretrainConfig
from fastbert.data import Interrupted, OtherCache
from fastbert.system.files import Unwritable, read_json, write_json
from fastbert.train.prepare import TEXT
from fastbert.train.recipe import Recipe

Config = TypeVar("Config", bound=PretrainConfig)

SUMMARY = "summary.json"


@contextlib.contextmanager
def opened(config: PretrainConfig, out: Path, *, resume: bool) -> Iterator[None]:
    """Writes the options into `out`; removes them and the text if the block refuses a new run.

    A text that is worth keeping stays, and so do the options of a resumed run that the block
    refuses. Raises InputError if `out` has a run and `resume` is False, or if the options would
    change the results of that run.
    """
    is_new = not (out / RUN).exists()
    if not is_new and not resume:
        raise InputError(f"--out {out}: holds a run already; --resume continues it")
    if (earlier := read_run(out, type(config))) is not None:
        earlier.same_run(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})
    if is_new:
        write_json(out / RUN, config.placed().to_json())
    try:
        yield
    except InputError as error:
        if is_new:
            (out / RUN).unlink()
            if not isinstance(error, OtherCache | Interrupted | Unwritable):
                shutil.rmtree(out / TEXT, ignore_errors=True)
        raise
    write_json(out / RUN, config.placed().to_json())  # a resumed run's paths may have moved


def precision_of(config: PretrainConfig, out: Path, *, resume: bool) -> str:
    """The requested precision; for a resumed run, "auto" is the precision that the run has."""
    earlier = read_run(out, type(config)) if resume and config.precision == AUTO else None
    return config.precision if earlier is None else earlier.precision


def read_run(out: Path, kind: type[Config]) -> Config | None:
    """The options of the run in `out`, None if there is none; InputError if they are not `kind`."""
    path = out / RUN
    values = read_json(path)
    try:
        return None if values is None else kind.from_json(values)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: not a run's options ({error})") from None


@contextlib.contextmanager
def stoppable(recipe: Recipe, out: Path) -> Iterator[None]:
    """Turns Ctrl-C into `Stopped`, an OSError without a file name into Unwritable, and the death of
    a data loader's process into InputError. An OSError that names a file passes unchanged."""

    def said() -> str:
        kept = checkpoint.latest(out)
        what = "no checkpoint is written yet" if kept is None else f"{kept.name} is kept"
        again = shlex.join(["fastbert", recipe.command, "--resume", "--out", str(out)])
        return f"{out}: {what}; go on with: {again}"

    try:
        with stopping(said):
            yield
    except (ConnectionError, RuntimeError) as error:
        # RuntimeError from torch's handler of a child's death; ConnectionError from its queue
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
            raise
        raise InputError(
            f"{out}: a process that prepares batches was killed, perhaps because memory ran out; "
            "continue with --resume, and with fewer --workers if it happens again"
        ) from error
    except OSError as error:
        if error.filename is None:  # from a library that does not name the file
            raise Unwritable.because(out, error) from error
        raise
