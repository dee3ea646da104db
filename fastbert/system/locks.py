"""Locks by which only one process at a time writes into a directory.

A lock is the operating system's, taken by `filelock`: it ends with the process that holds it, even
by a kill, and forked processes do not keep it. A lock file that nobody has locked means nothing.
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
# A lock by the file's mere existence would outlive a kill. The filelock of a machine that has
# fastbert without installing it may be older than 3.30, which knows no such locks.
_HARD: dict[str, Any] = {}
if hasattr(filelock.FileLock, "fallback_to_soft"):
    _HARD["fallback_to_soft"] = False
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # errors of file systems without locks


@contextlib.contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Locks the directory `out` of a run for this process, until the block ends.

    The directory is made if missing, and removed again if the block leaves it empty. Raises
    InputError if another process holds it, or it cannot be written.
    """
    out = Path(os.path.realpath(out))
    made = [place for place in (out, *out.parents) if not place.exists()]
    try:
        with locked(out / LOCK, f"--out {out}", wait=False):
            try:
                yield
            finally:  # while the lock is held, or another process's lock file could be removed
                (out / LOCK).unlink(missing_ok=True)
    finally:
        for place in made:
            with contextlib.suppress(OSError):  # it is not empty
                place.rmdir()


@contextlib.contextmanager
def locked(path: Path, whose: str, *, wait: bool) -> Iterator[None]:
    """Holds a lock on the file `path`, which is made with its directory if missing, and kept.

    whose: what the lock is of, for messages; wait: whether to wait for another process that holds
    it; if not, raises InputError. Raises Unwritable if the file cannot be made or locked.
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
                    f"{path.parent}: the file system has no locks; nothing keeps a second process "
                    "from writing there",
                    stacklevel=2,
                )
                break
        yield
