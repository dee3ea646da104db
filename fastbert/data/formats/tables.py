"""Reads tables with named columns: CSV, TSV and JSON Lines."""

import csv
import io
import json
import math
import string
import sys
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastbert.check import InputError
from fastbert.system.files import STANDARD, is_stream

_FORMATS: dict[str, dict[str, Any]] = {
    ".csv": {"delimiter": ",", "strict": True},
    ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE},
}
_JSON_LINES = ".jsonl"
_BLANKS = string.whitespace + "\u00a0\u2007\u202f\u3000\u200b\ufeff"  # with no-break spaces


class Row(NamedTuple):
    """One row of a table: `where` is its file and line, for messages; `values` are by column."""

    where: str
    values: dict[str, Any]

    def text(self, column: str) -> str:
        """The text in a column; InputError if it is missing, blank or not a string."""
        value = self.values.get(column)
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"{self.where}: expected a text in column {column!r}, got {value!r}")
        return encodable(value)

    def label(self, column: str) -> str:
        """The label in a column, cleaned; JSON numbers and booleans are written as in JSON.

        Raises InputError if the label is missing, blank, not finite, a list or an object.
        """
        value = self.values.get(column)
        is_none = value is None or (isinstance(value, float) and not math.isfinite(value))
        label = "" if is_none or isinstance(value, list | dict) else clean_label(value)
        if not label:
            raise InputError(f"{self.where}: expected a label in column {column!r}, got {value!r}")
        return label


def encodable(text: str) -> str:
    """The text with "?" for each lone surrogate, which JSON can have but UTF-8 cannot encode."""
    return text.encode("utf-8", "replace").decode("utf-8")


def clean_label(value: Any) -> str:
    """A label as text, without surrounding blanks, in Unicode's NFC so that equal labels match."""
    text = value if isinstance(value, str) else json.dumps(value)
    return unicodedata.normalize("NFC", encodable(text).strip(_BLANKS))


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with unchanged line ends, without a byte-order mark.

    The path "-" is standard input. Raises InputError for a file that cannot be read, is not UTF-8
    or is blank.
    """
    try:
        data = sys.stdin.buffer.read() if str(path) == STANDARD else path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}, line {line}: not UTF-8; convert the file, for example with iconv"
        ) from None
    if not text.strip():
        raise InputError(f"{path}: is empty")
    return text


def read_table(
    path: Path, columns: Sequence[str], delimiter: str | None = None, *, in_every_row: bool = True
) -> list[Row]:
    """The rows of a .csv, .tsv or .jsonl file, each with the named columns.

    A .csv is quoted as in RFC 4180. A .tsv is not quoted, like GLUE's files: a quotation mark is an
    ordinary character. A stream, such as standard input, is read as .csv if a delimiter is given,
    otherwise as JSON Lines.

    delimiter: one character to use instead of the comma or the tab; in_every_row: False if it is
    enough that one row of JSON Lines has a column

    Raises InputError for another kind of file, for a file that cannot be read or has no rows, for a
    row with more or fewer fields than the header, and for a missing column.
    """
    kind = path.suffix.lower()
    if is_stream(path) and kind not in (*_FORMATS, _JSON_LINES):
        kind = _JSON_LINES if delimiter is None else ".csv"
    if kind not in (*_FORMATS, _JSON_LINES):
        raise InputError(f"{path}: expected a .csv, .tsv or .jsonl file, got {path.suffix!r}")
    text = read_text(path)
    if kind == _JSON_LINES:
        rows = list(json_rows(text.split("\n"), path, columns if in_every_row else ()))
        _check_columns(
            dict.fromkeys(name for row in rows for name in row.values), columns, f"{path}"
        )
    else:
        # no limit on a field's length, because the whole text is in memory
        lines = io.StringIO(text, newline="")
        rows = list(delimited_rows(lines, path, columns, kind, delimiter, longest=sys.maxsize))
    if not rows:
        raise InputError(f"{path}: has a header but no rows")
    return rows


def dialect(kind: str, delimiter: str | None) -> dict[str, Any]:
    """The options with which Python's csv module reads a .csv or a .tsv."""
    return _FORMATS[kind] | ({} if delimiter is None else {"delimiter": delimiter})


def delimited_rows(
    lines: Iterable[str],
    path: Path,
    columns: Sequence[str],
    kind: str,
    delimiter: str | None = None,
    *,
    longest: int,
    lines_before: int = 0,
) -> Iterator[Row]:
    """The rows of a .csv or .tsv whose header is first in `lines`; never reads beyond a row's end.

    kind: .csv or .tsv; longest: the most characters of a field; lines_before: lines that the caller
    skipped after the header, which messages include in their line numbers. Raises InputError as
    `read_table` does, for two columns of the same name, and for a blank header.
    """
    reader = csv.reader(lines, **dialect(kind, delimiter))
    start = 1  # first line of the row that is being read, for messages
    try:
        header = [name.strip(_BLANKS) for name in _next(reader, longest) or ()]
        if not any(header):
            raise InputError(f"{path}, line 1: expected the names of the columns, got a blank line")
        _check_columns(header, columns, f"{path}", _hint(header))
        if len(set(header)) < len(header):
            raise InputError(f"{path}: two columns have the same name, in {', '.join(header)}")
        while True:
            start = reader.line_num + 1 + lines_before
            fields = _next(reader, longest)
            if fields is None:
                return
            if not fields:  # a blank line
                continue
            where = f"{path}, line {start}"
            if len(fields) != len(header):
                raise InputError(
                    f"{where}: expected {len(header)} fields, as in the header, got {len(fields)}"
                )
            yield Row(where, dict(zip(header, fields, strict=True)))
    except csv.Error as error:
        if str(error).startswith("new-line character"):  # `lines` are divided only at \n
            raise InputError(
                f"{path}, line {start}: a carriage return (\\r) inside the line; end lines with "
                "\\n or \\r\\n, and quote a field that contains one"
            ) from None
        last = reader.line_num + lines_before
        goes_on = "" if last <= start else f", which goes on to line {last}"
        raise InputError(
            f"{path}, line {start}: {error}: a quotation mark opens a field of the row that begins "
            f"here{goes_on}, but no mark closes it; double a mark that is part of the text"
        ) from None


def _next(reader: Iterator[list[str]], longest: int) -> list[str] | None:
    """The fields of the next row, None after the last; the limit is a setting of the process."""
    before = csv.field_size_limit(longest)
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(before)


def _hint(header: list[str]) -> str:
    """Advice to name the delimiter, if the header is one column with a likely delimiter in it."""
    for character, name in ((";", "';'"), ("\t", "'\\t'"), ("|", "'|'"), (",", "','")):
        if len(header) == 1 and character in header[0]:
            return f"; if {name} divides the columns, give --delimiter {name}"
    return ""


def json_rows(
    lines: Iterable[str], path: Path, columns: Sequence[str], lines_before: int = 0
) -> Iterator[Row]:
    """The row in each line that is not blank; lines_before as in `delimited_rows`.

    Raises InputError for a line that is not a JSON object or lacks a column.
    """
    for number, line in enumerate(lines, start=1 + lines_before):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON ({error})") from None
        if not isinstance(values, dict):
            raise InputError(f"{where}: expected a JSON object, got {type(values).__name__}")
        _check_columns(values, columns, where)
        yield Row(where, values)


def _check_columns(
    there: Collection[str], columns: Sequence[str], where: str, hint: str = ""
) -> None:
    for column in columns:
        if column not in there:
            known = ", ".join(map(str, there))
            raise InputError(f"{where}: no column {column!r}, only {known}{hint}")
