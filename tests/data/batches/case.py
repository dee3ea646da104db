"""Sizes of batches, and their sequences."""

import itertools
from collections import Counter

from fastbert.packing import PackedBatch

BATCH_TOKENS, MAX_SEQ_LEN, SEED = 512, 64, 11


def sequences(batches: list[PackedBatch]) -> Counter:
    """Each sequence with all that belongs to it, as a bag."""
    bag: Counter = Counter()
    for batch in batches:
        bounds = batch.cu_seqlens.tolist()
        columns = (batch.input_ids, batch.token_type_ids, batch.position_ids, batch.labels)
        for number, (first, last) in enumerate(itertools.pairwise(bounds)):
            row = tuple(tuple(column[first:last].tolist()) for column in columns)
            bag[row, int(batch.next_sentence_label[number])] += 1
    return bag
