"""Words with labels, as the shared tasks of CoNLL write them (Tjong Kim Sang & De Meulder 2003)."""

import re
from pathlib import Path
from typing import NamedTuple

from fastbert.check import InputError
from fastbert.data.formats.tables import clean_label, read_text

_SPACES = re.compile(r"[ \t]+")  # no other space: an ideographic one may be a word
_COMMENT = re.compile(r"#+ ")
_SURE_COMMENT = re.compile(r"# \S+ = ")
_LABEL = re.compile(r"O|[BIESLUMW]-.+")  # BIO, IOBES, BILOU, BMES and BMEWO


class Sentence(NamedTuple):
    """A sentence's words and, unless they were not asked for, their labels."""

    where: str
    words: tuple[str, ...]
    labels: tuple[str, ...] | None


def read_conll(path: Path, *, labelled: bool = True) -> list[Sentence]:
    """The sentences of a file with a word a line, its label in the last field.

    Sentences end at blank lines; `-DOCSTART-` lines, and comments as CoNLL-U has them (`# text =
    ...`), are left out. Raises InputError for a line with another number of fields than the first,
    for a label that is neither O nor a prefix, a hyphen and a type (B-PER), and for a file without
    words.
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
        if labelled and not _LABEL.fullmatch(fields[-1]):
            raise InputError(f"{where}: expected a label O, B-TYPE or I-TYPE, got {fields[-1]!r}")
        if not rows:
            start = number
        rows.append(fields)
    if not sentences:
        raise InputError(f"{path}: holds no words")
    return sentences


def _is_comment(line: str, fields: list[str], width: int | None) -> bool:
    """Whether a line is none with the word "#", which has a label or as many fields as others."""
    if not _COMMENT.match(line):
        return False
    is_word = len(fields) == width or _LABEL.fullmatch(fields[-1]) is not None
    return _SURE_COMMENT.match(line) is not None or not is_word


def _sentence(where: str, rows: list[list[str]], labelled: bool) -> Sentence:
    labels = tuple(row[-1] for row in rows) if labelled else None
    return Sentence(where, tuple(row[0] for row in rows), labels)
