"""A padded batch whose packing and embeddings are a part of the graph of its layers.

B sequences of S places, T real tokens, H hidden; a graph has buffers of B' sequences of S' places.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbert.modules.graphs.sizes import Bucket, rounded
from fastbert.modules.layer import LayerParts, layers_of, run_layers
from fastbert.modules.sequences import Sequences, first_tokens
from fastbert.ops.unpad import Unpadding, unpad


class PaddedBatch(NamedTuple):
    """A batch in inference, as its caller passes it; a graph packs, embeds and pads it.

    input_ids, mask, token_type_ids, position_ids: (B, S), all but the first may be None; mask: bool
    or an integer, 0 at padding; num_tokens: T, or more; widest: the most places a sequence may
    have; embed: (input_ids, token_type_ids, position_ids, Unpadding) -> (T, H), which must not
    refer to the list of layers, or a graph would keep it; fixed: what a recording fixes of the
    embeddings; dtype: of the residual stream.
    """

    input_ids: Tensor
    mask: Tensor | None
    token_type_ids: Tensor | None
    position_ids: Tensor | None
    num_tokens: int
    widest: int
    embed: Callable[[Tensor, Tensor | None, Tensor | None, Unpadding], Tensor]
    fixed: Any
    dtype: torch.dtype

    @property
    def requires_grad(self) -> bool:
        return False

    @property
    def device(self) -> torch.device:
        return self.input_ids.device

    def bucket(self) -> Bucket:
        """The smallest bucket for the batch; `longest` is the number of places S'.

        At most 63 tokens or an eighth of them are filler: products have tiles of 64 rows or more,
        and sequences of every length up to 512, one by one, have eight graphs.
        """
        batch, seqlen = self.input_ids.shape
        places = min(rounded(seqlen, 64), self.widest)
        return Bucket(rounded(self.num_tokens, 64), 1 << (batch - 1).bit_length(), places)

    def fitted(self, bucket: Bucket) -> "PaddedBatch":
        """With a mask, if some of the bucket's places are none of the batch's."""
        if self.mask is not None or self.input_ids.shape == (bucket.sequences, bucket.longest):
            return self
        return self._replace(mask=torch.ones_like(self.input_ids, dtype=torch.bool))

    def key(self) -> tuple[Any, ...]:
        """What differs between graphs of one bucket."""
        return self.fixed, *[None if one is None else one.dtype for one in self[:4]]

    def buffers(self, bucket: Bucket) -> "PaddedBatch":
        """A batch of the bucket's size, to `fill`."""
        shape = bucket.sequences, bucket.longest
        made: Any = [None if one is None else one.new_zeros(shape) for one in self[:4]]
        ids = dict(zip(self._fields, made, strict=False))
        return self._replace(num_tokens=bucket.tokens, **ids)

    def fill(self, batch: "PaddedBatch") -> None:
        """Copies another batch into this one; the places around it are padding."""
        for buffer, values in zip(self[:4], batch[:4], strict=True):
            if buffer is None or values is None:
                continue
            if buffer.shape != values.shape:
                buffer.zero_()
                buffer = buffer[: values.shape[0], : values.shape[1]]
            buffer.copy_(values)

    def run(self, parts: Sequence[LayerParts], numbers: range) -> list[Tensor]:
        """The last layer's output (B, S, H), zeros at padding; and the first tokens' (B, H)."""
        ids, mask, types, positions = self[:4]
        batch, seqlen = ids.shape
        if mask is None:
            padding = Unpadding.dense(batch, seqlen, ids.device)
        else:
            padding = unpad(mask, self.num_tokens)
        x = self.embed(ids, types, positions, padding)
        sequences = Sequences(padding.cu_seqlens, seqlen)
        (x,) = run_layers(numbers, x, sequences, (), None, layers_of(parts))
        return [padding.pad(x), first_tokens(x, padding.cu_seqlens)]

    def own(self, outputs: list[Tensor]) -> list[Tensor]:
        """Copies of a graph's outputs for this batch."""
        states, first = outputs
        batch, seqlen = self.input_ids.shape
        kept = states[:batch, :seqlen].clone(memory_format=torch.contiguous_format)
        return [kept, first[:batch].clone()]
