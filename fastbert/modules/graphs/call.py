"""What a graph computes for a call of an encoder's layers: its inputs, sizes and precision.

T packed tokens of B sequences, M wanted rows, hidden size H; a bucket has T', B' and M' of them.
"""

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastbert.modules.embeddings import Tables
from fastbert.modules.layer import LayerParts, layers_of, run_layers
from fastbert.modules.products import PRODUCTS
from fastbert.modules.sequences import Rows, Sequences, first_tokens, pays_to_count
from fastbert.ops.unpad import Unpadding, unpad


class Bucket(NamedTuple):
    """The sizes that a call is padded to, so that calls of similar sizes share a graph.

    tokens, sequences: T' and B'; longest: an upper bound of a sequence's tokens; rows: M';
    longest_rows: an upper bound of a sequence's wanted rows; both 0 if all tokens are wanted.
    """

    tokens: int
    sequences: int
    longest: int
    rows: int = 0
    longest_rows: int = 0

    @classmethod
    def of(cls, x: Tensor, sequences: Sequences, rows: Rows | None) -> "Bucket":
        """The smallest bucket of the call; its filler is at most 15 tokens, or T / 8 if larger."""
        tokens, count, longest = x.shape[0], sequences.cu_seqlens.shape[0] - 1, sequences.max_seqlen
        wanted = (0, 0)
        if rows is not None:
            wanted = rounded(rows.index.shape[0], 16), rounded(rows.max_seqlen, 64)
        return cls(
            rounded(tokens, 16), 1 << (count - 1).bit_length(), rounded(longest, 64), *wanted
        )


def rounded(size: int, least: int) -> int:
    """`size`, rounded up to a multiple of `least` or of the largest power of two <= size / 8."""
    step = max(least, 1 << max(size.bit_length() - 4, 0))
    return -(-size // step) * step


class PaddedBatch(NamedTuple):
    """An inference batch as its caller passes it; the graph itself packs, embeds and pads it.

    A batch has B sequences of S places, a graph's buffers have B' sequences of S' places.

    input_ids, mask, token_type_ids, position_ids: (B, S), all but the first may be None; mask: bool
    or integer, 0 at padding; num_tokens: T or an upper bound; widest: the most places that a
    sequence may have; embed: (input_ids, token_type_ids, position_ids, Unpadding) -> (T, H), which
    must not refer to the list of layers, or a graph would keep it alive; fixed: the state of the
    embeddings that a recording depends on; dtype: the residual stream's.
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

    @classmethod
    def of(
        cls,
        tables: Tables,
        given: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
        embed: Callable[[Tensor, Tensor | None, Tensor | None, Unpadding], Tensor],
        *,
        others: Iterable[Tensor | None] = (),
        first: int = 0,
        widest: int | None,
        hidden_size: int,
        dtype: torch.dtype,
    ) -> "PaddedBatch | None":
        """The batch of a call; None if its graph must begin after the embeddings.

        tables: the embeddings' modules, without dropout; given: the first four fields, of any
        shape; others: further tensors that the embeddings read; first: the first position; widest:
        None if unknown. If counting the tokens pays, the host waits for the GPU to count them.
        """
        ids, mask, _, positions = given
        tensors = [one for one in given if one is not None]
        if (
            not tables.are_one_operator()
            or not (ids.ndim == 2 and widest and ids.shape[1] <= widest)
            or (mask is None and positions is not None)  # positions may separate documents
            or any(x.shape != ids.shape or x.device != ids.device for x in tensors)
            or any(x.is_floating_point() for x in tensors)
        ):
            return None
        norm = tables.norm
        read = *(getattr(one, "weight", None) for one in tables[:4]), norm.bias, *others
        known = [
            None if one is None else (one.data_ptr(), one.dtype, one.shape, one.stride())
            for one in read
        ]
        num_tokens = ids.numel()  # an upper bound suffices where counting would not pay
        if mask is not None and pays_to_count(num_tokens, hidden_size):
            num_tokens = int(torch.count_nonzero(mask))
        fixed = *known, first, norm.eps
        return cls(*given, num_tokens, widest, embed, fixed, dtype) if num_tokens else None

    @property
    def requires_grad(self) -> bool:
        return False

    @property
    def device(self) -> torch.device:
        return self.input_ids.device

    def bucket(self) -> Bucket:
        """The smallest bucket for the batch; `longest` is the number of places S'.

        Filler is at most 63 tokens, or T / 8 if larger: products have tiles of 64 rows or more, and
        eight graphs suffice for single sequences of every length up to 512.
        """
        batch, seqlen = self.input_ids.shape
        places = min(rounded(seqlen, 64), self.widest)
        return Bucket(rounded(self.num_tokens, 64), 1 << (batch - 1).bit_length(), places)

    def fitted(self, bucket: Bucket) -> "PaddedBatch":
        """The batch; if it has no mask and fewer places than the bucket, with a mask of ones."""
        if self.mask is not None or self.input_ids.shape == (bucket.sequences, bucket.longest):
            return self
        return self._replace(mask=torch.ones_like(self.input_ids, dtype=torch.bool))

    def key(self) -> tuple[Any, ...]:
        """What distinguishes the graphs of one bucket."""
        return self.fixed, *[None if one is None else one.dtype for one in self[:4]]

    def buffers(self, bucket: Bucket) -> "PaddedBatch":
        """A batch of zeros of the bucket's size, for `fill`."""
        shape = bucket.sequences, bucket.longest
        made: Any = [None if one is None else one.new_zeros(shape) for one in self[:4]]
        ids = dict(zip(self._fields, made, strict=False))
        return self._replace(num_tokens=bucket.tokens, **ids)

    def fill(self, batch: "PaddedBatch") -> None:
        """Copies another batch into this one; places beyond it become padding."""
        for buffer, values in zip(self[:4], batch[:4], strict=True):
            if buffer is None or values is None:
                continue
            if buffer.shape != values.shape:
                buffer.zero_()
                buffer = buffer[: values.shape[0], : values.shape[1]]
            buffer.copy_(values)

    def run(self, parts: Sequence[LayerParts]) -> list[Tensor]:
        """The last layer's output (B, S, H), zeros at padding, and its first tokens (B, H)."""
        ids, mask, types, positions = self[:4]
        batch, seqlen = ids.shape
        if mask is None:
            padding = Unpadding.dense(batch, seqlen, ids.device)
        else:
            padding = unpad(mask, self.num_tokens)
        x = self.embed(ids, types, positions, padding)
        sequences = Sequences(padding.cu_seqlens, seqlen)
        (x,) = run_layers(range(len(parts)), x, sequences, (), None, layers_of(parts))
        return [padding.pad(x), first_tokens(x, padding.cu_seqlens, padding.seqlen)]

    def copied(self, outputs: list[Tensor]) -> list[Tensor]:
        """Copies of a graph's outputs, cut to this batch's size."""
        states, first = outputs
        batch, seqlen = self.input_ids.shape
        kept = states[:batch, :seqlen].clone(memory_format=torch.contiguous_format)
        return [kept, first[:batch].clone()]


class Precision(NamedTuple):
    """The autocast state of a call; the call's gradient is computed without autocast."""

    device: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor | PaddedBatch) -> "Precision":
        device = x.device.type
        enabled = torch.is_autocast_enabled(device)
        return cls(device, enabled, torch.get_autocast_dtype(device))

    def restored(self) -> Any:
        """A context with the autocast state of the call."""
        # a recording must neither read autocast's cached copies of weights nor add to them
        return torch.autocast(self.device, self.dtype, self.enabled, cache_enabled=False)


def products_of(layers: nn.ModuleList) -> weakref.ref[Any] | None:
    """A weak reference to the layers' `Products`, which refer to the layers; None without any."""
    products = vars(layers).get(PRODUCTS)
    return None if products is None else weakref.ref(products)


class LayersCall(NamedTuple):
    """The arguments of the layers, except x, which is (T, H) or a padded batch.

    sequences: None for a padded batch, whose graph computes them; numbers, states, rows: as in
    `run_layers`; training: the layers' mode; products: from `products_of`, those that a recording
    uses; trained: the distinct parameters that require a gradient, None if neither a parameter nor
    x requires one
    """

    parts: Sequence[LayerParts]
    numbers: range
    sequences: Sequences | None
    states: tuple[int, ...]
    rows: Rows | None
    precision: Precision
    training: bool
    products: weakref.ref[Any] | None = None
    trained: list[Tensor] | None = None

    def copied(self, x: Tensor | PaddedBatch, outputs: list[Tensor]) -> list[Tensor]:
        """Copies of a graph's outputs without filler; x: the input of the call."""
        if isinstance(x, PaddedBatch):
            return x.copied(outputs)
        count = (x if self.rows is None else self.rows.index).shape[0]
        return copies_of([output[:count] for output in outputs])

    def begin(self, x: Any) -> None:
        """Tells the `Products` that a forward begins."""
        products = self.present_products()
        if products is not None:
            products.begin(x, self.training)

    def run(self, x: Tensor | PaddedBatch) -> list[Tensor]:
        """The outputs of `run_layers` or `PaddedBatch.run`, under the call's autocast state."""
        with self.precision.restored():
            if isinstance(x, PaddedBatch):
                return x.run(self.parts)
            assert self.sequences is not None
            run = layers_of(self.parts)
            return run_layers(self.numbers, x, self.sequences, self.states, self.rows, run)

    def present_products(self) -> Any:
        """The `Products`, None without any."""
        return None if self.products is None else self.products()

    def undone(self) -> contextlib.AbstractContextManager[None]:
        """A context that restores the `Products` at its end, for what is no user's forward."""
        products = self.present_products()
        return contextlib.nullcontext() if products is None else products.undone()

    def segments(self, count: int) -> list["Segment"]:
        """The layers in `count` segments of about equal size, or in as many as there are layers.

        A segment also ends after each layer whose state is wanted. Each segment is a node of
        autograd, so the gradients of later layers reach the state.
        """
        places = {parameter: place for place, parameter in enumerate(self.trained or ())}
        count = max(min(count, len(self.numbers)), 1)
        ends = {len(self.numbers) * number // count for number in range(count + 1)}
        ends |= {number + 1 for number in self.states}
        found = []
        for start, stop in itertools.pairwise(sorted(ends)):
            leaves = [leaf for part in self.parts[start:stop] for leaf in part.leaves]
            every = {p: None for leaf in leaves for p in leaf.parameters.values()}
            own = [places[parameter] for parameter in every if parameter in places]
            found.append(Segment(range(start, stop), own))
        return found


class Segment(NamedTuple):
    """Successive layers of a call; trained: where their parameters are in `LayersCall.trained`."""

    numbers: range
    trained: list[int]

    def of(self, call: LayersCall) -> LayersCall:
        """The call, restricted to these layers."""
        assert call.trained is not None
        return call._replace(
            numbers=self.numbers,
            states=(),
            rows=call.rows if self.numbers.stop == call.numbers.stop else None,
            trained=[call.trained[place] for place in self.trained],
        )


def copies_of(tensors: list[Tensor]) -> list[Tensor]:
    """Copies of the tensors; few launches copy all tensors of one dtype."""
    dtypes, copies = [tensor.dtype for tensor in tensors], {}
    for dtype in dict.fromkeys(dtypes):
        some = [tensor for tensor, own in zip(tensors, dtypes, strict=True) if own == dtype]
        copies[dtype] = iter(torch._foreach_mul(some, 1))
    return [next(copies[dtype]) for dtype in dtypes]
