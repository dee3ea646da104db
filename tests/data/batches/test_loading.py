"""Batches from other processes, by any number of workers, ranks and micro-batches."""

import multiprocessing

import numpy as np
import pytest
import torch

from fastbert.data import (
    SCHEMES,
    GlobalCounts,
    heldout_batches,
    loader,
    make_masking,
    ngram_counts,
    special_tokens,
)
from tests.data.batches.case import BATCH_TOKENS, MAX_SEQ_LEN, sequences


@pytest.mark.parametrize(
    ("world_size", "micro_batches"), [(1, 2), (2, 1), (3, 1), (2, 2), (1, 4), (4, 2)]
)
def test_ranks_and_micro_batches_only_cut_the_batch_up(data, world_size, micro_batches):
    for step in range(12):
        [whole] = data.batch(step)
        shares = [
            data.batch(step, rank=rank, world_size=world_size, micro_batches=micro_batches)
            for rank in range(world_size)
        ]
        assert [len(share) for share in shares] == [micro_batches] * world_size
        parts = [batch for share in shares for batch in share]
        assert sequences(parts) == sequences([whole])
        tokens = [part.num_tokens for part in parts]
        assert max(tokens) - min(tokens) <= MAX_SEQ_LEN
        counts = data.targets(step)
        assert counts == GlobalCounts(whole.num_labels, whole.num_sequences, whole.num_tokens)
        assert counts.masked_tokens == sum(part.num_labels for part in parts)


def test_shares_are_nearly_equal(make):
    data = make(batch_tokens=4096)
    worst = []
    for step in range(data._plan(0).num_batches - 1):
        tokens = [data.batch(step, rank=r, world_size=4)[0].num_tokens for r in range(4)]
        worst.append(max(tokens) / np.mean(tokens))
    assert np.mean(worst) < 1.01


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_loader_gives_the_same_batches_for_any_number_of_workers(make, workers):
    data = make()
    first = data._plan(0).num_batches - 1
    start, stop = first - 5, first + 6  # across the end of an epoch
    reference = make()
    options = {"rank": 1, "world_size": 2, "micro_batches": 2}
    made = list(loader(data, start, stop, workers=workers, **options))
    assert len(made) == 11
    for step, batches in enumerate(made, start):
        expected = reference.batch(step, **options)
        for batch, other in zip(batches, expected, strict=True):
            assert torch.equal(batch.input_ids, other.input_ids)
            assert torch.equal(batch.labels, other.labels)
            assert torch.equal(batch.cu_seqlens, other.cu_seqlens)
            assert torch.equal(batch.next_sentence_label, other.next_sentence_label)


def test_the_loader_can_be_empty(data):
    assert list(loader(data, 5, 5)) == []


def _first_ids(data, queue):
    queue.put(data.batch(0)[0].input_ids.tolist())


def test_data_can_be_sent_to_a_spawned_process(data):
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_first_ids, args=(data, queue))
    process.start()
    assert queue.get() == data.batch(0)[0].input_ids.tolist()
    process.join()


def test_heldout_batches_hold_every_example_once(make, corpus):
    _, heldout = corpus.split(0.2, seed=0)
    data = make(heldout)
    batches = list(heldout_batches(data))
    assert sum(batch.num_sequences for batch in batches) == len(data._plan(0).lengths)
    assert sum(batch.num_tokens for batch in batches) == data._plan(0).lengths.sum()
    assert batches[-1].num_tokens < BATCH_TOKENS - MAX_SEQ_LEN  # the small one is there
    for _ in range(2):
        data.batch(data._plan(0).num_batches + 5)  # another epoch in between changes nothing
        assert sequences(list(heldout_batches(data))) == sequences(batches)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_workers_change_nothing(make, corpus, tokenizer, scheme):
    data = make(pairs=False)
    specials, counts = special_tokens(tokenizer), lambda: ngram_counts(corpus)
    data.masking = make_masking(scheme, specials, corpus.vocab_size, counts=counts)
    runs = [
        [batch for parts in loader(data, 3, 9, workers=workers) for batch in parts]
        for workers in (0, 1, 4)
    ]
    for others in runs[1:]:
        for one, other in zip(runs[0], others, strict=True):
            assert torch.equal(one.input_ids, other.input_ids)
            assert torch.equal(one.labels, other.labels)
