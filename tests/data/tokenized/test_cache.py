"""A corpus is tokenised once, into a cache that tells what it was made of."""

import json
import os
import pickle

import numpy as np
import pytest
from tokenizers import Tokenizer

from fastbert.check import InputError
from fastbert.data import OtherCache, TokenizedCorpus, tokenize_corpus, train_tokenizer
from tests.data.tokenized.case import ARRAYS, assert_same, interrupted


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
    with pytest.raises(InputError, match="incomplete; tokenize the corpus again"):
        TokenizedCorpus.open(tmp_path / "b")
    assert_same(tokenize_corpus(documents, tokenizer, tmp_path / "b", fingerprint="f"), whole)


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
    with pytest.raises(InputError, match="nowhere: incomplete"):
        TokenizedCorpus.open(tmp_path / "nowhere")


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
