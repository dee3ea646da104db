"""Empirical frequencies beside the formulas of Xie et al. 2017, counts beside plain ones."""

import itertools
from collections import Counter

import numpy as np
import pytest

from fastbert.check import InputError
from fastbert.data import SpecialTokens, Tokens, make_masking, ngram_counts, tokenize_corpus
from fastbert.data.masking.noising import _cumulative_shares
from fastbert.data.tokenized import ngrams
from fastbert.data.tokenized.ngrams import NgramCounts

SPECIALS = SpecialTokens(pad=0, unk=1, cls=2, sep=3, mask=4)
VOCAB = 12
COUNTS = NgramCounts(
    tokens=np.array([0, 9, 0, 0, 0, 40, 20, 10, 8, 2, 1, 0]),
    followers=np.array([0, 3, 0, 0, 0, 10, 20, 1, 4, 2, 1, 0]),
    predecessors=np.array([0, 5, 0, 0, 0, 8, 2, 4, 1, 0, 3, 0]),
)


def replaced(scheme, gamma, size=200_000):
    """ids and what became of those that were chosen, of a long text of tokens 5 to 10."""
    rng = np.random.default_rng(0)
    ids = rng.integers(5, 11, size)
    where = (np.arange(size) // 100, np.arange(size) % 100)
    every = np.ones(size, bool)
    masking = make_masking(
        scheme, SPECIALS, VOCAB, probability=0.5, gamma=gamma, counts=lambda: COUNTS
    )
    masked, labels = masking(Tokens(ids, *where, every, every), seed=5, epoch=1)
    chosen = labels >= 0
    np.testing.assert_array_equal(masked[~chosen], ids[~chosen])
    return ids[chosen], masked[chosen]


def chi_squared(counts, shares):
    assert not counts[shares == 0].any()
    expected = shares[shares > 0] * counts.sum()
    return ((counts[shares > 0] - expected) ** 2 / expected).sum()


def assert_share(happened, share):
    sigma = np.sqrt(share * (1 - share) / len(happened))
    assert abs(happened.mean() - share) <= 4.5 * sigma


def test_blank():
    ids, masked = replaced("blank", 0.3)
    assert_share(masked == SPECIALS.mask, 0.3)
    assert ((masked == ids) | (masked == SPECIALS.mask)).all()


@pytest.mark.parametrize("gamma", [0.25, 1.0])
def test_unigram(gamma):
    ids, masked = replaced("unigram", gamma)
    weights = COUNTS.tokens.astype(float)
    weights[list(SPECIALS)] = 0
    shares = weights / weights.sum()
    for token in range(5, 11):
        outcome = masked[ids == token]
        expected = gamma * shares + (1 - gamma) * (np.arange(VOCAB) == token)
        # 5 degrees of freedom at most, once in ten thousand
        assert chi_squared(np.bincount(outcome, minlength=VOCAB), expected) < 25.8


@pytest.mark.parametrize("gamma", [0.5, 3.0])
def test_bigram_kneser_ney(gamma):
    ids, masked = replaced("bigram-kn", gamma)
    weights = COUNTS.predecessors.astype(float)
    weights[list(SPECIALS)] = 0
    shares = weights / weights.sum()
    for token in range(5, 11):
        probability = min(1, gamma * COUNTS.followers[token] / COUNTS.tokens[token])
        expected = probability * shares + (1 - probability) * (np.arange(VOCAB) == token)
        outcome = np.bincount(masked[ids == token], minlength=VOCAB)
        assert chi_squared(outcome, expected) < 25.8


def test_special_tokens_are_never_drawn():
    for scheme in ("unigram", "bigram-kn"):
        _, masked = replaced(scheme, 1.0)
        assert masked.min() >= 5
        assert masked.max() <= 10


def test_nothing_to_draw_from_is_an_error():
    nothing = COUNTS._replace(tokens=np.array([0, 9] + [0] * 10))
    with pytest.raises(InputError, match="too small to draw replacements"):
        make_masking("unigram", SPECIALS, VOCAB, counts=lambda: nothing)


def plain_counts(corpus):
    tokens, pairs = Counter(), set()
    for first, last in zip(corpus.document_offsets[:-1], corpus.document_offsets[1:], strict=True):
        ids = corpus.tokens[corpus.sentence_offsets[first] : corpus.sentence_offsets[last]].tolist()
        tokens.update(ids)
        pairs.update(itertools.pairwise(ids))
    followers, predecessors = (Counter(pair[side] for pair in pairs) for side in (0, 1))
    return [[c[v] for v in range(corpus.vocab_size)] for c in (tokens, followers, predecessors)]


@pytest.mark.parametrize("chunk", [1, 7, 1 << 22])
def test_counts_are_plain_counts(tokenizer, documents, tmp_path, monkeypatch, chunk):
    corpus = tokenize_corpus(documents[:5], tokenizer, tmp_path, fingerprint="five")
    monkeypatch.setattr(ngrams, "_CHUNK", chunk)
    counts = ngrams._count(corpus)
    for found, expected in zip(counts, plain_counts(corpus), strict=True):
        assert found.tolist() == expected


def test_counts_are_kept_until_the_corpus_changes(corpus, monkeypatch):
    counted = []
    count = ngrams._count
    monkeypatch.setattr(ngrams, "_count", lambda c: counted.append(c) or count(c))
    (corpus.directory / ngrams.FILE).unlink(missing_ok=True)
    first = ngram_counts(corpus)
    again = ngram_counts(corpus)
    assert len(counted) == 1
    np.testing.assert_array_equal(first.followers, again.followers)
    path = corpus.directory / ngrams.FILE
    path.write_bytes(path.read_bytes()[:100])  # damaged
    ngram_counts(corpus)
    assert len(counted) == 2
    np.savez(path, identity="another", **count(corpus)._asdict())
    ngram_counts(corpus)
    assert len(counted) == 3


def test_a_vocabulary_too_large_to_count_is_refused(numbered):
    corpus = numbered([[40000], [40000]])
    with pytest.raises(InputError, match="at most 65,536 tokens, got 80,0"):
        ngram_counts(corpus)


def test_shares_end_at_one_in_spite_of_rounding():
    draw = np.random.default_rng(0)
    for _ in range(50):
        weights = np.append(draw.integers(1, 1000, 40), [0, 0])
        assert (_cumulative_shares(weights, SPECIALS)[39:] == 1).all()
