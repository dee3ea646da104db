"""Labelled words in the format of the CoNLL shared tasks (Tjong Kim Sang & De Meulder 2003)."""

import re
from pathlib import Path
from typing import NamedTuple

from fastbert.check import InputError
from fastbert.data.formats.tables import clean_label, read_text

_SPACES = re.compile(r"[ \t]+")  # no others, because an ideographic space may be a word
_COMMENT = re.compile(r"#+ ")
_SURE_COMMENT = re.compile(r"# \S+ = ")
LABEL = re.compile(r"O|[BIESLUMW]-.+")  # BIO, IOBES, BILOU, BMES and BMEWO


class Sentence(NamedTuple):
    """The words of a sentence and their labels, None if the file was read without labels.

    where: file and line, for messages
    """

    where: str
    words: tuple[str, ...]
    labels: tuple[str, ...] | None


def read_conll(path: Path, *, labelled: bool = True) -> list[Sentence]:
    """The sentences of a file with one word per line, and its label in the last field.

    Blank lines end sentences. `-DOCSTART-` lines and CoNLL-U comments (`# text = ...`) are skipped.
    Raises InputError for a file that cannot be read or has no words, for a line whose number of
    fields differs from the first line's, and for a label that is neither O nor a prefix, a hyphen
    and a type (B-PER).
    """
    sentences: list[Sentence] = []
    rows: list[list[str]] = []
    start, width = 0, None
    for number, line in enumerate([*read_text(path).split("\n"), ""], start=1):
        fields = _SPACES.split(line.strip(" \t\r"))
        if _is_comment(line, fields, width):
            continue
        if fields == [""] or fields[0] == "-DOCSTART-":
            if rows:
                sentences.append(_sentence(f"{path}, line {start}", rows, labelled))
                rows = []
            continue
        where = f"{path}, line {number}"
        width = width or max(len(fields), 2 if labelled else 1)
        if len(fields) != width:
            raise InputError(f"{where}: expected {width} fields, got {len(fields)}: {line.strip()}")
        if labelled:
            fields[-1] = clean_label(fields[-1])
        if labelled and not LABEL.fullmatch(fields[-1]):
            raise InputError(f"{where}: expected a label O, B-TYPE or I-TYPE, got {fields[-1]!r}")
        if not rows:
            start = number
        rows.append(fields)
    if not sentences:
        raise InputError(f"{path}: holds no words")
    return sentences


def _is_comment(line: str, fields: list[str], width: int | None) -> bool:
    """Whether a line is a comment; a line with the word "#" has a label or the usual `width`."""
    if not _COMMENT.match(line):
        return False
    is_word = len(fields) == width or LABEL.fullmatch(fields[-1]) is not None
    return _SURE_COMMENT.match(line) is not None or not is_word


def _sentence(where: str, rows: list[list[str]], labelled: bool) -> Sentence:
    labels = tuple(row[-1] for row in rows) if labelled else None
    return Sentence(where, tuple(row[0] for row in rows), labels)
