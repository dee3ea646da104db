"""The user's own text as a stream of documents, and fingerprints that tell one corpus from another.

A document is a list of sentences. Nothing here holds more than one document in memory.
"""

import dataclasses
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from fastbert.check import InputError
from fastbert.data.sentences import split_sentences

_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_SUFFIXES = (".txt", ".text", *_JSON_SUFFIXES)

_READER_VERSION = 1  # raise when the same files begin to give other documents


@dataclasses.dataclass
class Meter:
    """How far a corpus is read: bytes of its files, of compressed ones as they lie on the disk."""

    bytes_read: int = 0
    bytes_total: int = 0


def read_documents(paths: Sequence[str | Path], meter: Meter | None = None) -> Iterator[list[str]]:
    """The documents of files and directories, in the order given, directories sorted by name.

    Text files hold one sentence a line and a blank line between documents, as in
    https://github.com/google-research/bert. `.jsonl`, `.ndjson` and `.json` files hold one JSON
    object a line; its string `text` is one document, cut into sentences by `split_sentences`. Each
    may be gzipped (`.gz`). In a directory only files with these suffixes count; a file named by
    itself may have any other suffix and is then text.

    `meter` goes along, to within some hundred lines.

    Raises InputError at once if a path is missing or a directory holds no such file, and while
    reading if a file cannot be read or the whole corpus is empty.
    """
    meter = meter or Meter()
    files = [file for file, _ in _corpus_files(paths)]
    meter.bytes_total = sum(file.stat().st_size for file in files)
    return _documents(files, meter)


def fingerprint_files(paths: Sequence[str | Path]) -> str:
    """A hash of the names, sizes and contents of the files that `read_documents(paths)` reads."""
    digest = hashlib.sha256(f"files {_READER_VERSION}".encode())
    for file, name in _corpus_files(paths):
        try:
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            digest.update(f"\n{name} {file.stat().st_size} {content}".encode())
        except OSError as error:
            raise _unreadable(file, error) from error
    return digest.hexdigest()


def _corpus_files(paths: Sequence[str | Path]) -> list[tuple[Path, str]]:
    """(file, its name relative to the path it was found under)."""
    if not paths:
        raise InputError("corpus: no file or directory named")
    files: list[tuple[Path, str]] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(f for f in path.rglob("*") if _text_suffix(f) in _SUFFIXES)
            inside = [file for file in inside if file.is_file()]
            if not inside:
                wanted = ", ".join(_SUFFIXES)
                raise InputError(f"corpus {path}: the directory holds no {wanted} (or .gz) file")
            files += [(file, file.relative_to(path).as_posix()) for file in inside]
        elif path.exists():
            files.append((path, path.name))
        else:
            raise InputError(f"corpus {path}: no such file or directory")
    return files


def _text_suffix(file: Path) -> str:
    """The suffix that tells the format, in lower case: `.txt` for `A.TXT` and `a.txt.gz`."""
    return Path(file.name.lower().removesuffix(".gz")).suffix


def _documents(files: Sequence[Path], meter: Meter) -> Iterator[list[str]]:
    empty = True
    for file in files:
        read = _json_documents if _text_suffix(file) in _JSON_SUFFIXES else _text_documents
        for document in read(file, meter):
            if document:
                empty = False
                yield document
    if empty:
        names = str(files[0]) + (f" and {len(files) - 1} more" if len(files) > 1 else "")
        raise InputError(f"corpus {names}: holds no text")


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
                f'corpus {file}, line {number}: expected one JSON object with a string "text"'
            )
        # JSON can spell half a surrogate pair, which is no character and cannot be encoded
        yield split_sentences(text.encode("utf-8", "ignore").decode("utf-8"))


def _lines(file: Path, meter: Meter) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without surrounding white space)."""
    before = meter.bytes_read
    try:
        with file.open("rb") as stored, _text_of(file, stored) as stream:
            for number, raw in enumerate(stream, start=1):
                # utf-8-sig: editors on Windows begin a file with a byte-order mark
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if number % 256 == 0:  # asking for the place is slower than reading a line
                    meter.bytes_read = before + stored.tell()
            meter.bytes_read = before + stored.tell()
    except UnicodeDecodeError as error:
        raise InputError(
            f"corpus {file}, line {number}: not UTF-8; convert the file, for example with iconv"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(file, error) from error


def _text_of(file: Path, stored: BinaryIO) -> BinaryIO:
    is_zipped = file.suffix.lower() == ".gz"
    return gzip.GzipFile(fileobj=stored) if is_zipped else stored  # type: ignore[return-value]


def _unreadable(file: Path, error: Exception) -> InputError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return InputError(f"corpus {file}: cannot be read: {reason}")
