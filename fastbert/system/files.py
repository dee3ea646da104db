"""The one place that writes what a user keeps: whole files and directories.

A file or a directory is written beside its place and renamed, so that a kill or a full disk leaves
what was there before. What cannot be renamed (a FIFO, a device, standard output) is written to as
it is.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Self

from safetensors import SafetensorError

from fastbert.check import InputError

STANDARD = "-"  # a file's name that stands for standard input or output
_DESCRIPTORS = re.compile(r"/proc/\d+(/task/\d+)?/fd")


class Unwritable(InputError):
    """A file or a directory cannot be written, for a reason that the system gives."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(path, reason)  # what a process sends to another one
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        name = "standard output" if str(self.path) == STANDARD else self.path
        return f"{name}: cannot be written ({self.reason})"

    @classmethod
    def because(cls, path: str | Path, error: BaseException) -> Self:
        if isinstance(error, Unwritable):
            return cls(path, error.reason)
        if isinstance(error, OSError) and error.strerror:
            return cls(path, error.strerror)
        return cls(path, (str(error).strip() or type(error).__name__).splitlines()[0])


def is_stream(path: str | Path) -> bool:
    """Whether the path is standard output, an open file of a process, a FIFO or a device."""
    if str(path) == STANDARD or _is_descriptor(Path(path)):
        return True
    with contextlib.suppress(OSError):
        mode = os.stat(path).st_mode
        return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
    return False


def _is_descriptor(path: Path) -> bool:
    """Whether the links of `path`, such as /dev/stdout, lead to an open file of a process."""
    for _ in range(40):  # as many links as Linux follows
        if _DESCRIPTORS.fullmatch(os.path.realpath(path.parent)):
            return True
        if not path.is_symlink():
            return False
        path = path.parent / os.readlink(path)
    return False


def require_output(path: str | Path, *inputs: str | Path) -> None:
    """Raises InputError where a file `path` could not be written, or would take an input's place.

    Called before the work that is to be written. inputs: files, or directories of whose files the
    same holds; told by what they are on the disk, whatever they are called.
    """
    if str(path) != STANDARD and Path(path).is_dir():
        raise InputError(f"--out {path}: is a directory; name a file")
    own = _identity(path, sys.stdout)
    for given in inputs if own else ():
        inside = Path(given).rglob("*") if os.path.isdir(given) else (given,)
        if any(_identity(one, sys.stdin) == own for one in inside):
            raise InputError(f"--out {path}: is the input {given}; name another file")
    if is_stream(path):
        return
    target = Path(os.path.realpath(path))
    place = next(p for p in (target, *target.parents) if p.exists())
    if place != target and not place.is_dir():
        raise InputError(f"--out {path}: {place} is no directory")
    for one in {place, place if place.is_dir() else place.parent}:
        if not os.access(one, os.W_OK):
            raise Unwritable(f"--out {path}", os.strerror(errno.EACCES))


def require_apart(
    option: str, directory: Path, texts: Iterable[Path], models: Iterable[Path] = ()
) -> None:
    """Raises InputError where what is written into `directory` would lie among what is read.

    texts: files, and directories of which everything below is read; models: directories
    """
    place = Path(os.path.realpath(directory))
    read = [(given, True) for given in texts] + [(given, False) for given in models]
    for given, whole in read:
        source = Path(os.path.realpath(given))
        if source.exists() and (place == source or (whole and source in place.parents)):
            raise InputError(
                f"{option} {directory}: lies in the input {given}; name a directory elsewhere"
            )


def _identity(path: str | Path, standard: Any) -> tuple[int, int] | None:
    """(device, inode) of a file whose contents could be lost; None for others, a terminal's too.

    standard: the stream that the name "-" stands for
    """
    try:
        found = os.fstat(standard.fileno()) if str(path) == STANDARD else os.stat(path)
    except (OSError, ValueError):  # none there, or a stream without a file
        return None
    kept = stat.S_ISREG(found.st_mode) or stat.S_ISFIFO(found.st_mode)
    return (found.st_dev, found.st_ino) if kept else None


@contextlib.contextmanager
def output(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write to, which appears at `path` whole or not at all, with its directories.

    A stream (see `is_stream`) is written to as it is; a reader of it that is gone is a
    BrokenPipeError, everything else that fails is an Unwritable.
    """
    if not is_stream(path):
        with new_file(path) as beside, beside.open("wb") as file:
            yield file
        return
    try:
        if str(path) == STANDARD:
            sys.stdout.flush()
            yield sys.stdout.buffer
            sys.stdout.buffer.flush()
        else:
            with open(path, "ab") as stream:  # never cuts off what a shell's >> goes on with
                yield stream
    except BrokenPipeError:
        raise
    except OSError as error:
        raise Unwritable.because(path, error) from error


@contextlib.contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """A file that appears at `path` whole or not at all: the block writes it beside.

    Where `path` is a link, the file that it points to is replaced, and the link stays.
    """
    target = Path(os.path.realpath(path))
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        # some libraries' files are for their owner alone
        beside.chmod(stat.S_IMODE(target.stat().st_mode) if target.exists() else 0o644)
        _sync(beside)
        beside.replace(target)
        _sync(target.parent)
    except (OSError, SafetensorError) as error:
        raise Unwritable.because(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # its directory could not be made
            beside.unlink()


def write_text(path: str | Path, text: str) -> None:
    """In UTF-8; `path` is never half a file."""
    with output(path) as file:
        file.write(text.encode())


def write_json(path: str | Path, values: dict[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=2) + "\n")


@contextlib.contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """A directory that appears at `path` whole or not at all, replacing what was there.

    The block writes into a sibling; it is renamed when the block ends, and removed if it raises.
    A failed write (a full disk, say) leaves as an Unwritable that names `path`.
    """
    target, beside = Path(os.path.realpath(path)), None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        yield beside
        for file in beside.rglob("*"):
            _sync(file)
            file.chmod(0o755 if file.is_dir() else 0o644)
        beside.chmod(0o755)  # mkdtemp's, and some libraries' files, are for their owner alone
        _take_the_place(beside, target)
    except (OSError, SafetensorError, RuntimeError, Unwritable) as error:
        raise Unwritable.because(path, error) from error
    finally:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)


def _take_the_place(beside: Path, target: Path) -> None:
    """Renames a directory to `target`; what is there is removed only when that is done."""
    if not target.exists():
        beside.rename(target)
    else:
        old = beside.with_name(f"{beside.name}.old")
        target.rename(old)
        try:
            beside.rename(target)
        except OSError:
            old.rename(target)
            raise
        shutil.rmtree(old)
    _sync(target.parent)


def _sync(path: Path) -> None:
    if path.is_file() or path.is_dir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
