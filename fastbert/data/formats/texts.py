"""Streams the texts of a file that may be larger than memory, from any known place on.

A .txt file has a text in each line; a .csv, .tsv, .jsonl or .parquet has one in a column of each
row. Memory holds one row at a time, or about a thousand rows of a .parquet.
"""

import abc
import csv
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from fastbert.check import InputError, require_libraries
from fastbert.config.options import read_delimiter
from fastbert.data.formats.tables import Row, delimited_rows, dialect, json_rows
from fastbert.system.files import is_stream

LONGEST = 2**22  # bytes of a line, characters of a text; tokenising takes 100 times the memory
_ROWS = 1024  # rows of a .parquet that are decoded at once
_HEADER = 100  # the most lines of a header, whose quoted names may contain line ends


class Mark(NamedTuple):
    """A place between two rows of a file.

    offset: in bytes, or in rows for a .parquet; lines: lines before the place
    """

    offset: int = 0
    lines: int = 0


BEGINNING = Mark()


class Text(NamedTuple):
    """One text of a file. where: file and line, for messages; after: the place after its row."""

    where: str
    text: str
    after: Mark


class Texts(abc.ABC):
    """The texts of one file; `texts_of` chooses the subclass."""

    def __init__(self, path: Path, column: str, delimiter: str | None) -> None:
        self.path, self.column, self.delimiter = path, column, delimiter

    @abc.abstractmethod
    def rows(self, start: Mark = BEGINNING) -> Iterator[Text]:
        """Yields the texts after a mark, including empty ones: one for each line or row.

        Raises InputError, which names the line, for a line that cannot be read, and for a file that
        is empty or blank.
        """

    def text(self, row: Row) -> str:
        """A row's text, which may be "".

        Raises InputError if it is blank, not a string, or longer than LONGEST characters.
        """
        text = "" if row.values[self.column] == "" else row.text(self.column)
        if len(text) > LONGEST:
            raise InputError(f"{row.where}: a text of more than {LONGEST:,} characters; divide it")
        return text


class _Lines:
    """Iterates over lines as text, with their line ends; `mark` is after the latest line."""

    def __init__(self, path: Path, file: BinaryIO, mark: Mark = BEGINNING) -> None:
        self.path, self.file, self.mark = path, file, mark
        file.seek(mark.offset)

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        data = self.file.readline(LONGEST + 1)
        if not data:
            raise StopIteration
        offset, number = self.mark.offset + len(data), self.mark.lines + 1
        if len(data) > LONGEST:
            hint = " (lines end with \\n or \\r\\n, not with \\r)" if b"\r" in data else ""
            raise InputError(
                f"{self.path}, line {number}: longer than {LONGEST:,} bytes; divide it{hint}"
            )
        try:
            text = data.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise InputError(
                f"{self.path}, line {number}: not UTF-8; convert the file, for example with iconv"
            ) from None
        self.mark = Mark(offset, number)
        return text


def _lines(path: Path, file: BinaryIO, start: Mark) -> _Lines:
    """The lines after a mark; at the beginning, InputError if all lines of the file are blank."""
    if start == BEGINNING and not any(map(str.strip, _Lines(path, file))):
        raise InputError(f"{path}: is empty")
    return _Lines(path, file, start)


class _PlainLines(Texts):
    def rows(self, start: Mark = BEGINNING) -> Iterator[Text]:
        with self.path.open("rb") as file:
            lines = _lines(self.path, file, start)
            for line in lines:
                text = line.removesuffix("\n").rstrip("\r")
                yield Text(f"{self.path}, line {lines.mark.lines}", text, lines.mark)


class _JsonLines(Texts):
    def rows(self, start: Mark = BEGINNING) -> Iterator[Text]:
        with self.path.open("rb") as file:
            lines = _lines(self.path, file, start)
            for row in json_rows(lines, self.path, [self.column], start.lines):
                yield Text(row.where, self.text(row), lines.mark)


class _Delimited(Texts):
    def rows(self, start: Mark = BEGINNING) -> Iterator[Text]:
        kind = ".tsv" if self.path.suffix.lower() == ".tsv" else ".csv"
        delimiter = None if self.delimiter is None else read_delimiter(self.delimiter)
        with self.path.open("rb") as file:
            lines, header = _lines(self.path, file, BEGINNING), []
            for line in lines:  # a header is several lines if a quoted name contains line ends
                header.append(line)
                if _is_whole(header, dialect(kind, delimiter)):
                    break
            lines = _Lines(self.path, file, max(start, lines.mark))
            rows = delimited_rows(
                itertools.chain(header, lines),
                self.path,
                [self.column],
                kind,
                delimiter,
                longest=LONGEST,
                lines_before=lines.mark.lines - len(header),
            )
            for row in rows:
                yield Text(row.where, self.text(row), lines.mark)


def _is_whole(lines: list[str], form: dict[str, Any]) -> bool:
    """Whether the lines are a complete row."""
    try:
        return bool(list(csv.reader(lines, **form)))
    except csv.Error:  # an open quotation mark: more lines are needed, up to a limit
        return len(lines) == _HEADER


class _Parquet(Texts):
    """Texts of a .parquet; needs pyarrow, from the extra [embed]."""

    def rows(self, start: Mark = BEGINNING) -> Iterator[Text]:
        parquet = pyarrow_of("--input").parquet
        import pyarrow

        try:
            # pre_buffer=False streams pages, because a whole row group may not fit into memory
            with parquet.ParquetFile(self.path, pre_buffer=False, buffer_size=2**20) as file:
                self._check(file)
                groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
                number = 0
                while groups and number + groups[0] <= start.offset:
                    number += groups.pop(0)
                batches = file.iter_batches(
                    _ROWS,
                    range(file.num_row_groups - len(groups), file.num_row_groups),
                    [self.column],
                )
                for value in itertools.chain.from_iterable(
                    b.column(0).to_pylist() for b in batches
                ):
                    number += 1
                    if number > start.offset:
                        row = Row(f"{self.path}, row {number}", {self.column: value})
                        yield Text(row.where, self.text(row), Mark(number))
        except pyarrow.ArrowException as error:
            raise InputError(f"{self.path}: not readable as Parquet ({error})") from None

    def _check(self, file: Any) -> None:
        names = file.schema_arrow.names
        if self.column not in names:
            raise InputError(f"{self.path}: no column {self.column!r}, only {', '.join(names)}")
        if not file.metadata.num_rows:
            raise InputError(f"{self.path}: has no rows")


_KINDS: dict[str, type[Texts]] = {
    ".txt": _PlainLines,
    ".jsonl": _JsonLines,
    ".csv": _Delimited,
    ".tsv": _Delimited,
    ".parquet": _Parquet,
}


def texts_of(path: Path, column: str, delimiter: str | None = None) -> Texts:
    """The reader for a file, chosen by its ending.

    With a delimiter, a .txt and a file without an ending are read as .csv. Raises InputError for an
    unknown ending, and for a stream, which cannot be read again.
    """
    if is_stream(path):
        raise InputError(f"--input {path}: a stream can be read only once; name a file")
    kind = path.suffix.lower()
    if delimiter is not None and kind in (".txt", ""):
        kind = ".csv"
    if kind not in _KINDS:
        raise InputError(f"{path}: expected one of {', '.join(_KINDS)}, got {path.suffix!r}")
    return _KINDS[kind](path, column, delimiter)


def pyarrow_of(option: str) -> Any:
    """The pyarrow package with its parquet module; InputError if it is not installed.

    option: the command-line option with which the message begins
    """
    require_libraries(f"{option}: .parquet", ("pyarrow.parquet",), "embed")
    import pyarrow

    return pyarrow
