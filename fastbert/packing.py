"""Packed batches: the tokens of all sequences end to end, without padding."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbert.check import require

IGNORE_INDEX = -100  # the label of a position without a prediction target, as in PyTorch

# Dropout id reserved for filler sequences; no example has it.
SPARE_SEQUENCE = 2**31 - 1


class Bucket(NamedTuple):
    """Fixed sizes that `PackedBatch.padded_to` pads batches to, so that all shapes are equal."""

    num_tokens: int
    num_sequences: int
    num_labels: int
    max_seqlen: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """B sequences with T tokens in all, end to end.

    input_ids: (T,) int64, or None if inputs_embeds is given
    inputs_embeds: (T, H), word embeddings to use instead of looking up input_ids, or None
    cu_seqlens: (B + 1,) int32, where each sequence begins, and T at the end
    max_seqlen: length of the longest sequence, or an upper bound of it
    token_type_ids: (T,) int64, or None for all zeros
    position_ids: (T,) int64, usually each token's position in its own sequence
    labels: (T,) int64, the token to predict or -100; None without labels
    num_labels: how many labels are not -100, counted on the host so that no step waits for the
        device; if None, they are counted on the device, and the host waits once
    next_sentence_label: (B,) int64, 0 where the second segment follows the first, 1 where it is
        a random one, or None
    attention_mask: limits attention within each sequence; bool or additive, broadcasts to
        (B, heads, max_seqlen, max_seqlen), see `attention`; None if every token may attend to its
        whole sequence
    sequence_ids: (B,) int64, dropout ids: dropout depends on the example, not on the batch it is
        in; None numbers the sequences of this batch
    dropout_state: (2,) int64, seed and step of dropout; None draws them from torch's generator

    Raises ValueError unless exactly one of input_ids and inputs_embeds is given, for a cu_seqlens
    that is empty or of another dtype or rank, and for ids or labels of another shape.
    """

    input_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None
    cu_seqlens: Tensor
    max_seqlen: int
    position_ids: Tensor
    token_type_ids: Tensor | None = None
    labels: Tensor | None = None
    num_labels: int | None = None
    next_sentence_label: Tensor | None = None
    attention_mask: Tensor | None = None
    sequence_ids: Tensor | None = None
    dropout_state: Tensor | None = None

    def __post_init__(self) -> None:
        require(
            (self.input_ids is None) != (self.inputs_embeds is None),
            "PackedBatch",
            "exactly one of input_ids and inputs_embeds",
            "both" if self.input_ids is not None else "neither",
        )
        tokens = self._tokens.shape[:1]
        has_bounds = self.cu_seqlens.ndim == 1 and len(self.cu_seqlens) > 0
        require(
            has_bounds and self.cu_seqlens.dtype == torch.int32,
            "PackedBatch",
            "cu_seqlens of dtype int32 and shape (batch + 1,)",
            f"{self.cu_seqlens.dtype} {tuple(self.cu_seqlens.shape)}",
        )
        for name in ("input_ids", "position_ids", "token_type_ids", "labels"):
            tensor = getattr(self, name)
            if tensor is not None:
                require(
                    tensor.shape == tokens,
                    "PackedBatch",
                    f"{name} of shape (tokens,) = {tuple(tokens)}",
                    tuple(tensor.shape),
                )
        state = self.dropout_state
        if state is not None and (state.shape != (2,) or state.dtype != torch.int64):
            expected = "a dropout_state (2,) int64, a seed and a step"
            require(False, "PackedBatch", expected, f"{state.dtype} {tuple(state.shape)}")

    @classmethod
    def from_sequences(cls, sequences: Sequence[Sequence[int]]) -> "PackedBatch":
        """Packs lists of token ids; positions restart at 0 in each."""
        lengths = [len(ids) for ids in sequences]
        return cls(
            input_ids=torch.tensor([i for ids in sequences for i in ids], dtype=torch.int64),
            cu_seqlens=torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
            max_seqlen=max(lengths, default=0),
            position_ids=torch.tensor([p for n in lengths for p in range(n)], dtype=torch.int64),
        )

    @property
    def _tokens(self) -> Tensor:
        tokens = self.inputs_embeds if self.input_ids is None else self.input_ids
        assert tokens is not None  # checked when the batch was made
        return tokens

    @property
    def num_tokens(self) -> int:
        """T, filler tokens included."""
        return self._tokens.shape[0]

    @property
    def device(self) -> torch.device:
        return self._tokens.device

    @property
    def num_sequences(self) -> int:
        """B, filler sequences included."""
        return self.cu_seqlens.shape[0] - 1

    def misfit(self, bucket: Bucket) -> str | None:
        """Why the batch does not fit the bucket; None if it does."""
        spare = _num_spare(self, bucket)
        sizes = {
            "num_tokens": self.num_tokens,
            "num_sequences": self.num_sequences + spare,
            "num_labels": self.num_labels or 0,
            "max_seqlen": self.max_seqlen,
        }
        for name, size in sizes.items():
            if size > getattr(bucket, name):
                return f"a batch of {name} {size}, more than its bucket's {getattr(bucket, name)}"
        return None

    def padded_to(self, bucket: Bucket) -> "PackedBatch":
        """This pre-training batch with filler sequences, so that its sizes are the bucket's.

        Filler tokens form sequences of their own, without labels; further filler sequences are
        empty. Losses, gradients and dropout masks of the batch's own tokens do not change. Raises
        ValueError if the batch does not fit, lacks input_ids, labels or num_labels, or has an
        attention_mask.
        """
        misfit = self.misfit(bucket)
        require(misfit is None, "padded_to", "a batch that fits the bucket", misfit)
        for name, wanted in (("labels", True), ("num_labels", True), ("input_ids", True),
                             ("attention_mask", False)):  # fmt: skip
            has = getattr(self, name) is not None
            expected = f"a batch {'with' if wanted else 'without'} {name}"
            require(has == wanted, "padded_to", expected, "none" if wanted else "one with it")
        tokens = bucket.num_tokens - self.num_tokens
        spare = _num_spare(self, bucket)
        empty = bucket.num_sequences - self.num_sequences - spare
        begins = torch.arange(1, spare + 1, device=self.device) * bucket.max_seqlen
        ends = (self.num_tokens + begins).clamp(max=bucket.num_tokens)
        ends = torch.cat([ends, ends.new_full((empty,), bucket.num_tokens)])
        places = torch.arange(tokens, device=self.device) % bucket.max_seqlen
        numbers = self.sequence_ids
        if numbers is None:
            numbers = torch.arange(self.num_sequences, device=self.device)
        return dataclasses.replace(
            self,
            input_ids=_extended(self.input_ids, tokens, 0),
            cu_seqlens=torch.cat([self.cu_seqlens, ends.int()]),
            max_seqlen=bucket.max_seqlen,
            position_ids=torch.cat([self.position_ids, places]),
            token_type_ids=_extended(self.token_type_ids, tokens, 0),
            labels=_extended(self.labels, tokens, IGNORE_INDEX),
            num_labels=bucket.num_labels,
            next_sentence_label=_extended(self.next_sentence_label, spare + empty, IGNORE_INDEX),
            sequence_ids=_extended(numbers, spare + empty, SPARE_SEQUENCE),
        )

    def is_real(self) -> Tensor:
        """(T,) bool, False for the filler tokens, which `padded_to` appends."""
        places = torch.arange(self.num_tokens, device=self.device)
        if self.sequence_ids is None:
            return torch.ones_like(places, dtype=torch.bool)
        own = (self.sequence_ids != SPARE_SEQUENCE).sum(0, keepdim=True)
        return places < self.cu_seqlens.index_select(0, own)  # indexing would make the host wait

    def copy_(self, other: "PackedBatch") -> None:
        """Copies the tensors of a batch of the same sizes into this one; the host does not wait."""
        for field in dataclasses.fields(self):
            if isinstance(buffer := getattr(self, field.name), Tensor):
                buffer.copy_(getattr(other, field.name), non_blocking=True)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "PackedBatch":
        """A copy of the batch with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PackedBatch":
        """A copy of the batch in page-locked memory, for copies to a GPU without waiting."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "PackedBatch":
        changed: dict[str, Any] = {
            field.name: function(value)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **changed)


def _num_spare(batch: PackedBatch, bucket: Bucket) -> int:
    """How many filler sequences hold the filler tokens."""
    return -(-(bucket.num_tokens - batch.num_tokens) // bucket.max_seqlen)


def _extended(values: Tensor | None, count: int, value: int) -> Tensor | None:
    """The values, if the batch has any, and `count` times `value`."""
    return None if values is None else torch.cat([values, values.new_full((count,), value)])
