"""Finds the files of a corpus, and reports every file that it skips."""

import bz2
import gzip
import lzma
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from fastbert.check import InputError

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_SUFFIXES = (".txt", ".text", *JSON_SUFFIXES)
_OPENERS: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
}
# compressed formats that cannot be read; they are an error, because such a file may hold text
_REFUSED = (".zst", ".zstd", ".lz4", ".lzma", ".z")


class CorpusFile(NamedTuple):
    """A file, and its name relative to the given path that contains it."""

    path: Path
    name: str


class Corpus(NamedTuple):
    """The files to read, in order, and the skipped ones, as (path, reason)."""

    files: list[CorpusFile]
    passed_over: list[tuple[Path, str]]


def find_files(paths: Sequence[str | Path]) -> Corpus:
    """The files of a corpus, in the given order, and within a directory sorted by path.

    Directories are searched with their subdirectories, and links are followed. Files are read if
    they have the ending of a text format or none, like WikiExtractor's `AA/wiki_00`.

    Raises InputError for a path that is missing or a stream, a directory that cannot be read or has
    no text, a broken link, and a compressed file whose format is not supported.
    """
    if not paths:
        raise InputError("--corpus: expected a file or a directory, got none")
    corpus = Corpus([], [])
    for path in map(Path, paths):
        if path.is_dir():
            before = len(corpus.files)
            _walk(path, path, [], corpus)
            if len(corpus.files) == before:
                there = "; ".join(f"{p.name}: {why}" for p, why in corpus.passed_over[:3])
                raise InputError(
                    f"--corpus {path}: the directory has no {', '.join(_SUFFIXES)} file, and none "
                    f"without an ending (or .gz, .bz2, .xz){there and f'; it has {there}'}"
                )
        elif os.path.lexists(path) and not path.exists():
            raise InputError(f"--corpus {path}: a broken link; remove it or mend it")
        elif path.exists() and not path.is_file():
            raise InputError(
                f"--corpus {path}: not a regular file, but a corpus is read several times; write "
                "the text to a file"
            )
        elif path.exists():
            _refuse_packed(path)
            corpus.files.append(CorpusFile(path, path.name))
        else:
            raise InputError(f"--corpus {path}: no such file or directory")
    return corpus


def _walk(top: Path, directory: Path, above: list[tuple[int, int]], corpus: Corpus) -> None:
    """Adds the files of a directory to `corpus`.

    above: (device, inode) of the directories that contain it, to detect a loop of links
    """
    try:
        found = directory.stat()
        entries = sorted(directory.iterdir())
    except OSError as error:
        raise InputError(f"--corpus {directory}: cannot be read: {error.strerror}") from None
    own = (found.st_dev, found.st_ino)
    if own in above:
        corpus.passed_over.append((directory, "a link to a directory that contains it"))
        return
    for entry in entries:
        if entry.is_dir():
            if entry.name.startswith("."):  # for example .git
                corpus.passed_over.append((entry, "hidden"))
            else:
                _walk(top, entry, [*above, own], corpus)
        elif not entry.exists():
            raise InputError(f"--corpus {entry}: a broken link; remove it or mend it")
        elif why := _why_not(entry):
            corpus.passed_over.append((entry, why))
        else:
            _refuse_packed(entry)
            corpus.files.append(CorpusFile(entry, entry.relative_to(top).as_posix()))


def _why_not(file: Path) -> str:
    """Why a file of a directory is skipped; empty if it is read, or refused later."""
    if not file.is_file():
        return "not a regular file"
    suffix = text_suffix(file)
    if suffix in (*_SUFFIXES, *_REFUSED):
        return ""
    if _is_none(suffix):
        return "hidden" if file.name.startswith(".") else ""
    return f"the ending {suffix}"


def _refuse_packed(file: Path) -> None:
    if text_suffix(file) in _REFUSED:
        raise InputError(
            f"--corpus {file}: cannot read {file.suffix}; decompress it, or use .gz, .bz2 or .xz"
        )


def _is_none(suffix: str) -> bool:
    """Whether a suffix names no format: it is empty, or a number, as in the parts of a split."""
    return suffix in ("", ".") or suffix[1:].isdigit()


def text_suffix(file: Path) -> str:
    """The suffix of the text format, in lower case: `.txt` for `A.TXT` and `a.txt.gz`."""
    name = Path(file.name.lower())
    return (Path(name.stem) if name.suffix in _OPENERS else name).suffix


def opened(file: Path, stored: BinaryIO) -> BinaryIO:
    """The decompressed bytes of the open file `stored`, whose format is the ending of `file`."""
    unpack = _OPENERS.get(file.suffix.lower())
    return stored if unpack is None else unpack(stored)


def format_of(file: Path, first: bytes) -> str:
    """A file's format, "text", "json" or "wiki", from its ending or else its first bytes."""
    suffix = text_suffix(file)
    if suffix in JSON_SUFFIXES:
        return "json"
    if _is_none(suffix):
        begin = first.removeprefix(b"\xef\xbb\xbf").lstrip()
        if begin.startswith(b"<doc "):
            return "wiki"
        if re.match(rb'\{\s*"', begin):
            return "json"
    return "text"


def describe(corpus: Corpus, documents: int) -> Iterator[str]:
    """The lines that tell the user which files were read and which were skipped."""
    yield f"corpus: {len(corpus.files):,} file(s), {documents:,} documents"
    if corpus.passed_over:
        by_reason: dict[str, list[Path]] = {}
        for path, why in corpus.passed_over:
            by_reason.setdefault(why, []).append(path)
        for why, found in sorted(by_reason.items()):
            names = ", ".join(str(path) for path in found[:3])
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            yield f"skipped, {why}: {names}{more}"
