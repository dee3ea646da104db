"""The layers of an encoder as recorded CUDA graphs of one size, for batches of that size or less.

T packed tokens of B sequences, M wanted rows, H hidden; a bucket has T', B' and M' of them.

A recorded graph reads and writes fixed addresses. So a call copies its tensors into buffers of the
bucket's sizes, replays, and returns copies. Filler tokens behind the batch belong to no sequence.
"""

import contextlib
import functools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastbert.modules.graphs.recorder import Recorder
from fastbert.modules.layer import LayerParts, layers_of, run_layers
from fastbert.modules.linear import PRODUCTS, Leaf
from fastbert.modules.sequences import Rows, Sequences
from fastbert.modules.weight_copies import WeightCopies
from fastbert.rng import DropoutState


class Bucket(NamedTuple):
    """Sizes that a call is padded to, in tokens; `sequences` is a count of sequences.

    longest: an upper bound of sequence lengths; rows, longest_rows: the same for the wanted rows, 0
    where all tokens are wanted.
    """

    tokens: int
    sequences: int
    longest: int
    rows: int = 0
    longest_rows: int = 0

    @classmethod
    def of(cls, x: Tensor, sequences: Sequences, rows: Rows | None) -> "Bucket":
        """The smallest bucket for the call; at most 15 tokens or an eighth of them are filler."""
        tokens, count, longest = x.shape[0], sequences.cu_seqlens.shape[0] - 1, sequences.max_seqlen
        wanted = (0, 0)
        if rows is not None:
            wanted = rounded(rows.index.shape[0], 16), rounded(rows.max_seqlen, 64)
        return cls(
            rounded(tokens, 16), 1 << (count - 1).bit_length(), rounded(longest, 64), *wanted
        )


def rounded(size: int, least: int) -> int:
    """`size` rounded up to a multiple of `least`, or of a power of two up to size / 8 if larger."""
    step = max(least, 1 << max(size.bit_length() - 4, 0))
    return -(-size // step) * step


class Precision(NamedTuple):
    """The autocast state of a call; the call's gradient is computed without autocast."""

    device: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor) -> "Precision":
        device = x.device.type
        enabled = torch.is_autocast_enabled(device)
        return cls(device, enabled, torch.get_autocast_dtype(device))

    def restored(self) -> Any:
        """A context with the autocast state of the call."""
        # no cache: a recording must neither read autocast's earlier copies of weights nor keep any
        return torch.autocast(self.device, self.dtype, self.enabled, cache_enabled=False)


def products_of(layers: nn.ModuleList) -> weakref.ref[Any] | None:
    """The layers' `Products`, by a weak reference, as they refer to the layers; None without."""
    products = vars(layers).get(PRODUCTS)
    return None if products is None else weakref.ref(products)


class Call(NamedTuple):
    """The arguments of the layers, except x (T, H).

    training: the layers' mode; products: the `Products` that a recording keeps to, of
    `products_of`; trained: the distinct parameters that require a gradient, None if none does and
    neither does x
    """

    parts: Sequence[LayerParts]
    sequences: Sequences
    rows: Rows | None
    precision: Precision
    training: bool
    products: weakref.ref[Any] | None = None
    trained: list[Tensor] | None = None

    def num_outputs(self, x: Tensor) -> int:
        """The number of rows of the output: T, or M for wanted rows."""
        return (x if self.rows is None else self.rows.index).shape[0]

    def run(self, x: Tensor) -> Tensor:
        """(T, H) -> (T, H), or (M, H), under the call's autocast state."""
        run, products = layers_of(self.parts), self.present_products()
        with self.precision.restored():
            if products is not None:
                products.begin(x, self.training)
            return run_layers(len(self.parts), x, self.sequences, False, self.rows, run)[0]

    def present_products(self) -> Any:
        """The `Products`, None without any."""
        return None if self.products is None else self.products()

    def undone(self) -> contextlib.AbstractContextManager[None]:
        """Has the `Products` as before at its end, because what runs inside is no user's pass."""
        products = self.present_products()
        return contextlib.nullcontext() if products is None else products.undone()


class Buffers:
    """The tensors from which a recorded graph reads its batch, of the bucket's sizes."""

    def __init__(self, bucket: Bucket, x: Tensor, call: Call) -> None:
        def integers(size: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=x.device)

        self.x = x.new_zeros(bucket.tokens, x.shape[1])
        rng, rows = call.sequences.rng, None
        if rng is not None:
            rng = DropoutState(integers(2, torch.int64), integers(bucket.tokens, torch.int64))
        if call.rows is not None:
            index, inverse, begins = map(
                integers, (bucket.rows, bucket.tokens, bucket.sequences + 1)
            )
            rows = Rows(index, inverse, begins, bucket.longest_rows)
        sequences = Sequences(integers(bucket.sequences + 1), bucket.longest, None, rng)
        self.call = call._replace(sequences=sequences, rows=rows)
        self.fill(x, call)

    def run(self, x: Tensor) -> Tensor:
        """The layers over x, this batch's or a leaf of autograd's, for a recording.

        A graph begins with copies of all weights that autocast would cast one by one, or a product
        would join. Each replay makes them anew: nothing tells whether weights changed in place.
        """
        call = self.call
        if call.products is not None:
            return call.run(x)
        dtype = call.precision.dtype if call.precision.enabled else x.dtype
        linears = nn.ModuleList()
        for part in call.parts:
            others = (part.attention_end.dense, part.intermediate, part.output.dense)
            linears += [part.query.module, part.key.module, part.value.module]
            linears += [leaf.module for leaf in others if leaf.weight.dtype != dtype]
        copies = WeightCopies(linears, dtype, joins=True)
        copies.renew()

        def copied(leaf: Leaf) -> Leaf:
            return Leaf(leaf.module, given=copies)

        return call._replace(parts=[part.of_linears(copied) for part in call.parts]).run(x)

    @torch.no_grad()
    def fill(self, x: Tensor, call: Call) -> None:
        """Copies a call in; filler tokens are zeros at the end, filler sequences are empty."""
        put(self.x, x, 0)
        put(self.call.sequences.cu_seqlens, call.sequences.cu_seqlens, len(x))
        rng, drawn = self.call.sequences.rng, call.sequences.rng
        if rng is not None and drawn is not None:
            rng.state.copy_(drawn.state)
            put(rng.token_key, drawn.token_key, 0)
        rows, wanted = self.call.rows, call.rows
        if rows is not None and wanted is not None:
            put(rows.index, wanted.index, -1)
            put(rows.inverse, wanted.inverse, -1)
            put(rows.cu_seqlens, wanted.cu_seqlens, len(wanted.index))


def put(buffer: Tensor, values: Tensor, spare: float) -> None:
    """Copies `values` to the front of `buffer`, and fills the rest with `spare`."""
    count = values.shape[0]
    if count == buffer.shape[0]:
        buffer.copy_(values)
    else:
        buffer[:count].copy_(values)
        buffer[count:].fill_(spare)


class ForwardGraph:
    """A recorded forward of the layers, without gradients."""

    def __init__(self, recorder: Recorder, bucket: Bucket, x: Tensor, call: Call) -> None:
        # inference tensors as buffers could not be filled by a call outside inference mode
        with torch.inference_mode(False), torch.no_grad():
            self.buffers = Buffers(bucket, x, call)
            work = functools.partial(self.buffers.run, self.buffers.x)
            recorder.warm_up(work)
            self.replay = recorder.record(work)

    def __call__(self, x: Tensor, call: Call) -> Tensor:
        """(T, H) -> (T, H), or (M, H): a copy, which later replays leave alone."""
        self.buffers.fill(x, call)
        return self.replay()[: call.num_outputs(x)].clone()


class TrainingGraphs:
    """Two recorded graphs: the layers' forward, and their backward, which reads saved tensors."""

    def __init__(self, recorder: Recorder, bucket: Bucket, x: Tensor, call: Call) -> None:
        self.wants_dx = x.requires_grad
        with torch.inference_mode(False), torch.enable_grad():
            self.buffers = Buffers(bucket, x, call)
            self.dout = torch.zeros_like(recorder.warm_up(self._forward))
            recorder.warm_up(self._backward)
            del self.out, self.inputs  # from the warm-up, not in the recordings' memory
            self.replay_forward = recorder.record(self._forward)
            self.replay_backward = recorder.record(self._backward)

    def _forward(self) -> Tensor:
        x = self.buffers.x.detach().requires_grad_(self.wants_dx)
        self.inputs = _with_gradient(x, self.buffers.call)
        self.out = self.buffers.run(x)
        return self.out.detach()

    def _backward(self) -> tuple[Tensor | None, ...]:
        return _gradients(self.out, self.inputs, self.dout)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        self.buffers.fill(x, call)
        return self.replay_forward()[: call.num_outputs(x)].clone()

    def backward(self, dout: Tensor, num_tokens: int) -> tuple[Tensor | None, ...]:
        """Gradients of x, if it requires one, and of the parameters; once after each forward."""
        put(self.dout, dout, 0)
        found = list(self.replay_backward())
        if self.wants_dx and found[0] is not None:
            found[0] = found[0][:num_tokens]
        given = [gradient for gradient in found if gradient is not None]
        own = iter(torch._foreach_mul(given, 1) if given else ())
        return tuple(None if gradient is None else next(own) for gradient in found)


class Replayed(torch.autograd.Function):
    """The layers in training: replays a forward graph, and a backward graph for the gradient.

    The backward graph can be replayed once after each forward, and cannot be differentiated. For
    other gradients the layers run again without graphs, as under activation checkpointing.
    """

    @staticmethod
    def forward(ctx: Any, pending: Any, call: Call, x: Tensor, *parameters: Tensor) -> Tensor:
        """pending: has `forward` (x, call), and `backward` (dout, number of tokens), which returns
        None where the graphs no longer hold the tensors that the forward saved."""
        ctx.pending, ctx.call = pending, call
        # saved so that autograd raises its usual error if weights change before the backward
        ctx.save_for_backward(x, *parameters)
        return pending.forward(x, call)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        (x, *_), call, found = ctx.saved_tensors, ctx.call, None
        is_differentiated = torch.is_grad_enabled()
        if not is_differentiated:
            found = ctx.pending.backward(dout, len(x))
            x = x.detach().requires_grad_(x.requires_grad)
        if found is None:
            with torch.enable_grad():
                out = call.run(x)
            found = _gradients(out, _with_gradient(x, call), dout, create_graph=is_differentiated)
        return None, None, *(found if x.requires_grad else (None, *found))


def _with_gradient(x: Tensor, call: Call) -> list[Tensor]:
    trained = call.trained or []
    return [x, *trained] if x.requires_grad else trained


def _gradients(
    out: Tensor, inputs: list[Tensor], dout: Tensor, *, create_graph: bool = False
) -> tuple[Tensor | None, ...]:
    with torch.autocast(out.device.type, enabled=False):
        return torch.autograd.grad(out, inputs, dout, create_graph=create_graph, allow_unused=True)
