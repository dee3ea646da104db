"""Which files a corpus is, and which it is not: nothing is passed over without a word."""

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
_REFUSED = (".zst", ".zstd", ".lz4", ".lzma", ".z")  # one packed file, which may be text


class CorpusFile(NamedTuple):
    """A file, and its name relative to the path that it was found under."""

    path: Path
    name: str


class Corpus(NamedTuple):
    """The files to read, in order, and what was passed over: (file, why)."""

    files: list[CorpusFile]
    passed_over: list[tuple[Path, str]]


def find_files(paths: Sequence[str | Path]) -> Corpus:
    """The files of a corpus, in the order given, those of a directory sorted by name.

    In a directory, and in those below it, links followed, every file counts that ends as text does
    or has no ending, as WikiExtractor's `AA/wiki_00`. Raises InputError for a path that is missing,
    for a directory that cannot be read or holds no text, for a broken link, and for a file that may
    hold text in a form that is not read.
    """
    if not paths:
        raise InputError("--corpus: no file or directory named")
    corpus = Corpus([], [])
    for path in map(Path, paths):
        if path.is_dir():
            before = len(corpus.files)
            _walk(path, path, [], corpus)
            if len(corpus.files) == before:
                there = "; ".join(f"{p.name}: {why}" for p, why in corpus.passed_over[:3])
                raise InputError(
                    f"--corpus {path}: the directory holds no {', '.join(_SUFFIXES)} file, nor "
                    f"one without an ending (or .gz, .bz2, .xz){there and f'; it has {there}'}"
                )
            corpus.files[before:] = sorted(corpus.files[before:], key=lambda found: found.path)
        elif os.path.lexists(path) and not path.exists():
            raise InputError(f"--corpus {path}: a broken link; remove it or mend it")
        elif path.exists():
            _refuse_packed(path)
            corpus.files.append(CorpusFile(path, path.name))
        else:
            raise InputError(f"--corpus {path}: no such file or directory")
    return corpus


def _walk(top: Path, directory: Path, above: list[tuple[int, int]], corpus: Corpus) -> None:
    """Adds what is in a directory; above: those that it lies in, by which a loop shows."""
    try:
        found = directory.stat()
        entries = sorted(directory.iterdir())
    except OSError as error:
        raise InputError(f"--corpus {directory}: cannot be read: {error.strerror}") from None
    own = (found.st_dev, found.st_ino)
    if own in above:
        corpus.passed_over.append((directory, "a link to a directory that it lies in"))
        return
    for entry in entries:
        if entry.is_dir():
            if entry.name.startswith("."):  # .git, say
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
    """Why a file of a directory is no text; nothing if it is."""
    if not file.is_file():
        return "no regular file"
    suffix = text_suffix(file)
    if suffix in (*_SUFFIXES, *_REFUSED):
        return ""
    if _is_none(suffix):
        return "hidden" if file.name.startswith(".") else ""
    return f"the ending {suffix}"


def _refuse_packed(file: Path) -> None:
    if text_suffix(file) in _REFUSED or (file.suffix.lower() in _REFUSED and file.is_file()):
        raise InputError(
            f"--corpus {file}: {file.suffix} is not read; unpack it, or pack it as .gz, .bz2 or .xz"
        )


def _is_none(suffix: str) -> bool:
    """Whether a suffix tells no format: none at all, or a number, as of the parts of a split."""
    return suffix in ("", ".") or suffix[1:].isdigit()


def text_suffix(file: Path) -> str:
    """The suffix that tells the format, in lower case: `.txt` for `A.TXT` and `a.txt.gz`."""
    name = Path(file.name.lower())
    return (Path(name.stem) if name.suffix in _OPENERS else name).suffix


def opened(file: Path, stored: BinaryIO) -> BinaryIO:
    """The text of a file that is open, unpacked where its name says that it is packed."""
    unpack = _OPENERS.get(file.suffix.lower())
    return stored if unpack is None else unpack(stored)


def format_of(file: Path, first: bytes) -> str:
    """How a file is laid out: text, json or wiki; by its ending, else by its first bytes."""
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
    """What was read, and what was not, as a user is told."""
    yield f"corpus: {len(corpus.files):,} file(s), {documents:,} documents"
    if corpus.passed_over:
        by_reason: dict[str, list[Path]] = {}
        for path, why in corpus.passed_over:
            by_reason.setdefault(why, []).append(path)
        for why, found in sorted(by_reason.items()):
            names = ", ".join(str(path) for path in found[:3])
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            yield f"passed over, {why}: {names}{more}"
