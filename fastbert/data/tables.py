"""Labelled data as people have it: CSV, TSV and JSON Lines with named columns, CoNLL for NER."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from fastbert.check import InputError

_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")


class Row(NamedTuple):
    """values: by column; where: file and line, for messages."""

    values: dict[str, Any]
    where: str

    def get(self, column: str) -> Any:
        """Raises InputError if there is no such column."""
        if column not in self.values:
            known = ", ".join(map(str, self.values))
            raise InputError(f"{self.where}: no column {column!r}; there are {known}")
        return self.values[column]

    def text(self, column: str) -> str:
        value = self.get(column)
        if not isinstance(value, str):
            raise InputError(f"{self.where}: expected text in column {column!r}, got {value!r}")
        return value


def read_table(path: str | Path) -> list[Row]:
    """Rows of a .csv, a .tsv (no quoting) or a .jsonl file, UTF-8, with named columns.

    Raises InputError for another suffix, a line that does not fit the header, a file that cannot be
    read, or one without rows.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in _JSON_SUFFIXES:
        read = _json_rows
    elif suffix in (".csv", ".tsv"):
        read = _csv_rows
    else:
        raise InputError(f"{path}: expected .csv, .tsv or .jsonl")
    return _read(path, read)


class Sentence(NamedTuple):
    """labels: None where the file has none."""

    words: list[str]
    labels: list[str] | None
    where: str


def read_conll(path: str | Path, *, labelled: bool = True) -> list[Sentence]:
    """Sentences of a CoNLL file: a word a line, its label in the last column, blank lines between.

    Columns are separated by white space, their number is the same in the whole file; lines that
    begin with -DOCSTART- are skipped. Without `labelled` the word may stand alone.
    """
    return _read(Path(path), lambda file, path: _conll_sentences(file, path, labelled))


def _read(path: Path, read) -> list:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            found = list(read(file, path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8; convert it, for example with iconv") from None
    except csv.Error as error:
        raise InputError(f"{path}: not readable as a table ({error})") from None
    if not found:
        raise InputError(f"{path}: holds no examples")
    return found


def _csv_rows(file: TextIO, path: Path) -> Iterator[Row]:
    if path.suffix.lower() == ".csv":
        reader = csv.DictReader(file, strict=True)
    else:
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    for values in reader:
        where = f"{path}, line {reader.line_num}"
        if None in values or None in values.values():
            names = reader.fieldnames or ()
            count = sum(value is not None for name, value in values.items() if name is not None)
            count += len(values.get(None, ()))
            raise InputError(f"{where}: {count} fields, and the header names {len(names)}")
        yield Row(dict(values), where)


def _json_rows(file: TextIO, path: Path) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            values = json.loads(line)
        except ValueError:
            values = None
        if not isinstance(values, dict):
            raise InputError(f"{where}: expected one JSON object")
        yield Row(values, where)


def _conll_sentences(file: TextIO, path: Path, labelled: bool) -> Iterator[Sentence]:
    rows: list[list[str]] = []
    begin = width = 0

    def sentence() -> Sentence:
        labels = [row[-1] for row in rows] if width > 1 else None
        return Sentence([row[0] for row in rows], labels, f"{path}, line {begin}")

    for number, line in enumerate(file, start=1):
        fields = line.split()
        if not fields or fields[0] == "-DOCSTART-":
            if rows:
                yield sentence()
            rows = []
            continue
        width = width or len(fields)
        if len(fields) != width:
            raise InputError(
                f"{path}, line {number}: {len(fields)} fields, and the lines before have {width}"
            )
        if labelled and width < 2:
            raise InputError(f"{path}, line {number}: a word without a label")
        if not rows:
            begin = number
        rows.append(fields)
    if rows:
        yield sentence()
