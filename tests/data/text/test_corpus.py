import bz2
import gzip
import json
import lzma
import os
import sys
from pathlib import Path

import pytest

from fastbert.check import InputError
from fastbert.data import (
    Meter,
    find_files,
    fingerprint_files,
    fingerprint_python,
    python_documents,
    read_documents,
    split_sentences,
)
from fastbert.data.text import python_docs
from fastbert.data.text.files import describe


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def test_text_has_a_sentence_a_line_and_blank_lines_between_documents(tmp_path):
    file = write(tmp_path / "a", "\ufeff\nOne. Still one.\r\n two \n \n\n\nthree\n\n")
    assert list(read_documents([file])) == [["One. Still one.", "two"], ["three"]]


def test_the_end_of_a_file_ends_its_document(tmp_path):
    files = [write(tmp_path / "b.txt", "one"), write(tmp_path / "a.txt", "two")]
    assert list(read_documents(files)) == [["one"], ["two"]]


def test_a_meter_tells_how_far_files_are_read(tmp_path):
    text = "\n\n".join(f"sentence number {i}" for i in range(20_000))
    files = [write(tmp_path / name, text) for name in ("a.txt", "b.txt.gz")]
    first, second = (file.stat().st_size for file in files)
    meter = Meter()
    seen = [meter.bytes_read for _ in read_documents(files, meter)]
    assert meter == Meter(first + second, first + second)
    assert seen == sorted(seen)
    assert abs(seen[10_000] - first / 2) < 0.05 * first + 2**17  # files are read in blocks
    assert seen[19_999] <= first <= seen[20_001]
    assert first < seen[30_000] <= first + second  # gzip of Python 3.13 reads ahead by 128 KiB


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.JSONL", "a.jsonl.gz"])
def test_json_lines(tmp_path, name):
    rows = [{"text": "One. Two!\nthree"}, {"text": ""}, {"id": 4, "text": "vier \ud800"}]
    file = write(tmp_path / name, "\n".join(map(json.dumps, rows)) + "\n\n")
    assert list(read_documents([str(file)])) == [["One.", "Two!", "three"], ["vier"]]


def test_directories_are_read_recursively_in_order(tmp_path):
    for name in ("b/c.text", "a.txt", "b/a.txt.gz", "c.ndjson.gz"):
        write(tmp_path / name, json.dumps({"text": name}) if "json" in name else name)
    write(tmp_path / "ignored.bin", b"\xff")
    write(tmp_path / "d.gz", "no ending inside")
    names = [name for [name] in read_documents([tmp_path])]
    assert names == ["a.txt", "b/a.txt.gz", "b/c.text", "c.ndjson.gz", "no ending inside"]


WIKI = '<doc id="1" url="u" title="Cats">\nCats\n\nOne. Two is here.\n\nThree.\n</doc>\n'


def test_links_to_directories_are_followed_and_loops_are_not(tmp_path):
    write(tmp_path / "far" / "deep" / "a.txt", "far away")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "link").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "deep" / "loop").symlink_to(tmp_path / "far")
    found = find_files([tmp_path / "corpus"])
    assert [name for _, name in found.files] == ["link/deep/a.txt"]
    assert [path.name for path, _ in found.passed_over] == ["loop"]
    assert list(read_documents([tmp_path / "corpus"])) == [["far away"]]


def test_files_without_an_ending_are_read(tmp_path):
    """WikiExtractor's two forms, the parts of a split, and plain text."""
    write(tmp_path / "AA" / "wiki_00", WIKI * 2)
    write(tmp_path / "AA" / "wiki_01", '{"id": "1", "text": "json. Two."}\n')
    write(tmp_path / "AA" / "wiki_02.gz", WIKI)
    write(tmp_path / "AA" / "wiki_03", "\ufeff\n" + WIKI)  # as an editor on Windows saves it
    write(tmp_path / "news.2011", "plain\n")
    write(tmp_path / "plain", "plain\n\ntoo\n")
    cats = ["Cats", "One.", "Two is here.", "Three."]
    assert list(read_documents([tmp_path])) == [
        *([cats] * 2), ["json.", "Two."], *([cats] * 2), ["plain"], ["plain"], ["too"],
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_packed_files_are_read(suffix, tmp_path):
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[suffix]
    for name in ("a.txt", "B.TXT", "wiki_00"):
        suffix = suffix.upper() if name.isupper() else suffix.lower()
        (tmp_path / (name + suffix)).write_bytes(pack(b"one\n\ntwo\n"))
    assert list(read_documents([tmp_path])) == [["one"], ["two"]] * 3
    (tmp_path / ("b.txt" + suffix)).write_bytes(pack(WIKI.encode() * 9)[:60])
    with pytest.raises(InputError, match=rf"b\.txt\{suffix}: cannot be read"):
        list(read_documents([tmp_path]))


def test_what_is_passed_over_is_named_with_the_reason(tmp_path):
    write(tmp_path / "a.txt", "text")
    for name in ("b.bin", "c.pdf", ".DS_Store", ".git/HEAD", "d.tar.gz"):
        write(tmp_path / name, b"\xff")
    os.mkfifo(tmp_path / "e.txt")
    found = find_files([tmp_path])
    assert {path.name: why for path, why in found.passed_over} == {
        "b.bin": "the ending .bin", "c.pdf": "the ending .pdf", ".DS_Store": "hidden",
        ".git": "hidden", "d.tar.gz": "the ending .tar", "e.txt": "not a regular file",
    }  # fmt: skip
    first, *rest = describe(found, 1)
    assert first == "corpus: 1 file(s), 1 documents"
    assert sum("skipped, the ending .bin: " in line and "b.bin" in line for line in rest) == 1


def test_what_may_be_text_and_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    write(tmp_path / "one" / "a.txt", "text")
    (tmp_path / "one" / "b.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=r"one/b\.txt: a broken link"):
        read_documents([tmp_path / "one"])
    with pytest.raises(InputError, match=r"one/b\.txt: a broken link"):
        read_documents([tmp_path / "one" / "b.txt"])
    write(tmp_path / "two" / "a.txt.zst", b"\x28\xb5\x2f\xfd")
    with pytest.raises(InputError, match=r"a\.txt\.zst: cannot read \.zst; decompress it"):
        read_documents([tmp_path / "two"])

    write(tmp_path / "three" / "locked" / "a.txt", "text")
    listing = Path.iterdir

    def refuse(path):  # the superuser may read all
        if path.name == "locked":
            raise PermissionError(13, "Permission denied")
        return listing(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(InputError, match="three/locked: cannot be read: Permission denied"):
        read_documents([tmp_path / "three"])


def test_streams(tmp_path):
    """The first document comes before the rest, which is broken, is read."""
    file = write(tmp_path / "a.txt", b"first\n\n" + b"x\n" * 100_000 + b"\n\xff\n")
    documents = read_documents([file])
    assert next(documents) == ["first"]
    with pytest.raises(InputError):
        list(documents)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good\n\xff\xfebad\n", "a.txt, line 2: not UTF-8"),
        ("a.txt", "\n \n\n", "a.txt: holds no text"),
        ("a.jsonl", '{"text": "a"}\n{"text": 3}\n', "a.jsonl, line 2: expected one JSON object"),
        ("a.jsonl", '{"txt": "a"}\n', "line 1: expected one JSON object"),
        ("a.jsonl", '["text"]\n', "line 1: expected one JSON object"),
        ("a.jsonl", '"text"\n', "line 1: expected one JSON object"),
        ("a.jsonl", "{\n", "line 1: expected one JSON object"),
        ("a.jsonl", "[" * 100_000 + "\n", "line 1: expected one JSON object"),
        ("a.jsonl", '{"text": "\\n"}\n', "a.jsonl: holds no text"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    file = write(tmp_path / name, content)
    with pytest.raises(InputError) as error:
        list(read_documents([file]))
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_broken_gzip(tmp_path):
    whole = gzip.compress(b"a sentence that is long enough\n" * 1000)
    cut = tmp_path / "cut.txt.gz"
    cut.write_bytes(whole[: len(whole) // 2])
    fake = tmp_path / "fake.txt.gz"
    fake.write_bytes(b"plain text")
    damaged = tmp_path / "damaged.txt.gz"
    damaged.write_bytes(whole[:20] + b"\xff\xff\xff\xff" + whole[24:])
    for file in (cut, fake, damaged):
        with pytest.raises(InputError, match=f"{file.name}: cannot be read: "):
            list(read_documents([file]))


def test_missing_paths_are_refused_before_anything_is_read(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such file or directory"):
        read_documents([tmp_path / "nowhere"])
    with pytest.raises(InputError, match=r"has no \.txt, .* file"):
        read_documents([tmp_path])
    with pytest.raises(InputError, match="expected a file or a directory, got none"):
        read_documents([])
    os.mkfifo(tmp_path / "pipe")  # which a second reading would wait for
    with pytest.raises(InputError, match="pipe: not a regular file"):
        read_documents([tmp_path / "pipe"])


def test_fingerprint_follows_names_and_contents(tmp_path):
    file = write(tmp_path / "in" / "a.txt", "one")
    first = fingerprint_files([tmp_path])
    assert first == fingerprint_files([tmp_path])
    write(file, "two")
    changed = fingerprint_files([tmp_path])
    file.rename(tmp_path / "in" / "b.txt")
    renamed = fingerprint_files([tmp_path])
    assert len({first, changed, renamed}) == 3
    (tmp_path / "in").rename(tmp_path / "out")
    assert fingerprint_files([tmp_path / "out"]) != renamed  # other relative name
    write(tmp_path / "out" / "b.txt.gz", "two")  # the same text at another place
    assert fingerprint_files([tmp_path]) != renamed


@pytest.fixture(scope="module")
def python_corpus():
    return list(python_documents())


def test_the_default_corpus_is_about_two_megabytes_of_prose(python_corpus):
    text = "\n".join(sentence for document in python_corpus for sentence in document)
    assert 1_200_000 < len(text) < 6_000_000
    assert len(python_corpus) > 400
    assert all(document and all(document) for document in python_corpus)
    letters = sum(character.isalpha() or character == " " for character in text)
    assert letters / len(text) > 0.85
    prompts = sum(s.startswith(">>>") for document in python_corpus for s in document)
    assert prompts < 5  # one is in the middle of a sentence about interpreters
    assert ":class:`" not in text


def test_the_default_corpus_has_topics_and_docstrings(python_corpus):
    sentences = {sentence for document in python_corpus for sentence in document}
    assert 'The simple form, "assert expression", is equivalent to' in sentences
    assert "Test whether a path is absolute" in sentences  # posixpath.isabs
    assert "Split a path in root and extension." not in sentences  # a comment above it
    assert "idlelib" not in sys.modules


def test_the_default_corpus_is_the_same_each_time(python_corpus, monkeypatch):
    files = python_docs._modules()
    assert files == sorted(files)
    monkeypatch.setattr(python_docs, "_modules", lambda: files[:50])
    assert fingerprint_python() == fingerprint_python()
    part = list(python_documents())
    assert len(part) > 100
    assert part == python_corpus[: len(part)]


def test_the_default_corpus_may_be_missing(monkeypatch):
    monkeypatch.setattr(python_docs, "_modules", list)
    monkeypatch.setattr(python_docs, "_topics", list)
    with pytest.raises(InputError, match="has no sources for the default corpus"):
        list(python_documents())


def test_docstrings_come_in_the_order_of_the_source(tmp_path):
    source = write(
        tmp_path / "m.py",
        '"""Module."""\nclass A:\n    """Class."""\n    def f(self):\n        """Method."""\n'
        'try:\n    def g():\n        """Inner."""\nexcept E:\n    pass\n'
        'async def h():\n    """Last.\n\n    >>> code\n    """\n    "no docstring"\n',
    )
    assert python_docs._prose(python_docs._docstrings(source)) == [
        "Module.",
        "Class.",
        "Method.",
        "Inner.",
        "Last.",
    ]


def test_prose_joins_lines_and_drops_marks():
    text = (
        "Title\n=====\n\nUse ``open()`` or :func:`~os.fdopen`; *never* a post-\nmortem. See\n"
        "**Source code:** below.\n\n* one item\n* another\n\n.. note:: dropped\n\n>>> 1 + 1\n2\n"
    )
    assert python_docs._prose(text) == [
        "Title",
        "Use open() or os.fdopen; never a post-mortem.",
        "See Source code: below.",
        "one item",
        "another",
    ]
    assert split_sentences("") == []
