"""The user's text as a stream of documents, and fingerprints that identify a corpus.

A document is a list of sentences. Only one document at a time is in memory.
"""

import dataclasses
import hashlib
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastbert.check import InputError
from fastbert.data.text.files import find_files, format_of, opened
from fastbert.data.text.sentences import split_sentences

_FIRST = 1024  # bytes that are read to detect the format of a file without an ending
_READER_VERSION = 2  # increase it when a change gives other documents from the same files


@dataclasses.dataclass
class Meter:
    """How much of a corpus has been read, in bytes on disk (compressed, if the files are)."""

    bytes_read: int = 0
    bytes_total: int = 0


def read_documents(paths: Sequence[str | Path], meter: Meter | None = None) -> Iterator[list[str]]:
    """Yields the documents of files and directories in the given order, directories by name.

    A text file has one sentence per line and a blank line between documents, as in
    https://github.com/google-research/bert. A `.jsonl`, `.ndjson` or `.json` file has one JSON
    object per line, whose string `text` is a document, which `split_sentences` divides. A file
    without an ending may have either format, or WikiExtractor's: a document between `<doc ...>` and
    `</doc>`, one paragraph per line. Each may be compressed (`.gz`, `.bz2`, `.xz`). `find_files`
    defines which files of a directory are read; a file that is itself named and has another ending
    is read as text.

    meter: updated every few hundred lines

    Raises InputError at once if a path is missing or a directory has no such file, and while
    reading if a file cannot be read or the whole corpus is empty.
    """
    meter = meter or Meter()
    files = [file for file, _ in find_files(paths).files]
    meter.bytes_total = sum(file.stat().st_size for file in files)
    return _documents(files, meter)


def fingerprint_files(paths: Sequence[str | Path]) -> str:
    """SHA-256 of the names, sizes and contents of the files that `read_documents(paths)` reads."""
    digest = hashlib.sha256(f"files {_READER_VERSION}".encode())
    for file, name in find_files(paths).files:
        try:
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            digest.update(f"\n{name} {file.stat().st_size} {content}".encode("utf-8", "replace"))
        except OSError as error:
            raise _unreadable(file, error) from error
    return digest.hexdigest()


def _documents(files: Sequence[Path], meter: Meter) -> Iterator[list[str]]:
    empty = True
    for file in files:
        for document in _READERS[_format(file)](file, meter):
            if document:
                empty = False
                yield document
    if empty:
        names = str(files[0]) + (f" and {len(files) - 1} more" if len(files) > 1 else "")
        raise InputError(f"--corpus {names}: holds no text")


def _format(file: Path) -> str:
    try:
        with file.open("rb") as stored, opened(file, stored) as stream:
            return format_of(file, stream.read(_FIRST))
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise _unreadable(file, error) from error


def _text_documents(file: Path, meter: Meter) -> Iterator[list[str]]:
    sentences: list[str] = []
    for _, line in _lines(file, meter):
        if line:
            sentences.append(line)
        elif sentences:
            yield sentences
            sentences = []
    yield sentences


def _json_documents(file: Path, meter: Meter) -> Iterator[list[str]]:
    for number, line in _lines(file, meter):
        if not line:
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, TypeError, KeyError, RecursionError):
            text = None
        if not isinstance(text, str):
            raise InputError(
                f'--corpus {file}, line {number}: expected one JSON object with a string "text"'
            )
        # JSON can have a lone surrogate, which is not a character and cannot be encoded
        yield split_sentences(text.encode("utf-8", "ignore").decode("utf-8"))


def _wiki_documents(file: Path, meter: Meter) -> Iterator[list[str]]:
    sentences: list[str] = []
    for _, line in _lines(file, meter):
        if line.startswith("<doc ") or line == "</doc>":
            yield sentences
            sentences = []
        else:
            sentences += split_sentences(line)
    yield sentences


_READERS = {"text": _text_documents, "json": _json_documents, "wiki": _wiki_documents}


def _lines(file: Path, meter: Meter) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, line without surrounding white space)."""
    before = meter.bytes_read
    try:
        with file.open("rb") as stored, opened(file, stored) as stream:
            for number, raw in enumerate(stream, start=1):
                # utf-8-sig: editors on Windows begin a file with a byte-order mark
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if number % 256 == 0:  # `tell` is slower than reading a line
                    meter.bytes_read = before + stored.tell()
            meter.bytes_read = before + stored.tell()
    except UnicodeDecodeError as error:
        raise InputError(
            f"--corpus {file}, line {number}: not UTF-8; convert the file, for example with iconv"
        ) from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> InputError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return InputError(f"--corpus {file}: cannot be read: {reason}")
