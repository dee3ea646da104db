"""Labelled examples in tables: CSV, TSV and JSON Lines, with named columns."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastbert.check import InputError

_FORMATS: dict[str, dict[str, Any]] = {
    ".csv": {"delimiter": ",", "strict": True},
    ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE},
}
_JSON_LINES = ".jsonl"


class Row(NamedTuple):
    """One row: where it stands, for messages, and its values by column."""

    where: str
    values: dict[str, Any]

    def text(self, column: str) -> str:
        """The text of a column; InputError if the row has none there."""
        value = self.values.get(column)
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"{self.where}: expected a text in column {column!r}, got {value!r}")
        return value

    def label(self, column: str) -> str:
        """The label in a column as text; JSON's numbers, true and false as JSON writes them."""
        value = self.values.get(column)
        if value is None or isinstance(value, list | dict) or value == "":
            raise InputError(f"{self.where}: expected a label in column {column!r}, got {value!r}")
        return value if isinstance(value, str) else json.dumps(value)


def read_text(path: Path) -> str:
    """A UTF-8 file's text with its own line ends; InputError if it cannot be read or is empty."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if not text.strip():
        raise InputError(f"{path}: is empty")
    return text


def read_table(path: Path, columns: Sequence[str]) -> list[Row]:
    """The rows of a .csv, .tsv or .jsonl file, each of which has the named columns.

    A .csv is quoted as RFC 4180 says. A .tsv has no quotes, like those of GLUE: a quotation mark in
    it is one. Raises InputError for another kind of file, for one without rows, for a row with more
    or fewer fields than the header, and for a missing column.
    """
    if path.suffix not in (*_FORMATS, _JSON_LINES):
        raise InputError(f"{path}: expected a .csv, .tsv or .jsonl file, got {path.suffix!r}")
    text = read_text(path)
    if path.suffix == _JSON_LINES:
        rows = list(_json_lines(text, path, columns))
    else:
        rows = list(_delimited(text, path, columns))
    if not rows:
        raise InputError(f"{path}: has a header and no rows")
    return rows


def _delimited(text: str, path: Path, columns: Sequence[str]) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), **_FORMATS[path.suffix])
    try:
        header = next(reader)
        _check_columns(header, columns, str(path))
        if len(set(header)) < len(header):
            raise InputError(f"{path}: two columns have the same name, of {', '.join(header)}")
        for fields in reader:
            where = f"{path}, line {reader.line_num}"
            if not fields:  # a blank line
                continue
            if len(fields) != len(header):
                raise InputError(
                    f"{where}: expected {len(header)} fields, as in the header, got {len(fields)}"
                )
            yield Row(where, dict(zip(header, fields, strict=True)))
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}") from None


def _json_lines(text: str, path: Path, columns: Sequence[str]) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
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


def _check_columns(there: Sequence[str] | dict, columns: Sequence[str], where: str) -> None:
    for column in columns:
        if column not in there:
            raise InputError(f"{where}: no column {column!r}, only {', '.join(map(str, there))}")
