"""Labelled examples in tables: CSV, TSV and JSON Lines, with named columns."""

import csv
import io
import json
import math
import string
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastbert.check import InputError
from fastbert.system.files import STANDARD, is_stream

_FORMATS: dict[str, dict[str, Any]] = {
    ".csv": {"delimiter": ",", "strict": True},
    ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE},
}
_JSON_LINES = ".jsonl"
_BLANKS = string.whitespace + "\u00a0\u2007\u202f\u3000\u200b\ufeff"  # no-break ones too


class Row(NamedTuple):
    """One row: where it stands, for messages, and its values by column."""

    where: str
    values: dict[str, Any]

    def text(self, column: str) -> str:
        """The text of a column; InputError if the row has none there."""
        value = self.values.get(column)
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"{self.where}: expected a text in column {column!r}, got {value!r}")
        return encodable(value)

    def label(self, column: str) -> str:
        """The label in a column as text; JSON's numbers, true and false as JSON writes them."""
        value = self.values.get(column)
        is_none = value is None or (isinstance(value, float) and not math.isfinite(value))
        label = "" if is_none or isinstance(value, list | dict) else clean_label(value)
        if not label:
            raise InputError(f"{self.where}: expected a label in column {column!r}, got {value!r}")
        return label


def encodable(text: str) -> str:
    """The text with a "?" for each half of a surrogate pair, which JSON can spell and UTF-8 not."""
    return text.encode("utf-8", "replace").decode("utf-8")


def clean_label(value: Any) -> str:
    """A label without blanks around it, composed as NFC says, so that equal ones are one."""
    text = value if isinstance(value, str) else json.dumps(value)
    return unicodedata.normalize("NFC", encodable(text).strip(_BLANKS))


def read_text(path: Path) -> str:
    """A UTF-8 file's text with its own line ends; InputError if it cannot be read or is empty.

    The path "-" is standard input.
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


def read_table(path: Path, columns: Sequence[str], delimiter: str | None = None) -> list[Row]:
    """The rows of a .csv, .tsv or .jsonl file, each of which has the named columns.

    A .csv is quoted as RFC 4180 says. A .tsv has no quotes, like those of GLUE: a quotation mark in
    it is one. delimiter: in place of the comma or the tab. A stream, such as standard input, is a
    .csv if there is a delimiter, else JSON Lines. Raises InputError for another kind of file, for
    one without rows, for a row with more or fewer fields than the header, and for a missing column.
    """
    kind = path.suffix.lower()
    if is_stream(path) and kind not in (*_FORMATS, _JSON_LINES):
        kind = _JSON_LINES if delimiter is None else ".csv"
    if kind not in (*_FORMATS, _JSON_LINES):
        raise InputError(f"{path}: expected a .csv, .tsv or .jsonl file, got {path.suffix!r}")
    text = read_text(path)
    if kind == _JSON_LINES:
        rows = list(json_rows(text.split("\n"), path, columns))
    else:
        # the text is in memory already, however long a field is
        lines = io.StringIO(text, newline="")
        rows = list(delimited_rows(lines, path, columns, kind, delimiter, longest=sys.maxsize))
    if not rows:
        raise InputError(f"{path}: has a header and no rows")
    return rows


def dialect(kind: str, delimiter: str | None) -> dict[str, Any]:
    """How the csv library is to read a .csv or a .tsv."""
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
    """The rows below the header, which is the first of `lines`; none is read ahead of its row.

    kind: .csv or .tsv; longest: characters of a field; lines_before: how many were passed over
    after the header, for the numbers in messages. Raises InputError as `read_table` does.
    """
    csv.field_size_limit(longest)
    reader = csv.reader(lines, **dialect(kind, delimiter))
    start = 1  # of the row that is being read
    try:
        header = [name.strip(_BLANKS) for name in next(reader)]
        _check_columns(header, columns, f"{path}", _hint(header))
        if len(set(header)) < len(header):
            raise InputError(f"{path}: two columns have the same name, of {', '.join(header)}")
        while True:
            start = reader.line_num + 1 + lines_before
            fields = next(reader, None)
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
        last = reader.line_num + lines_before
        goes_on = "" if last <= start else f", which goes on to line {last}"
        raise InputError(
            f"{path}, line {start}: {error}: a quotation mark opens a field of the row that begins "
            f"here{goes_on}, and is not closed; double a mark that is meant as text"
        ) from None


def _hint(header: list[str]) -> str:
    """What to say of a header that was not divided, where another character may divide it."""
    for character, name in ((";", "';'"), ("\t", "'\\t'"), ("|", "'|'"), (",", "','")):
        if len(header) == 1 and character in header[0]:
            return f"; if the columns are divided by {name}, give --delimiter {name}"
    return ""


def json_rows(
    lines: Iterable[str], path: Path, columns: Sequence[str], lines_before: int = 0
) -> Iterator[Row]:
    """The row of each line that is not blank; see `delimited_rows`."""
    for number, line in enumerate(lines, start=1 + lines_before):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            values = json.loads(line)
        except ValueError as error:
            raise InputError(f"{where}: not JSON ({error})") from None
        if not isinstance(values, dict):
            raise InputError(f"{where}: expected a JSON object, got {type(values).__name__}")
        _check_columns(values, columns, where)
        yield Row(where, values)


def _check_columns(
    there: Sequence[str] | dict, columns: Sequence[str], where: str, hint: str = ""
) -> None:
    for column in columns:
        if column not in there:
            known = ", ".join(map(str, there))
            raise InputError(f"{where}: no column {column!r}, only {known}{hint}")
