"""Locks that let only one process at a time write into a directory.

`filelock` takes locks of the operating system. They end with the process that holds them, even
after a kill, and forked processes do not keep them. An unlocked lock file has no meaning.
"""

import contextlib
import errno
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from fastbert.check import InputError
from fastbert.system.files import Unwritable

LOCK = ".lock"
# A "soft" lock, the mere existence of a file, would outlive a kill. If fastbert runs without being
# installed, filelock may be older than 3.30, when it never fell back to soft locks.
_HARD: dict[str, Any] = {}
if hasattr(filelock.FileLock, "fallback_to_soft"):
    _HARD["fallback_to_soft"] = False
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # errors of file systems without locks


@contextlib.contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Locks the directory `out` of a run for this process, until the block ends.

    The directory is made if missing, and removed again if the block leaves it empty. Raises
    InputError if another process holds the lock, or the directory cannot be written.
    """
    out = Path(os.path.realpath(out))
    made = [place for place in (out, *out.parents) if not place.exists()]
    try:
        with locked(out / LOCK, f"--out {out}", wait=False):
            try:
                yield
            finally:  # still under the lock, to remove no other process's lock file
                (out / LOCK).unlink(missing_ok=True)
    finally:
        for place in made:
            with contextlib.suppress(OSError):  # the directory is not empty
                place.rmdir()


@contextlib.contextmanager
def locked(path: Path, whose: str, *, wait: bool) -> Iterator[None]:
    """Holds a lock on the file `path`, which is made with its directory if missing, and is kept.

    whose: what the lock protects, for messages; wait: whether to wait for another process that
    holds the lock, or to raise InputError. Raises Unwritable if the file cannot be made or locked.
    """
    with contextlib.ExitStack() as held:
        while True:
            try:
                lock = filelock.FileLock(path, blocking=wait, **_HARD)
                held.enter_context(lock)
                break
            except FileNotFoundError:  # another process has just removed the directory
                continue
            except filelock.Timeout:
                raise InputError(
                    f"{whose}: another process is writing there; wait until it ends, or name "
                    "another directory"
                ) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise Unwritable.because(whose, error) from error
                warnings.warn(
                    f"{path.parent}: the file system has no locks; make sure that no second "
                    "process writes there",
                    stacklevel=2,
                )
                break
        yield
