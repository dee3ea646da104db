"""Writes everything that a user keeps, files and directories, atomically.

A file or a directory is written beside its place and then renamed, so a kill or a full disk leaves
the earlier one. Streams (a FIFO, a device, standard output) cannot be renamed and are written
directly.
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

from fastbert.check import InputError, first_line

STANDARD = "-"  # the file name that means standard input or output
_DESCRIPTORS = re.compile(r"/proc/\d+(/task/\d+)?/fd")


class Unwritable(InputError):
    """A file or a directory cannot be written; `reason` is the system's message.

    `because` makes one from another exception.
    """

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(path, reason)  # the `args` from which pickle rebuilds it in a process
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        name = "standard output" if str(self.path) == STANDARD else self.path
        return f"{name}: cannot be written ({self.reason})"

    @classmethod
    def because(cls, path: str | Path, error: BaseException) -> Self:
        """An Unwritable of `path` whose reason is the first line of the error's message."""
        if isinstance(error, Unwritable):
            return cls(path, error.reason)
        if isinstance(error, OSError) and error.strerror:
            return cls(path, error.strerror)
        return cls(path, first_line(error))


def is_stream(path: str | Path) -> bool:
    """Whether the path is standard output, an open file of a process, a FIFO or a device."""
    if str(path) == STANDARD or _is_descriptor(Path(path)):
        return True
    with contextlib.suppress(OSError):
        mode = os.stat(path).st_mode
        return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
    return False


def _is_descriptor(path: Path) -> bool:
    """Whether the links at `path`, such as /dev/stdout, lead to an open file of a process."""
    for _ in range(40):  # Linux follows at most 40 links
        if _DESCRIPTORS.fullmatch(os.path.realpath(path.parent)):
            return True
        if not path.is_symlink():
            return False
        path = path.parent / os.readlink(path)
    return False


def require_output(path: str | Path, *inputs: str | Path) -> None:
    """Raises InputError if the file `path` cannot be written, or would overwrite an input.

    Commands call this before they compute. inputs: files, or directories whose files count as
    inputs; compared by device and inode, to recognise another name of the same file.
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
        raise InputError(f"--out {path}: {place} is not a directory")
    for one in {place, place if place.is_dir() else place.parent}:
        if not os.access(one, os.W_OK):
            raise Unwritable(f"--out {path}", os.strerror(errno.EACCES))


def require_apart(
    option: str, directory: Path, texts: Iterable[Path], models: Iterable[Path] = ()
) -> None:
    """Raises InputError if the output `directory` is an input, or lies below a directory of texts.

    option: the option that names `directory`, for the message; texts: files, and directories that
    are read with their subdirectories; models: directories that are read without subdirectories
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
    """(device, inode) of a regular file or a FIFO; None for others, such as a terminal.

    standard: the stream that the name "-" means
    """
    try:
        found = os.fstat(standard.fileno()) if str(path) == STANDARD else os.stat(path)
    except (OSError, ValueError):  # a missing file, or a stream without a descriptor
        return None
    kept = stat.S_ISREG(found.st_mode) or stat.S_ISFIFO(found.st_mode)
    return (found.st_dev, found.st_ino) if kept else None


@contextlib.contextmanager
def output(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file to write to, which appears at `path` complete or not at all.

    Missing parent directories are made. A stream (see `is_stream`) is written directly. Raises
    BrokenPipeError if the reader of a stream is gone, Unwritable for every other failure.
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
            with open(path, "ab") as stream:  # "ab", because a shell's >> must keep its file
                yield stream
    except BrokenPipeError:
        raise
    except OSError as error:
        raise Unwritable.because(path, error) from error


@contextlib.contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """The path of a temporary file for the block to write, which then replaces `path` atomically.

    If `path` is a link, the file that it points to is replaced, and the link stays. Raises
    Unwritable if the block or the replacement fails to write.
    """
    target = Path(os.path.realpath(path))
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        # some libraries create files that only the owner can read
        beside.chmod(stat.S_IMODE(target.stat().st_mode) if target.exists() else 0o666 & ~_umask())
        _sync(beside)
        beside.replace(target)
        _sync(target.parent)
    except (OSError, SafetensorError) as error:
        raise Unwritable.because(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # the file was renamed, or never made
            beside.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Writes a text in UTF-8, atomically. Raises Unwritable."""
    with output(path) as file:
        file.write(text.encode())


def write_json(path: str | Path, values: dict[str, Any]) -> None:
    """Writes the values as indented JSON, as `write_text` does; raises Unwritable."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def read_json(path: Path, kind: type = dict) -> Any:
    """The contents of a JSON file, or None if there is no file.

    kind: the type of the contents, dict or list. Raises InputError for a file that cannot be read
    or has other contents.
    """
    try:
        values = json.loads(path.read_text("utf-8-sig"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(values, kind):
        name = "object" if kind is dict else kind.__name__
        raise InputError(f"{path}: expected a JSON {name}, got {type(values).__name__}")
    return values


@contextlib.contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """A temporary directory for the block to fill, which then replaces `path` atomically.

    It lies beside `path`, is renamed when the block ends, and is removed if the block raises.
    A failed write, for example on a full disk, raises an Unwritable that names `path`. So does a
    file at `path`, before the block begins; the file stays. Other errors of the block pass.
    """
    target, beside = Path(os.path.realpath(path)), None
    try:
        _require_no_file(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        yield beside
        allowed = ~_umask()
        for file in (beside, *beside.rglob("*")):
            _sync(file)
            # mkdtemp and some libraries create files that only the owner can read
            file.chmod((0o777 if file.is_dir() else 0o666) & allowed)
        _take_the_place(beside, target)
    except (OSError, SafetensorError, RuntimeError, Unwritable) as error:
        if isinstance(error, RuntimeError):
            if "inline_container" not in str(error):  # torch's archive writer
                raise
            if isinstance(error.__context__, OSError):  # if torch called a Python file's `write`
                error = error.__context__
        raise Unwritable.because(path, error) from error
    finally:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)


def _umask() -> int:
    """The process's umask: the permissions that new files do not get."""
    with contextlib.suppress(OSError, StopIteration):  # other systems only return it on a change
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("Umask:")).split()[1], 8)
    found = os.umask(0o077)
    os.umask(found)
    return found


def _take_the_place(beside: Path, target: Path) -> None:
    """Renames a directory to `target`, and then removes an old directory that was there."""
    _require_no_file(target)  # a file may have appeared while the directory was filled
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


def _require_no_file(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))


def _sync(path: Path) -> None:
    if path.is_file() or path.is_dir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
