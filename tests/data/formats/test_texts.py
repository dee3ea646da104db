"""Texts of files read row by row: as the readers of whole files give them, from any mark."""

import csv
import io
import json

import hypothesis
import hypothesis.strategies as st
import pytest

from fastbert.check import InputError
from fastbert.data.formats import texts as module
from fastbert.data.formats.tables import read_table
from fastbert.data.formats.texts import BEGINNING, Mark, texts_of
from fastbert.embedding import array

LINES = ["one", "", "two  ", "drei é 北京", "\tfour", "fünf"]
CSV = 'id,"te\nxt",more\r\n1,"a\nb",x\r\n\r\n2,,y\r\n3,"c ""d""\n\ne",z\r\n4,last,w'


def write(path, text):
    path.write_bytes(text.encode())
    return path


def files(tmp_path):
    rows = [{"text": line, "n": n} for n, line in enumerate(LINES) if line.strip()]
    jsonl = "\n\n".join(json.dumps(row) for row in rows)
    return [
        (write(tmp_path / "a.txt", "\r\n".join(LINES) + "\n"), "text"),
        (write(tmp_path / "b.txt", "\ufeff" + "\n".join(LINES)), "text"),
        (write(tmp_path / "c.jsonl", jsonl), "text"),
        (write(tmp_path / "d.csv", CSV), "te\nxt"),
        (write(tmp_path / "e.tsv", '\ufefftext\tb\n"a\t1\n\nb c\t2\n'), "text"),
        (write(tmp_path / "f.csv", "text\n\n\nx\n"), "text"),
    ]


def test_they_are_those_of_the_same_stream_and_go_on_from_every_mark(tmp_path, monkeypatch):
    monkeypatch.setattr(array, "is_stream", lambda path: True)
    for path, column in files(tmp_path):
        found = list(texts_of(path, column).rows())
        read = [(text.where, text.text) for text in array._texts(path, column, None)]
        assert [(row.where, row.text) for row in found] == read, path
        for number, row in enumerate(found):
            assert list(texts_of(path, column).rows(row.after)) == found[number + 1 :], path
        assert found == list(texts_of(path, column).rows(BEGINNING))


@hypothesis.given(
    st.lists(st.lists(st.text('ab\n", ;é', max_size=5), min_size=2, max_size=2), min_size=1)
)
@hypothesis.settings(max_examples=100, deadline=None)
def test_any_table_goes_on_from_every_mark(tmp_path_factory, rows):
    text = io.StringIO()
    csv.writer(text).writerows([["text", "b"], *rows])
    path = write(tmp_path_factory.mktemp("t") / "t.csv", text.getvalue())
    try:
        whole = [(r.where, r.values["text"]) for r in read_table(path, ["text"])]
        found = [(r.where, r.text, r.after) for r in texts_of(path, "text").rows()]
    except InputError as error:
        assert "expected a text" in str(error)  # noqa: PT017  # of blanks alone
        return
    assert [row[:2] for row in found] == whole
    for number, (_, _, after) in enumerate(found):
        rest = [(r.where, r.text) for r in texts_of(path, "text").rows(after)]
        assert rest == whole[number + 1 :]


def test_a_delimiter_of_ones_own(tmp_path):
    path = write(tmp_path / "a.txt", "x;text\n1;a,b\n2;c\n")
    assert [row.text for row in texts_of(path, "text", ";").rows()] == ["a,b", "c"]


def test_parquet_in_row_groups(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="the extra [embed] is needed")
    pytest.importorskip("pyarrow.parquet")
    lines = [f"line {n}" if n % 7 else "" for n in range(3000)]
    table = arrow.table({"n": list(range(3000)), "text": lines})
    path = tmp_path / "a.parquet"
    arrow.parquet.write_table(table, path, row_group_size=1100)
    found = list(texts_of(path, "text").rows())
    assert [row.text for row in found] == lines
    for start in (1, 1023, 1024, 1099, 1100, 1101, 2200, 2999, 3000):
        assert list(texts_of(path, "text").rows(Mark(start))) == found[start:]
    assert found[1100].where.endswith("row 1101")
    with pytest.raises(InputError, match="no column 'body', only n, text"):
        list(texts_of(path, "body").rows())
    with pytest.raises(InputError, match="row 1: expected a text in column 'n', got 0"):
        list(texts_of(path, "n").rows())
    write(path, "PAR1 and no more")
    with pytest.raises(InputError, match="not readable as Parquet"):
        list(texts_of(path, "text").rows())


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", b"a\nb\xff\n", "line 2: not UTF-8"),
        ("a.txt", b"a\n" + b"x" * 101, "line 2: longer than 100 bytes"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 1}\n', "line 2: expected a text in column 'text'"),
        ("a.jsonl", b'{"text": "a"}\n{"body": 1}\n', "line 2: no column 'text', only body"),
        ("a.jsonl", b'{"text": "a"}\n\n{', "line 3: not JSON"),
        ("a.csv", b"text,b\na,b\nc\n", "line 3: expected 2 fields"),
        ("a.csv", b"text\n" + b'"' + b"x y\n" * 40, "line 2: .* a quotation mark opens a field"),
        ("a.csv", b"body\na\n", "no column 'text', only body"),
        ("a.csv", b"\n\ntext\na\n", "line 1: expected the names of the columns"),
        ("a.csv", b"text,b\ra,1\rb,2\r", r"line 1: a carriage return \(\\r\) inside the line"),
        ("a.tsv", b"text\tb\na\rb\t1\n", r"line 2: a carriage return \(\\r\) inside the line"),
        ("a.csv", b"text\r" + b"a\r" * 50, r"longer than 100 bytes; .* not with \\r"),
        ("a.bin", b"a", r"expected one of \.txt, .*, got '\.bin'"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, monkeypatch, name, text, message):
    monkeypatch.setattr(module, "LONGEST", 100)
    path = tmp_path / name
    path.write_bytes(text)
    with pytest.raises(InputError, match=message):
        list(texts_of(path, "text").rows())


def test_the_process_keeps_its_own_limit_of_a_fields_length(tmp_path):
    """All of its modules read with that one, importlib.metadata too."""
    path, before = write(tmp_path / "a.csv", CSV), csv.field_size_limit()
    for _ in texts_of(path, "te\nxt").rows():
        assert csv.field_size_limit() == before
    read_table(path, ["id"])
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("blank", [b"", b"\xef\xbb\xbf", b"\n\n", b" \r\n\t\n"])
@pytest.mark.parametrize("ending", ["txt", "csv", "tsv", "jsonl"])
def test_a_file_without_text_is_empty(tmp_path, ending, blank, monkeypatch):
    path = tmp_path / f"a.{ending}"
    path.write_bytes(blank)
    with pytest.raises(InputError, match=rf"a\.{ending}: is empty"):
        list(texts_of(path, "text").rows())
    monkeypatch.setattr(array, "is_stream", lambda path: True)
    with pytest.raises(InputError, match=rf"a\.{ending}: is empty"):
        array._texts(path, "text", None)


def test_blank_lines_at_the_end_are_texts_from_any_mark(tmp_path):
    path = write(tmp_path / "a.txt", "one\n\n \n")
    *_, last = rows = list(texts_of(path, "text").rows())
    assert [row.text for row in rows] == ["one", "", " "]
    assert list(texts_of(path, "text").rows(rows[0].after)) == rows[1:]
    assert list(texts_of(path, "text").rows(last.after)) == []


def test_a_text_of_a_parquet_has_a_limit(tmp_path, monkeypatch):
    arrow = pytest.importorskip("pyarrow", reason="the extra [embed] is needed")
    pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(module, "LONGEST", 5)
    path = tmp_path / "a.parquet"
    arrow.parquet.write_table(arrow.table({"text": ["12345", "123456"]}), path)
    with pytest.raises(InputError, match="row 2: a text of more than 5 characters"):
        list(texts_of(path, "text").rows())


def test_a_parquet_without_rows(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="the extra [embed] is needed")
    pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    arrow.parquet.write_table(arrow.table({"text": arrow.array([], arrow.string())}), path)
    for read in (texts_of(path, "text").rows, lambda: array._texts(path, "text", None)):
        with pytest.raises(InputError, match="has no rows"):
            list(read())


def test_a_stream_is_refused():
    with pytest.raises(InputError, match="a stream can be read only once"):
        texts_of(module.Path("-"), "text")
