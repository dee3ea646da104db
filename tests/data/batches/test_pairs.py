import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.check import InputError
from fastbert.data import plan_pairs, plan_sentences
from fastbert.data.batches import pairs
from fastbert.data.batches.pairs import _truncate
from fastbert.data.streams import Purpose, stream


def documents_of(seed, count, sentences=(3, 40), words=(2, 30)):
    rng = random.Random(seed)
    return [[rng.randint(*words) for _ in range(rng.randint(*sentences))] for _ in range(count)]


def owner(corpus, token):
    """(document, sentence) of a token."""
    sentence = np.searchsorted(corpus.sentence_offsets, token, side="right") - 1
    return np.searchsorted(corpus.document_offsets, sentence, side="right") - 1, sentence


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    count=st.integers(2, 8),
    max_seq_len=st.integers(5, 80),
    short=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_invariants(numbered, seed, count, max_seq_len, short):
    corpus = numbered(documents_of(seed, count, sentences=(1, 12)))
    docs = np.arange(count)
    plan = plan_pairs(
        corpus, docs, seed=seed, epoch=0, max_seq_len=max_seq_len, short_seq_prob=short
    )
    assert plan.spans.dtype == np.int64
    assert plan.is_random.dtype == bool
    assert plan.spans.shape == (len(plan.is_random), 4)
    assert (plan.lengths <= max_seq_len).all()
    a_start, a_end, b_start, b_end = plan.spans.T
    assert ((a_start < a_end) & (b_start < b_end)).all()
    a_docs, b_docs = owner(corpus, a_start)[0], owner(corpus, b_start)[0]
    np.testing.assert_array_equal(a_docs, owner(corpus, a_end - 1)[0])
    np.testing.assert_array_equal(b_docs, owner(corpus, b_end - 1)[0])
    np.testing.assert_array_equal(a_docs != b_docs, plan.is_random)
    assert (np.diff(a_docs) >= 0).all()
    assert set(a_docs) == set(docs)  # every document gives an example
    full = (plan.lengths < max_seq_len) & ~plan.is_random  # certainly not truncated
    np.testing.assert_array_equal(a_end[full], b_start[full])
    assert (a_end <= b_start)[~plan.is_random].all()


def test_every_sentence_is_used(numbered):
    """Without truncation A, or B where it follows, covers each token of each document once."""
    corpus = numbered(documents_of(1, 30, words=(1, 5)))
    plan = plan_pairs(corpus, np.arange(30), seed=3, epoch=1, max_seq_len=400, short_seq_prob=1.0)
    assert (plan.lengths < 400).all()
    used = np.zeros(corpus.num_tokens, int)
    for (a_start, a_end, b_start, b_end), is_random in zip(plan.spans, plan.is_random, strict=True):
        used[a_start:a_end] += 1
        if not is_random:
            used[b_start:b_end] += 1
    assert (used == 1).all()  # the sentences left over by a random B come back


def test_an_epoch_is_the_same_in_every_version(numbered):
    """Else a run that goes on with another one would read other pairs than it has planned."""
    corpus = numbered([[3, 4, 5], [6], [2, 2, 2, 2], [7, 8]])
    plan = plan_pairs(corpus, np.array([0, 2, 3]), seed=3, epoch=1, max_seq_len=40)
    spans = [[0, 7, 7, 12], [18, 20, 20, 26], [26, 33, 0, 12], [33, 41, 22, 26]]
    assert plan.spans.tolist() == spans
    assert plan.is_random.tolist() == [False, False, True, True]


def test_all_that_is_drawn_depends_on_seed_and_epoch(numbered, monkeypatch):
    asked = []

    def spied(*place):
        asked.append(place)
        return stream(*place)

    monkeypatch.setattr(pairs, "stream", spied)
    plan_pairs(numbered([[3], [6]]), np.array([0, 1]), seed=3, epoch=5, max_seq_len=9)
    of_documents = [(3, Purpose.PAIRS, 5, document) for document in (0, 1)]
    assert asked == [*of_documents, (3, Purpose.TRUNCATION, 5)]


def test_spans_are_whole_sentences_unless_truncated(numbered):
    corpus = numbered(documents_of(2, 20, words=(1, 6)))
    plan = plan_pairs(corpus, np.arange(20), seed=3, epoch=0, max_seq_len=64)
    whole = plan.lengths < 64
    assert np.isin(plan.spans[whole], corpus.sentence_offsets).all()
    assert whole.sum() > 20


def test_half_of_the_next_sentences_are_random(numbered):
    """Sentences of one length: five of them fill the target, so that every draw counts."""
    corpus = numbered([[25] * 50 for _ in range(300)])
    plan = plan_pairs(corpus, np.arange(300), seed=5, epoch=0, max_seq_len=128, short_seq_prob=0.0)
    a_start, a_end, _, b_end = plan.spans.T
    last = corpus.sentence_offsets[corpus.document_offsets[owner(corpus, a_start)[0] + 1]]
    coins = plan.is_random[(a_start + 125 <= last)]
    assert abs(coins.mean() - 0.5) < 4 * 0.5 / np.sqrt(len(coins))
    # and A is one to four sentences, each as often
    shares = np.bincount(((a_end - a_start) // 25)[a_start + 125 <= last])
    assert len(shares) == 5
    assert (abs(shares[1:] / len(coins) - 0.25) < 4 * np.sqrt(0.25 * 0.75 / len(coins))).all()
    assert ((b_end - a_start)[(a_start + 125 <= last) & ~plan.is_random] == 125).all()


def test_random_partners_are_uniform_over_the_other_documents_and_their_sentences(numbered):
    """All but document 7 are one sentence, so that each of them gives one, random, pair."""
    corpus = numbered([[4] * 10 if d == 7 else [4] for d in range(20)])
    drawn, begun = np.zeros((20, 20)), np.zeros(10)
    epochs = 600
    for epoch in range(epochs):
        plan = plan_pairs(corpus, np.arange(20), seed=1, epoch=epoch, max_seq_len=20)
        a, b = (owner(corpus, plan.spans[plan.is_random, column])[0] for column in (0, 2))
        np.add.at(drawn, (a, b), 1)
        starts = owner(corpus, plan.spans[plan.is_random, 2])[1][b == 7] - 7
        np.add.at(begun, starts, 1)
    assert (np.diag(drawn) == 0).all()
    rows = np.delete(np.arange(20), 7)
    expected = epochs / 19
    others = drawn[rows].sum(axis=0)[rows]  # of 18 documents each
    assert (abs(others - 18 * expected) < 4.5 * np.sqrt(18 * expected)).all()
    assert (abs(begun - begun.mean()) < 4.5 * np.sqrt(begun.mean())).all()


def test_short_targets(numbered):
    corpus = numbered([[1] * 3000 for _ in range(40)])
    lengths = {
        p: plan_pairs(
            corpus, np.arange(40), seed=1, epoch=0, max_seq_len=103, short_seq_prob=p
        ).lengths
        for p in (0.0, 0.1, 1.0)
    }
    assert (lengths[0.0] == 103).mean() > 0.9  # all but the ends of documents
    n = len(lengths[0.1])
    ends = 2 * 40 * 3  # pairs that a document's end made shorter, at most
    assert abs((lengths[0.1] < 103).sum() - 0.1 * n) < 4 * np.sqrt(0.09 * n) + ends
    # uniform on 2 to 100, with three special tokens
    assert lengths[1.0].min() == 5
    assert abs(lengths[1.0].mean() - 54) < 2


def truncate_one_by_one(length_a, length_b, room, rng):
    """create_pretraining_data.py's truncate_seq_pair, on ranges."""
    a, b = list(range(length_a)), list(range(100, 100 + length_b))
    while len(a) + len(b) > room:
        longer = a if len(a) > len(b) else b
        if rng.random() < 0.5:
            del longer[0]
        else:
            longer.pop()
    return a[0], a[-1] + 1, b[0], b[-1] + 1


@given(st.integers(1, 40), st.integers(1, 40), st.integers(2, 60), st.integers(0, 9))
def test_truncation_keeps_what_one_by_one_keeps(length_a, length_b, room, seed):
    spans = np.array([[0, length_a, 100, 100 + length_b]])
    _truncate(spans, room, np.random.default_rng(seed))
    theirs = truncate_one_by_one(length_a, length_b, room, random.Random(seed))
    (a0, a1, b0, b1), (c0, c1, d0, d1) = spans[0], theirs
    assert (a1 - a0, b1 - b0) == (c1 - c0, d1 - d0)
    assert 0 <= a0 < a1 <= length_a
    assert 100 <= b0 < b1 <= 100 + length_b


def test_truncation_takes_from_front_and_back_alike():
    spans = np.tile([0, 60, 100, 160], (4000, 1))
    _truncate(spans, 100, np.random.default_rng(0))  # ten from each
    for front in (spans[:, 0], spans[:, 2] - 100):
        assert abs(front.mean() - 5) < 4 * np.sqrt(2.5 / 4000)
        assert abs(front.var() - 2.5) < 0.25  # binomial: token by token


def test_a_function_of_seed_and_epoch_alone(numbered):
    corpus = numbered(documents_of(4, 20))

    def plan(seed, epoch, docs=None):
        docs = np.arange(20) if docs is None else docs
        return plan_pairs(corpus, docs, seed=seed, epoch=epoch, max_seq_len=64).spans

    base = plan(1, 0)
    plan(2, 5)
    np.testing.assert_array_equal(base, plan(1, 0))
    for other in (plan(1, 1), plan(2, 0), plan(1 + 2**63, 0)):
        assert not np.array_equal(base, other)
    # a document's own sentences are cut alike whatever the other documents are
    first = base[base[:, 0] < corpus.sentence_offsets[corpus.document_offsets[1]]]
    alone = plan(1, 0, np.array([0, 13]))
    alone = alone[alone[:, 0] < corpus.sentence_offsets[corpus.document_offsets[1]]]
    assert len(first) == len(alone)


def test_random_partners_stay_in_the_split(numbered):
    corpus = numbered(documents_of(5, 30))
    docs = np.array([2, 3, 17, 29])
    plan = plan_pairs(corpus, docs, seed=0, epoch=0, max_seq_len=50)
    assert set(owner(corpus, plan.spans[:, 2])[0]) == set(docs)


def test_bad_options(numbered):
    corpus = numbered([[3], [4], [5]])
    docs = np.arange(3)
    with pytest.raises(InputError, match=r"1 document\(s\), but a random next sentence needs"):
        plan_pairs(corpus, docs[:1], seed=0, epoch=0, max_seq_len=20)
    with pytest.raises(InputError, match="--max-seq-len: expected at least 5, got 4"):
        plan_pairs(corpus, docs, seed=0, epoch=0, max_seq_len=4)
    with pytest.raises(InputError, match="--short-seq-prob: expected a number from 0 to 1, got 2"):
        plan_pairs(corpus, docs, seed=0, epoch=0, max_seq_len=20, short_seq_prob=2)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 6), max_seq_len=st.integers(3, 80))
def test_full_sentences_use_every_token_once(numbered, seed, count, max_seq_len):
    corpus = numbered(documents_of(seed, count, sentences=(1, 12)))
    plan = plan_sentences(corpus, np.arange(count), max_seq_len=max_seq_len)
    assert plan.is_random is None
    assert (plan.lengths <= max_seq_len).all()
    a_start, a_end, b_start, b_end = plan.spans.T
    assert (b_start == b_end).all()
    np.testing.assert_array_equal(plan.lengths, a_end - a_start + 2)
    np.testing.assert_array_equal(a_start[1:], a_end[:-1])
    assert (a_start[0], a_end[-1]) == (0, corpus.num_tokens)
    # none crosses documents, and each takes as many whole sentences as fit
    assert (owner(corpus, a_start)[0] == owner(corpus, a_end - 1)[0]).all()
    bounds = set(corpus.sentence_offsets.tolist())
    for start, end in zip(a_start.tolist(), a_end.tolist(), strict=True):
        document, sentence = owner(corpus, end - 1)
        if (
            end in bounds
            and start in bounds
            and sentence + 1 < corpus.document_offsets[document + 1]
        ):
            assert corpus.sentence_offsets[sentence + 2] - start > max_seq_len - 2
        if end not in bounds:
            assert end - start == max_seq_len - 2


def test_full_sentences_need_room(numbered):
    with pytest.raises(InputError, match="--max-seq-len: expected at least 3, got 2"):
        plan_sentences(numbered([[3]]), np.arange(1), max_seq_len=2)
