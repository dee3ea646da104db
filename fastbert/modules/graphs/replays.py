"""Recorded CUDA graphs of an encoder's layers, each of one size, for batches up to that size.

A recorded graph reads and writes fixed addresses. So a call copies its tensors into buffers of the
bucket's sizes, replays, and returns copies. Filler tokens after the batch belong to no sequence.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.modules.graphs.call import Bucket, LayersCall, PaddedBatch, copies_of
from fastbert.modules.graphs.recorder import CudaGraphs, Work
from fastbert.modules.linear import Leaf
from fastbert.modules.products.weight_copies import WeightCopies
from fastbert.modules.sequences import Rows, Sequences
from fastbert.rng import DropoutState

# The number of backward graphs if processes exchange gradients: those of a quarter of the layers
# are exchanged while those of the next quarter are computed.
SEGMENTS = 4


class Buffers:
    """The tensors from which a recorded graph reads its batch, of the bucket's sizes.

    x: the residual stream, or the padded batch of a graph that begins with one
    """

    def __init__(self, bucket: Bucket, x: Tensor | PaddedBatch, call: LayersCall) -> None:
        self.x: Any = None
        self.call = call
        if isinstance(x, PaddedBatch):
            self.x = x.buffers(bucket)
        else:
            self.x = x.new_zeros(bucket.tokens, *x.shape[1:])
            self._make_sequences(bucket, x, call)
        self.fill(x, call)

    def _make_sequences(self, bucket: Bucket, x: Tensor, call: LayersCall) -> None:
        def integers(size: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=x.device)

        assert call.sequences is not None
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

    def begin(self) -> LayersCall:
        """Begins a forward over the buffers, to be recorded, and returns the call that runs it.

        The call reads aliases of the parameters. The parameters' own gradient nodes belong to the
        caller's stream while an output of an earlier forward lives, such as a loop's last loss.
        Autograd would make that stream wait for the recording, which CUDA refuses.
        """
        call, aliases = self.call, dict[Tensor, Tensor]()
        call.begin(self.x)
        copies = None if call.products is not None else self._copies()

        def alias(parameter: Tensor) -> Tensor:
            if parameter not in aliases:
                one = parameter.detach().requires_grad_(parameter.requires_grad)
                aliases[parameter] = one
            return aliases[parameter]

        def change(leaf: Leaf) -> Leaf:
            return leaf.with_parameters(alias, copies)

        parts = [part.with_leaves(change) for part in call.parts]
        trained = None if call.trained is None else [*map(alias, call.trained)]
        return call._replace(parts=parts, trained=trained)

    def _copies(self) -> WeightCopies:
        """Copies of the weights that autocast would cast one by one or a product concatenate.

        Each replay makes them anew, because nothing tells whether weights changed in place.
        """
        call, linears = self.call, nn.ModuleList()
        dtype = call.precision.dtype if call.precision.enabled else self.x.dtype
        for part in call.parts:
            others = (leaf for leaf in part.leaves if leaf not in part.projections)
            others = (leaf for leaf in others if isinstance(leaf.module, nn.Linear))
            linears += [leaf.module for leaf in part.projections]
            linears += [leaf.module for leaf in others if leaf.weight.dtype != dtype]
        copies = WeightCopies(linears, dtype)
        copies.renew()
        return copies

    @torch.no_grad()
    def fill(self, x: Tensor | PaddedBatch, call: LayersCall) -> None:
        """Copies a call into the buffers; filler tokens are zeros, filler sequences are empty."""
        if isinstance(x, PaddedBatch):
            self.x.fill(x)
            return
        put(self.x, x, 0)
        own, given = self.call.sequences, call.sequences
        assert own is not None
        assert given is not None
        put(own.cu_seqlens, given.cu_seqlens, None)
        rng, drawn = own.rng, given.rng
        if rng is not None and drawn is not None:
            rng.state.copy_(drawn.state)
            put(rng.token_key, drawn.token_key, 0)
        rows, wanted = self.call.rows, call.rows
        if rows is not None and wanted is not None:
            put(rows.index, wanted.index, -1)
            put(rows.inverse, wanted.inverse, -1)
            put(rows.cu_seqlens, wanted.cu_seqlens, None)


def put(buffer: Tensor, values: Tensor, spare: float | None) -> None:
    """Copies `values` to the front of `buffer`, and fills the rest with `spare`.

    spare: None repeats the last value, which in boundaries makes the other sequences empty
    """
    count = values.shape[0]
    if count == buffer.shape[0]:
        buffer.copy_(values)
    else:
        buffer[:count].copy_(values)
        rest = buffer[count:]
        if spare is None:
            rest.copy_(values[-1:].expand_as(rest))
        else:
            rest.fill_(spare)


class ForwardGraph:
    """A recorded forward of the layers, without gradients."""

    def __init__(
        self, recorder: CudaGraphs, bucket: Bucket, x: Tensor | PaddedBatch, call: LayersCall
    ) -> None:
        # a call outside inference mode could not fill buffers that were made inside it
        with torch.inference_mode(False), torch.no_grad():
            self.buffers = Buffers(bucket, x, call)
            recorder.warm_up(self._forward)
            self.replay = recorder.record(self._forward)

    def _forward(self) -> list[Tensor]:
        return self.buffers.begin().run(self.buffers.x)

    def __call__(self, x: Tensor | PaddedBatch, call: LayersCall) -> list[Tensor]:
        """The outputs of the call, as copies that later replays do not overwrite."""
        self.buffers.fill(x, call)
        return call.copied(x, self.replay())


def num_segments() -> int:
    """The number of backward graphs of the layers: several if processes exchange gradients."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return SEGMENTS if torch.distributed.get_world_size() > 1 else 1
    return 1


class TrainingGraphs:
    """A recorded graph of the layers' forward, and one of each segment's backward.

    replay_backward: by segment number, for the segments in which something requires a gradient
    """

    def __init__(self, recorder: CudaGraphs, bucket: Bucket, x: Tensor, call: LayersCall) -> None:
        self.wants_dx, self.segments = x.requires_grad, call.segments(num_segments())
        self.replay_backward: dict[int, Work[tuple[Tensor | None, ...]]] = {}
        with torch.inference_mode(False), torch.enable_grad():
            self.buffers = Buffers(bucket, x, call)
            outputs = recorder.warm_up(self._forward)
            self.gradients = [[torch.zeros_like(x) for x in one] for one in outputs]
            # in autograd's order, because each backward reuses the memory of the one before
            numbers = [n for n in reversed(range(len(outputs))) if self.inputs[n]]
            works = {number: functools.partial(self._backward, number) for number in numbers}
            for work in works.values():
                recorder.warm_up(work)
            del self.outputs, self.inputs  # the warm-up's, outside the recordings' memory
            self.replay_forward = recorder.record(self._forward)
            for number, work in works.items():
                self.replay_backward[number] = recorder.record(work)
            del self.outputs, self.inputs  # aliases, which would keep weights' old memory

    def _forward(self) -> list[list[Tensor]]:
        call, x, wants_dx = self.buffers.begin(), self.buffers.x, self.wants_dx
        self.inputs: list[list[Tensor]] = []
        self.outputs: list[list[Tensor]] = []
        for segment in self.segments:
            one, x = segment.of(call), x.detach().requires_grad_(wants_dx)
            self.inputs.append(_with_gradient(x, one))
            self.outputs.append(one.run(x))
            x = self.outputs[-1][0]
            wants_dx = x.requires_grad
        return [[output.detach() for output in one] for one in self.outputs]

    def _backward(self, number: int) -> tuple[Tensor | None, ...]:
        return _gradients(self.outputs[number], self.inputs[number], self.gradients[number])

    def forward(self, x: Tensor, call: LayersCall) -> list[list[Tensor]]:
        """The outputs of each segment, in the graph's memory."""
        self.buffers.fill(x, call)
        return self.replay_forward()

    def backward(
        self, number: int, x: Tensor, gradients: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        """The gradients of x, if it requires one, and of the parameters; once after each forward.

        number, x: the segment and its input; gradients: those of its outputs, each may be None
        """
        for buffer, gradient in zip(self.gradients[number], gradients, strict=True):
            put(buffer, buffer[:0] if gradient is None else gradient, 0)
        found = list(self.replay_backward[number]())
        if x.requires_grad and found[0] is not None:
            found[0] = found[0][: len(x)]
        own = iter(copies_of([gradient for gradient in found if gradient is not None]))
        return tuple(None if gradient is None else next(own) for gradient in found)


class Replayed(torch.autograd.Function):
    """The autograd node of a segment of layers that a forward graph has computed.

    Its backward graph can be replayed once after each forward, and cannot be differentiated. For
    other gradients the layers run again without graphs, as under activation checkpointing.
    """

    @staticmethod
    def forward(
        ctx: Any, pending: Any, number: int, call: LayersCall, found: list[Tensor], x: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """pending: has `backward` (number, x, the outputs' gradients), which returns None if the
        graphs no longer hold the tensors that the forward saved; found: the outputs in the graph's
        memory."""
        ctx.pending, ctx.number, ctx.call = pending, number, call
        ctx.set_materialize_grads(False)  # a state that nothing uses has no gradient
        # saved so that autograd raises its usual error if weights change before the backward
        ctx.save_for_backward(x, *parameters)
        return tuple(call.copied(x, found))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        (x, *_), call, found = ctx.saved_tensors, ctx.call, None
        is_differentiated = torch.is_grad_enabled()
        if not is_differentiated:
            # if the output has no gradient, parameters have none, but the graph would give zeros
            if gradients[0] is not None:
                found = ctx.pending.backward(ctx.number, x, gradients)
            x = x.detach().requires_grad_(x.requires_grad)
        if found is None:
            with torch.enable_grad():
                call.begin(x)
                outputs = call.run(x)
            inputs = _with_gradient(x, call)
            found = _gradients(outputs, inputs, gradients, create_graph=is_differentiated)
        return None, None, None, None, *(found if x.requires_grad else (None, *found))


def _with_gradient(x: Tensor, call: LayersCall) -> list[Tensor]:
    trained = call.trained or []
    return [x, *trained] if x.requires_grad else trained


def _gradients(
    outputs: Sequence[Tensor],
    inputs: list[Tensor],
    gradients: Sequence[Tensor | None],
    *,
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    used = [pair for pair in zip(outputs, gradients, strict=True) if pair[1] is not None]
    if not used:
        return (None,) * len(inputs)
    of, given = zip(*used, strict=True)
    with torch.autocast(of[0].device.type, enabled=False):
        return torch.autograd.grad(of, inputs, given, create_graph=create_graph, allow_unused=True)
