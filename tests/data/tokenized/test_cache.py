import json
import os
import pickle
import signal
import threading

import numpy as np
import pytest
from tokenizers import Tokenizer

from fastbert.check import InputError
from fastbert.data import OtherCache, TokenizedCorpus, tokenize_corpus, train_tokenizer
from fastbert.data.text.encoding import DocumentEncoder
from fastbert.data.tokenized import parts
from tests import processes

ARRAYS = ("tokens", "word_starts", "sentence_offsets", "document_offsets")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(parts, "PART_CHARACTERS", 5_000)


def assert_same(a: TokenizedCorpus, b: TokenizedCorpus):
    assert a.vocab_size == b.vocab_size
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
        assert getattr(a, name).dtype == getattr(b, name).dtype


def naive(documents, tokenizer):
    """The four arrays, one sentence at a time."""
    tokens, starts, sentences, offsets = [], [], [0], [0]
    for document in documents:
        for sentence in document:
            encoding = tokenizer.encode(sentence, add_special_tokens=False)
            tokens += encoding.ids
            ids = encoding.word_ids
            starts += [i == 0 or ids[i] != ids[i - 1] for i in range(len(ids))]
            if ids:
                sentences.append(len(tokens))
        if len(sentences) - 1 > offsets[-1]:
            offsets.append(len(sentences) - 1)
    return tokens, starts, sentences, offsets


def test_equals_one_sentence_at_a_time(documents, tokenizer, tmp_path):
    holes = [["", "\x00"], *documents[:20], [], ["ba", "", "ke ba", " "], ["\ufffd"]]
    calls = []
    corpus = tokenize_corpus(
        iter(holes), tokenizer, tmp_path, fingerprint="f", progress=lambda *c: calls.append(c)
    )
    for name, expected in zip(ARRAYS, naive(holes, tokenizer), strict=True):
        assert getattr(corpus, name).tolist() == expected, name
    assert corpus.tokens.dtype == np.uint16
    assert corpus.word_starts.dtype == bool
    assert corpus.sentence_offsets.dtype == corpus.document_offsets.dtype == np.int64
    assert corpus.num_documents == 21
    assert len(calls) > 3  # in several parts
    assert calls[0] == (0, 0, 0)
    assert calls[-1] == (len(holes), corpus.num_tokens, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["lock", "manifest.json", *(f"{name}.npy" for name in ARRAYS)]
    )


def test_word_starts(tmp_path):
    tokenizer = train_tokenizer(["un", "##believ", "able", "中文", "don't"] * 2, 60)
    documents = [["unbelievable 中文 don't", "ab"]]
    corpus = tokenize_corpus(documents, tokenizer, tmp_path, fingerprint="f")
    words, tokens = [], [tokenizer.id_to_token(int(i)) for i in corpus.tokens]
    for token, start in zip(tokens, corpus.word_starts, strict=True):
        if start:
            words.append("")
        words[-1] += token.removeprefix("##")
    assert words == ["unbelievable", "中", "文", "don", "'", "t", "ab"]
    assert len(tokens) > len(words)


def test_text_that_spells_a_special_token_is_text(tokenizer, tmp_path):
    corpus = tokenize_corpus([["ba [MASK] ke [SEP]"]], tokenizer, tmp_path, fingerprint="f")
    assert not np.isin(corpus.tokens, [tokenizer.token_to_id(t) for t in ("[MASK]", "[SEP]")]).any()
    # and the caller's tokenizer is as it was
    assert tokenizer.encode("[MASK]").tokens == ["[CLS]", "[MASK]", "[SEP]"]


def test_truncation_and_padding_of_the_tokenizer_do_not_matter(documents, tokenizer, tmp_path):
    cutting = Tokenizer.from_str(tokenizer.to_str())
    cutting.enable_truncation(5)
    cutting.enable_padding()
    a = tokenize_corpus(documents[:3], tokenizer, tmp_path / "a", fingerprint="f")
    b = tokenize_corpus(documents[:3], cutting, tmp_path / "b", fingerprint="f")
    assert_same(a, b)


def test_a_large_vocabulary_takes_wider_tokens(tokenizer, tmp_path):
    wide = Tokenizer.from_str(tokenizer.to_str())
    wide.add_tokens([f"w{i}" for i in range(2**16)])
    corpus = tokenize_corpus([["w65535 ba"]], wide, tmp_path, fingerprint="f")
    assert corpus.tokens.dtype == np.uint32
    assert corpus.tokens[0] == wide.token_to_id("w65535") >= 2**16


def test_a_complete_cache_is_used_as_it_is(documents, tokenizer, tmp_path):
    first = tokenize_corpus(documents, tokenizer, tmp_path, fingerprint="f")
    stamp = (tmp_path / "tokens.npy").stat().st_mtime_ns

    def untouchable():
        raise AssertionError("the corpus was read again")
        yield

    assert_same(tokenize_corpus(untouchable(), tokenizer, tmp_path, fingerprint="f"), first)
    assert (tmp_path / "tokens.npy").stat().st_mtime_ns == stamp


def test_lower_casing_makes_another_cache(documents, tmp_path):
    sentences = [s for document in documents for s in document]
    uncased, cased = (train_tokenizer(sentences, 60, lowercase=low) for low in (True, False))
    assert cased.get_vocab() == uncased.get_vocab()
    tokenize_corpus([["Ba ba"]], uncased, tmp_path, fingerprint="f")
    with pytest.raises(OtherCache, match="was made with another tokenizer; remove"):
        tokenize_corpus([["Ba ba"]], cased, tmp_path, fingerprint="f")


def words(sentence):
    return sentence.split()


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("others", "change"),
    [
        ("corpus", {"fingerprint": "two"}),
        ("tokenizer", {"tokenizer": train_tokenizer(["ba ke"] * 2, 30)}),
        ("segmenter", {"segmenter": words}),
        ("corpus and another segmenter", {"fingerprint": "two", "segmenter": words}),
    ],
    ids=["corpus", "tokenizer", "segmenter", "two"],
)
def test_a_cache_of_something_else_is_an_error(
    documents, tokenizer, tmp_path, others, change, finished
):
    one = {"tokenizer": tokenizer, "directory": tmp_path, "fingerprint": "one"}
    if finished:
        tokenize_corpus(documents, **one)
    else:
        with pytest.raises(KeyboardInterrupt):
            tokenize_corpus(interrupted(documents, 50), **one)
    before = files_in(tmp_path)
    with pytest.raises(OtherCache) as error:
        tokenize_corpus(documents, **{**one, **change})
    said = f"cache {tmp_path}: was made with another {others}; remove the directory or name another"
    assert str(error.value).startswith(said)
    assert files_in(tmp_path) == before
    assert tokenize_corpus(documents, **one).num_documents == 80


def files_in(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_directory_in_which_nothing_was_made_is_free(documents, tokenizer, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        tokenize_corpus(interrupted(documents, 1), tokenizer, tmp_path, fingerprint="one")
    assert tokenize_corpus(documents, tokenizer, tmp_path, fingerprint="two").num_documents == 80


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: (d / "manifest.json").write_text("{"),
        lambda d: (d / "manifest.json").write_text("[]"),
        lambda d: (d / "manifest.json").unlink(),
        lambda d: (d / "tokens.npy").unlink(),
        lambda d: os.truncate(d / "tokens.npy", 1000),
        lambda d: (d / "tokens.npy").open("ab").write(b"more"),
        lambda d: (d / "word_starts.npy").write_bytes(b""),
        lambda d: np.save(d / "sentence_offsets.npy", np.arange(3)),
        lambda d: (d / "document_offsets.npy").write_bytes(b"nonsense"),
    ],
    ids="broken list missing no-tokens short long empty other nonsense".split(),  # noqa: SIM905
)
def test_a_damaged_cache_is_rebuilt(documents, tokenizer, tmp_path, damage):
    whole = tokenize_corpus(documents, tokenizer, tmp_path / "a", fingerprint="f")
    tokenize_corpus(documents, tokenizer, tmp_path / "b", fingerprint="f")
    damage(tmp_path / "b")
    with pytest.raises(InputError, match="not complete; tokenize the corpus again"):
        TokenizedCorpus.open(tmp_path / "b")
    assert_same(tokenize_corpus(documents, tokenizer, tmp_path / "b", fingerprint="f"), whole)


def interrupted(documents, after):
    yield from documents[:after]
    raise KeyboardInterrupt


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


def test_pickling_passes_on_the_directory_only(corpus):
    data = pickle.dumps(corpus)
    assert len(data) < 1000
    assert_same(pickle.loads(data), corpus)


def test_bad_corpora_and_directories(tokenizer, tmp_path):
    with pytest.raises(InputError, match="corpus: holds no text"):
        tokenize_corpus([["", " "], []], tokenizer, tmp_path / "empty", fingerprint="f")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: cannot be written: "):
        tokenize_corpus([["ba"]], tokenizer, tmp_path / "file", fingerprint="f")
    with pytest.raises(InputError, match="nowhere: not complete"):
        TokenizedCorpus.open(tmp_path / "nowhere")


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


def test_the_manifest_tells_the_counts(documents, tokenizer, tmp_path):
    corpus = tokenize_corpus(documents, tokenizer, tmp_path, fingerprint="f")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["documents"] == corpus.num_documents == 80
    assert manifest["sentences"] == corpus.num_sentences == sum(map(len, documents))
    assert manifest["tokens"] == corpus.num_tokens
    assert manifest["vocab_size"] == corpus.vocab_size == tokenizer.get_vocab_size()
    assert manifest["corpus"] == "f"
    assert manifest["segmenter"] == ""
    assert len(manifest["tokenizer"]) == 64
    assert manifest["bytes"]["tokens"] == (tmp_path / "tokens.npy").stat().st_size
    assert TokenizedCorpus.open(tmp_path).identity == manifest["fingerprint"]


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
