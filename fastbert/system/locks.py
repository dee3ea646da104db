"""Locks by which only one process at a time writes into a directory.

A lock is the operating system's (flock), on an open file: it ends with the process that holds it,
even by a kill. A lock file that nobody has locked means nothing.
"""

import contextlib
import errno
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from fastbert.check import InputError
from fastbert.system.files import Unwritable

LOCK = ".lock"
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # errors of file systems without locks

_held: set[int] = set()  # descriptors of this process's locks


class InUse(InputError):
    """Another process holds a lock."""


def _let_go() -> None:
    """Closes the locks in a forked process, so that they end with its parent."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Locks the directory `out` of a run for this process, until the block ends.

    The directory is made if missing, and removed again if the block leaves it empty. Raises
    InputError if another process holds it, or it cannot be written.
    """
    out = Path(os.path.realpath(out))
    made = [place for place in (out, *out.parents) if not place.exists()]
    try:
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(locked(out / LOCK, wait=False))
            except InUse:
                raise InputError(
                    f"--out {out}: another process is writing there; wait until it ends, or name "
                    "another directory"
                ) from None
            except OSError as error:
                raise Unwritable.because(f"--out {out}", error) from None
            try:
                yield
            finally:  # while the lock is held, or another process's lock file could be removed
                (out / LOCK).unlink(missing_ok=True)
    finally:
        for place in made:
            with contextlib.suppress(OSError):  # it is not empty
                place.rmdir()


@contextlib.contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[None]:
    """Holds a lock on the file `path`, which is made with its directory if missing, and kept.

    wait: whether to wait for another process that holds the lock; if not, raises InUse. Raises
    OSError if the file cannot be made or locked.
    """
    descriptor = _lock(path, wait)
    _held.add(descriptor)
    try:
        yield
    finally:
        if descriptor in _held:  # not in a forked process, which has closed it already
            _held.discard(descriptor)
            os.close(descriptor)


def _lock(path: Path, wait: bool) -> int:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another process has just removed the directory
            continue
        try:
            _flock(descriptor, path, wait)
            # the last holder may have removed the file between its opening and its locking
            if path.exists() and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _flock(descriptor: int, path: Path, wait: bool) -> None:
    if os.name != "posix":
        return
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise InUse(f"{path.parent}: is in use by another process") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(
            f"{path.parent}: the file system has no locks; nothing keeps a second process from "
            "writing there",
            stacklevel=2,
        )
