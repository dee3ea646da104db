"""A batch with no padding: the tokens of all sequences in one row, and where each begins."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from fastbert.check import require

IGNORE_INDEX = -100  # the label of a position where there is nothing to predict, as in PyTorch


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """B sequences of T tokens in all, laid end to end.

    input_ids: (T,) int64, or None where inputs_embeds is given
    inputs_embeds: (T, H), word embeddings to use instead of looking up input_ids, or None
    cu_seqlens: (B + 1,) int32, where each sequence begins, and T at the end
    max_seqlen: length of the longest sequence, or an upper bound of it
    token_type_ids: (T,) int64, or None for all zeros
    position_ids: (T,) int64, position in the token's own sequence unless the caller says otherwise
    labels: (T,) int64, the token to predict or -100, or None
    num_labels: how many labels are not -100, counted on the host so that no step waits for the
        device; None counts them on the device, which makes the host wait once
    next_sentence_label: (B,) int64, 0 where the second segment follows the first, 1 where it is
        a random one, or None
    attention_mask: which of its sequence's tokens each may attend to, bool or additive, broadcasts
        to (B, heads, max_seqlen, max_seqlen); None for all, as padding needs none here
    sequence_ids: (B,) int64, numbers from which dropout draws each sequence's masks, whatever batch
        it is in; None numbers the sequences of this batch
    dropout_state: (2,) int64, seed and step of dropout; None draws them from torch's generator
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
        require(
            self.cu_seqlens.ndim == 1 and self.cu_seqlens.dtype == torch.int32,
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
        return self._tokens.shape[0]

    @property
    def device(self) -> torch.device:
        return self._tokens.device

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "PackedBatch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PackedBatch":
        return self._map(Tensor.pin_memory)

    def _map(self, function) -> "PackedBatch":
        changed = {
            field.name: function(value)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **changed)
