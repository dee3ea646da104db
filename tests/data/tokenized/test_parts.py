"""Parts of a cache that were complete are kept, whatever ended the process before."""

import os
import signal
import threading

import pytest
from tokenizers import Tokenizer

from fastbert.data import tokenize_corpus
from fastbert.data.text.encoding import DocumentEncoder
from fastbert.data.tokenized import parts
from tests import processes
from tests.data.tokenized.case import assert_same, interrupted


def test_continues_after_the_complete_parts(documents, tokenizer, tmp_path, monkeypatch):
    whole = tokenize_corpus(documents, tokenizer, tmp_path / "a", fingerprint="f")
    with pytest.raises(KeyboardInterrupt):
        tokenize_corpus(interrupted(documents, 50), tokenizer, tmp_path / "b", fingerprint="f")
    parts = sorted((tmp_path / "b" / "partial").glob("0*.npz"))
    assert len(parts) > 3
    assert not (tmp_path / "b" / "manifest.json").exists()
    (tmp_path / "b" / ".tokens.npy.123").write_bytes(b"half")  # of a kill while parts were merged

    encoded = []
    encode = DocumentEncoder.encode
    monkeypatch.setattr(
        DocumentEncoder, "encode", lambda e, docs: encoded.extend(docs) or encode(e, docs)
    )
    again = tokenize_corpus(documents, tokenizer, tmp_path / "b", fingerprint="f")
    assert_same(again, whole)
    assert 30 <= len(encoded) < 50  # the last of 80, and those whose part was not yet full
    assert encoded == documents[-len(encoded) :]
    assert not list((tmp_path / "b").glob(".*"))


def test_damaged_parts_and_parts_cut_elsewhere_are_made_again(
    documents, tokenizer, tmp_path, monkeypatch
):
    whole = tokenize_corpus(documents, tokenizer, tmp_path / "a", fingerprint="f")
    with pytest.raises(KeyboardInterrupt):
        tokenize_corpus(interrupted(documents, 50), tokenizer, tmp_path / "b", fingerprint="f")
    os.truncate(tmp_path / "b" / "partial" / "000002.npz", 100)
    with pytest.raises(KeyboardInterrupt):
        tokenize_corpus(interrupted(documents, 30), tokenizer, tmp_path / "b", fingerprint="f")
    (tmp_path / "b" / "partial" / "000001.npz").unlink()
    monkeypatch.setattr(parts, "PART_CHARACTERS", 3_000)
    assert_same(tokenize_corpus(documents, tokenizer, tmp_path / "b", fingerprint="f"), whole)


def tokenize_and_die(documents, tokenizer, directory):
    """Kills its process in the middle of writing the fourth part."""
    parts.PART_CHARACTERS = 5_000
    savez, calls = parts.np.savez, []

    def dying(file, **arrays):
        calls.append(file)
        if len(calls) == 4:
            file.write(b"half a pa")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        savez(file, **arrays)

    parts.np.savez = dying
    tokenize_corpus(documents, Tokenizer.from_str(tokenizer), directory, fingerprint="f")


def test_survives_a_kill(documents, tokenizer, tmp_path):
    job = (documents, tokenizer.to_str(), tmp_path / "b")
    assert processes.run(tokenize_and_die, *job) == (-signal.SIGKILL, "")
    made = sorted((tmp_path / "b" / "partial").glob("0*.npz"))
    assert len(made) == 3
    stamps = [part.stat().st_mtime_ns for part in made]

    def check(*_):  # before the first part that this run makes, and after each
        assert [part.stat().st_mtime_ns for part in made] == stamps

    resumed = tokenize_corpus(documents, tokenizer, tmp_path / "b", fingerprint="f", progress=check)
    assert_same(resumed, tokenize_corpus(documents, tokenizer, tmp_path / "a", fingerprint="f"))
    assert not (tmp_path / "b" / "partial").exists()


def unreadable(documents, after):
    yield from documents[:after]
    raise PermissionError(13, "Permission denied", "corpus.txt")


def forgetful(sentence):
    raise FileNotFoundError(2, "No such file or directory", "dictionary.txt")


def complain(*_):
    raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_of_the_callers_own_is_told_as_it_is(documents, tokenizer, tmp_path, processes):
    options = {"fingerprint": "f", "processes": processes}
    with pytest.raises(PermissionError, match=r"corpus\.txt"):
        tokenize_corpus(unreadable(documents, 30), tokenizer, tmp_path / "a", **options)
    with pytest.raises(FileNotFoundError, match=r"dictionary\.txt"):
        tokenize_corpus([["北"]], tokenizer, tmp_path / "b", segmenter=forgetful, **options)
    with pytest.raises(BrokenPipeError):
        tokenize_corpus(documents, tokenizer, tmp_path / "c", progress=complain, **options)
    assert tokenize_corpus(documents, tokenizer, tmp_path / "a", **options).num_documents == 80


def test_waits_while_another_process_builds(documents, tokenizer, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    parts = []

    def build():
        tokenize_corpus(
            documents, tokenizer, tmp_path, fingerprint="f", progress=lambda *c: parts.append(c)
        )

    thread = threading.Thread(target=build)
    with (tmp_path / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        assert not parts
    thread.join()
    assert parts
