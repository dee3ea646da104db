"""Batches to measure, with sequence lengths as in pre-training, padded and packed."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastbert.packing import IGNORE_INDEX, PackedBatch

MAX_SEQLEN = 512
VOCAB_SIZE = 30522

# The share of sequences whose length is in each eighth of 512 tokens. Half of a padded batch is
# padding, as in phase 2 of MLPerf's BERT data (254 real tokens per sequence). The shape is our
# assumption: many short sequences, and a peak at the longest.
WIKIPEDIA = (0.12, 0.17, 0.14, 0.12, 0.10, 0.08, 0.07, 0.20)


class Batch(NamedTuple):
    """The same masked sentence pairs in two forms: Hugging Face's padded arguments, and packed."""

    lengths: list[int]
    padded: dict[str, Tensor]
    packed: PackedBatch

    @property
    def fill(self) -> float:
        return sum(self.lengths) / self.padded["input_ids"].numel()

    def to(self, device: torch.device) -> "Batch":
        padded = {name: tensor.to(device) for name, tensor in self.padded.items()}
        return Batch(self.lengths, padded, self.packed.to(device))


def sequence_lengths(distribution: str, count: int) -> list[int]:
    """`count` lengths, in tokens, at equally spaced quantiles of a distribution.

    distribution: "wikipedia" and "uniform" have up to 512, longest first, as `fastbert pretrain`
    packs its batches; "serving" is uniform from a fifth of 512 on, so that 60 % of a padded batch
    is filled, shortest first; "full" has 512 for all; a number is the length of all. Raises
    KeyError for another name.
    """
    if distribution.isdigit():
        return [int(distribution)] * count
    if distribution == "full":
        return [MAX_SEQLEN] * count
    quantiles = (torch.arange(count) + 0.5) / count
    if distribution == "wikipedia":
        bounds = torch.tensor([0.0, *WIKIPEDIA]).cumsum(0)
        place = torch.searchsorted(bounds, quantiles) - 1
        inside = (quantiles - bounds[place]) / (bounds[place + 1] - bounds[place])
        shares = (place + inside) / len(WIKIPEDIA)
    else:
        lowest = {"uniform": 0.0, "serving": 0.2}[distribution]
        shares = lowest + (1 - lowest) * quantiles
    lengths: list[int] = (shares * MAX_SEQLEN).round().clamp(min=8).int().tolist()
    return lengths if distribution == "serving" else lengths[::-1]


def pretraining_batch(lengths: list[int], width: int = MAX_SEQLEN) -> Batch:
    """Random sentence pairs of these lengths, with labels for 15 % of the real tokens.

    width: columns of the padded batch, by default MAX_SEQLEN, as in MLPerf
    """
    size = (len(lengths), width)
    places = torch.arange(width)
    ends = torch.tensor(lengths)[:, None]
    real = places < ends
    ids = torch.randint(5, VOCAB_SIZE, size) * real
    masked = real & (torch.rand(size) < 0.15)
    padded = {
        "input_ids": ids,
        "attention_mask": real.long(),
        "token_type_ids": ((places > ends // 2) & real).long(),
        "labels": ids.where(masked, IGNORE_INDEX),
        "next_sentence_label": torch.randint(0, 2, (len(lengths),)),
    }
    packed = PackedBatch(
        input_ids=ids[real],
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        max_seqlen=max(lengths),
        position_ids=places.expand(size)[real],
        token_type_ids=padded["token_type_ids"][real],
        labels=padded["labels"][real],
        num_labels=int(masked.sum()),
        next_sentence_label=padded["next_sentence_label"],
    )
    return Batch(lengths, padded, packed)
