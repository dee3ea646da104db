"""Batches of pre-training: packed pairs or segments, masked, epoch by epoch."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from fastbert.check import InputError
from fastbert.data import (
    Masking,
    PretrainingData,
    make_masking,
    plan_pairs,
    special_tokens,
    unigram_baseline,
)
from tests.data.batches.case import BATCH_TOKENS, MAX_SEQ_LEN, SEED, sequences


def unmasked(row):
    ids, _, _, labels = row
    return [i if label == -100 else label for i, label in zip(ids, labels, strict=True)]


def test_a_batch_is_what_a_packed_batch_says(data):
    [batch] = data.batch(3)
    lengths = batch.cu_seqlens.diff()
    total = int(lengths.sum())
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.cu_seqlens[0] == 0
    for name in ("input_ids", "token_type_ids", "position_ids", "labels"):
        assert getattr(batch, name).dtype == torch.int64
        assert getattr(batch, name).shape == (total,)
    assert BATCH_TOKENS - MAX_SEQ_LEN < total <= BATCH_TOKENS
    assert batch.max_seqlen == lengths.max() <= MAX_SEQ_LEN
    assert type(batch.max_seqlen) is type(batch.num_labels) is int
    assert batch.num_labels == (batch.labels != -100).sum()
    expected = torch.cat([torch.arange(n) for n in lengths])
    assert torch.equal(batch.position_ids, expected)
    assert batch.next_sentence_label.shape == lengths.shape
    assert batch.next_sentence_label.dtype == torch.int64


def epoch_rows(data, epoch_batches=None):
    steps = range(epoch_batches or data._plan(0).num_batches - 1)
    return sequences([batch for step in steps for batch in data.batch(step)])


def test_sequences_are_the_planned_pairs(data, corpus):
    """Built here one at a time from the plan: [CLS] A [SEP] B [SEP], types 0 and 1."""
    plan = plan_pairs(
        corpus, np.arange(80), seed=SEED, epoch=0, max_seq_len=MAX_SEQ_LEN, short_seq_prob=0.1
    )
    planned: Counter = Counter()
    for (a0, a1, b0, b1), is_random in zip(plan.spans, plan.is_random, strict=True):
        a, b = corpus.tokens[a0:a1].tolist(), corpus.tokens[b0:b1].tolist()
        ids = (2, *a, 3, *b, 3)
        types = (0,) * (len(a) + 2) + (1,) * (len(b) + 1)
        planned[ids, types, tuple(range(len(ids))), int(is_random)] += 1
    made: Counter = Counter()
    for (row, label), count in epoch_rows(data).items():
        made[tuple(unmasked(row)), row[1], row[2], label] += count
    assert not made - planned
    left = planned - made  # the dropped last batch, and no more
    assert 0 < sum(len(ids) * n for (ids, *_), n in left.items()) <= BATCH_TOKENS


def test_an_epoch_fills_every_batch_greedily(data):
    epoch = data._plan(0)
    lengths = epoch.lengths[epoch.order]
    bounds, used = [0], 0
    for number, length in enumerate(lengths.tolist()):
        if used + length > BATCH_TOKENS:
            bounds.append(number)
            used = 0
        used += length
    assert epoch.bounds == [*bounds, len(lengths)]


def test_masks(data):
    """15 % of the tokens of each sequence, never a special one; labels hold the true token."""
    for row, _ in epoch_rows(data):
        ids, _, _, labels = row
        true = unmasked(row)
        text = [t for t in true if t > 4]
        chosen = [label for label in labels if label != -100]
        assert len(chosen) == max(1, round(0.15 * len(text)))
        assert min(chosen) > 4
        assert [i for i in ids if i in (0, 2, 3)] == [2, 3, 3]


def test_unknown_words_are_not_predicted(tokenizer, tmp_path):
    from fastbert.data import tokenize_corpus

    documents = [["ba ? ke ? " * 4] * 8] * 6
    corpus = tokenize_corpus(documents, tokenizer, tmp_path, fingerprint="f")
    assert (corpus.tokens == 1).mean() > 0.3
    specials = special_tokens(tokenizer)
    masking = make_masking("bert", specials, corpus.vocab_size)
    data = PretrainingData(
        corpus, np.arange(6), specials, masking, seed=0, batch_tokens=256, max_seq_len=64
    )
    [batch] = data.batch(0)
    assert not (batch.labels == 1).any()
    assert data.targets(0) == (batch.num_labels, batch.num_sequences, batch.num_tokens)


def test_steps_walk_through_the_epochs(make):
    data = make()
    sizes = [data._plan(epoch).num_batches - 1 for epoch in range(4)]
    expected = [(epoch, index) for epoch in range(4) for index in range(sizes[epoch])]
    assert [data.locate(step) for step in range(sum(sizes))] == expected
    far = sum(sizes[:3]) + 1
    fresh = make()  # resuming: straight to a far step, then back
    assert fresh.locate(far) == (3, 1)
    assert sequences(fresh.batch(far)) == sequences(data.batch(far))
    assert sequences(fresh.batch(2)) == sequences(data.batch(2))


def test_epochs_differ(data):
    first = data._plan(0).num_batches - 1
    one, two = (
        {tuple(unmasked(row)) for row, _ in sequences(data.batch(step))} for step in (0, first)
    )
    assert data.locate(first) == (1, 0)
    assert one != two


def test_an_epoch_has_its_own_order_and_masks(numbered, tokenizer):
    """Overlong sentences make each an example of full length, so that nothing else changes."""
    corpus = numbered([[100] * 5 for _ in range(10)])
    specials = special_tokens(tokenizer)
    masking = make_masking("bert", specials, corpus.vocab_size)
    data = PretrainingData(
        corpus, np.arange(10), specials, masking, seed=0, batch_tokens=640, max_seq_len=64
    )
    epochs = [data._make_plan(number) for number in (0, 1)]
    assert [len(epoch.lengths) for epoch in epochs] == [50, 50]
    assert not np.array_equal(epochs[0].order, epochs[1].order)
    full = np.flatnonzero((epochs[0].lengths == 64) & (epochs[1].lengths == 64))
    assert len(full) > 20
    masks = [data._pack(epoch, full).labels.view(-1, 64) != -100 for epoch in epochs]
    assert (masks[0] != masks[1]).any(dim=1).all()


def test_a_corpus_smaller_than_a_batch_is_one_batch(make):
    data = make(np.array([0, 1]), batch_tokens=100_000)
    assert [data.locate(step) for step in range(3)] == [(0, 0), (1, 0), (2, 0)]
    [batch] = data.batch(1)
    assert batch.num_sequences == len(data._plan(1).lengths)


def test_unigram_baseline():
    counts = np.array([0, 3, 1])
    total = 4 + 1.5
    targets = np.array([1, 1, 2, 0])
    expected = -np.mean(np.log(np.array([3.5, 3.5, 1.5, 0.5]) / total))
    assert unigram_baseline(counts, targets) == pytest.approx(expected)
    assert unigram_baseline(counts, torch.from_numpy(targets)) == pytest.approx(expected)


def test_bad_options(make, data, corpus, tokenizer):
    with pytest.raises(
        InputError, match="--batch-tokens: expected at least --max-seq-len = 64, got 63"
    ):
        make(batch_tokens=63)
    with pytest.raises(InputError, match=r"1 document\(s\), but a random next sentence needs"):
        make(np.array([0]))
    with pytest.raises(InputError, match=r"too few for 8 rank\(s\) x 4 micro-batch\(es\); raise"):
        data.batch(0, world_size=8, micro_batches=4)


def test_every_batch_must_have_an_example_for_each_part(make):
    """A run would otherwise stop at the first batch that lacks one, and could not go on."""
    for data in (make(pairs=False, seed=seed) for seed in itertools.count()):
        first, *others = np.diff(data._plan(0).bounds)[:-1]
        if first > min(others):
            break
    data.require_examples(1, min(others))
    data.batch(0, micro_batches=first)
    with pytest.raises(InputError, match=f"has {min(others)} example"):
        data.require_examples(1, first)
    make(np.array([0, 1]), batch_tokens=100_000).require_examples(1, 2)  # one batch, not full


@pytest.mark.parametrize("scheme", ["whole-word", "span"])
def test_targets_are_known_whatever_is_masked(make, corpus, tokenizer, scheme):
    masking = make_masking(scheme, special_tokens(tokenizer), corpus.vocab_size)
    data = make()
    data.masking = masking
    for step in range(3):
        parts = [part for rank in (0, 1) for part in data.batch(step, rank, 2, 2)]
        names = ("num_labels", "num_sequences", "num_tokens")
        counts = (sum(getattr(part, name) for part in parts) for name in names)
        assert data.targets(step) == tuple(counts)


def test_the_masked_tokens_of_a_step_are_counted_in_its_epoch(make, monkeypatch):
    """As they are masked; for whole words their number depends on it."""
    data, asked = make(), []

    def spied(masking, tokens, *, seed, epoch):
        asked.append((seed, epoch))
        return 0

    monkeypatch.setattr(Masking, "num_targets", spied)
    second = data._plan(0).num_batches - 1
    for step in (second - 1, second):
        data.targets(step)
    assert asked == [(SEED, 0), (SEED, 1)]


def test_without_pairs_examples_are_single_segments(make):
    data = make(pairs=False)
    [batch] = data.batch(0)
    assert batch.next_sentence_label is None
    assert not batch.token_type_ids.any()
    assert data.targets(0) == (batch.num_labels, 0, batch.num_tokens)
    ids = torch.where(batch.labels >= 0, batch.labels, batch.input_ids)
    for first, last in itertools.pairwise(batch.cu_seqlens.tolist()):
        row = ids[first:last].tolist()
        assert (row[0], row[-1]) == (2, 3)
        assert not {0, 2, 3} & set(row[1:-1])
