import numpy as np
import pytest

from fastbert.check import InputError


def test_the_arrays_cannot_be_changed(corpus):
    with pytest.raises(ValueError, match="read-only"):
        corpus.tokens[0] = 1


def test_split(corpus):
    train, heldout = corpus.split(0.1, seed=1)
    assert len(heldout) == 8
    assert sorted([*train, *heldout]) == list(range(80))
    assert all((np.diff(docs) > 0).all() for docs in (train, heldout))
    again, _ = corpus.split(0.1, seed=1)
    np.testing.assert_array_equal(train, again)
    assert corpus.split(0.1, seed=2)[1].tolist() != heldout.tolist()
    assert [len(part) for part in corpus.split(0.0001, seed=1)] == [78, 2]
    assert [len(part) for part in corpus.split(0.9999, seed=1)] == [2, 78]


def test_split_refuses_what_it_cannot_split(numbered, corpus):
    with pytest.raises(InputError, match="next sentence is from another document; separate"):
        numbered([[3], [4], [5]]).split(0.1, seed=0)
    assert [len(part) for part in numbered([[3]] * 4).split(0.1, seed=0)] == [2, 2]
    with pytest.raises(InputError, match="--heldout-fraction: expected a number between 0 and 1"):
        corpus.split(1.0, seed=0)


@pytest.mark.parametrize("at_once", [7, 4096])
def test_token_counts(corpus, monkeypatch, at_once):
    monkeypatch.setattr("fastbert.data.tokenized.corpus._COUNTED", at_once)
    docs = np.array([3, 7, 79])
    expected = np.zeros(corpus.vocab_size, int)
    for doc in docs:
        first, last = corpus.sentence_offsets[corpus.document_offsets[doc : doc + 2]]
        for token in corpus.tokens[first:last]:
            expected[token] += 1
    counts = corpus.token_counts(docs)
    np.testing.assert_array_equal(counts, expected)
    assert counts.dtype == np.int64
