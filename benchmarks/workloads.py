"""Batches to measure on: sequence lengths as pre-training sees them, padded and packed alike."""

import torch
from torch import Tensor

from fastbert.packing import IGNORE_INDEX, PackedBatch

MAX_SEQLEN = 512

# Share of sequences in each eighth of 512 tokens. Half of a padded batch is padding, as in phase 2
# of the MLPerf BERT data (254 real tokens a sequence); the shape is ours: many short ones, and a
# spike at the end.
WIKIPEDIA = (0.12, 0.17, 0.14, 0.12, 0.10, 0.08, 0.07, 0.20)


def sequence_lengths(distribution: str, count: int) -> list[int]:
    """`count` lengths at equally spaced quantiles of "wikipedia", or all 512 for "full"."""
    if distribution == "full":
        return [MAX_SEQLEN] * count
    bounds = torch.tensor([0.0, *WIKIPEDIA]).cumsum(0)
    quantiles = (torch.arange(count) + 0.5) / count
    bins = torch.searchsorted(bounds, quantiles) - 1
    inside = (quantiles - bounds[bins]) / (bounds[bins + 1] - bounds[bins])
    return ((bins + inside) * (MAX_SEQLEN / len(WIKIPEDIA))).round().clamp(min=8).int().tolist()


def pretraining_batch(lengths: list[int], vocab_size: int) -> tuple[dict[str, Tensor], PackedBatch]:
    """The same masked batch twice: Hugging Face's padded arguments, and packed.

    The padded batch is as wide as MAX_SEQLEN, as in MLPerf; 15 % of the real tokens are masked.
    """
    size = (len(lengths), MAX_SEQLEN)
    real = torch.arange(MAX_SEQLEN) < torch.tensor(lengths)[:, None]
    ids = torch.randint(5, vocab_size, size) * real
    masked = real & (torch.rand(size) < 0.15)
    padded = {
        "input_ids": ids,
        "attention_mask": real.long(),
        "token_type_ids": (torch.arange(MAX_SEQLEN) > torch.tensor(lengths)[:, None] // 2) & real,
        "labels": ids.where(masked, IGNORE_INDEX),
        "next_sentence_label": torch.randint(0, 2, (len(lengths),)),
    }
    padded["token_type_ids"] = padded["token_type_ids"].long()
    packed = PackedBatch(
        input_ids=ids[real],
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        max_seqlen=max(lengths),
        position_ids=torch.arange(MAX_SEQLEN).expand(size)[real],
        token_type_ids=padded["token_type_ids"][real],
        labels=padded["labels"][real],
        num_labels=int(masked.sum()),
        next_sentence_label=padded["next_sentence_label"],
    )
    return padded, packed
