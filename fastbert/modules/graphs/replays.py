"""The layers of an encoder as recorded CUDA graphs of one size, for batches of that size or less.

A recorded graph reads and writes fixed addresses. So a call copies its tensors into buffers of the
bucket's sizes, replays, and returns copies. Filler tokens behind the batch belong to no sequence.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.modules.graphs.call import Bucket, Call, copies_of
from fastbert.modules.graphs.recorder import Recorder
from fastbert.modules.linear import Leaf
from fastbert.modules.sequences import Rows, Sequences
from fastbert.modules.weight_copies import WeightCopies
from fastbert.rng import DropoutState


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

    def run(self, x: Tensor) -> list[Tensor]:
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

    def __call__(self, x: Tensor, call: Call) -> list[Tensor]:
        """What `run_layers` gives: copies, which later replays leave alone."""
        self.buffers.fill(x, call)
        return call.own(x, self.replay())


class TrainingGraphs:
    """Two recorded graphs: the layers' forward, and their backward, which reads saved tensors."""

    def __init__(self, recorder: Recorder, bucket: Bucket, x: Tensor, call: Call) -> None:
        self.wants_dx = x.requires_grad
        with torch.inference_mode(False), torch.enable_grad():
            self.buffers = Buffers(bucket, x, call)
            outputs = recorder.warm_up(self._forward)
            self.gradients = [torch.zeros_like(output) for output in outputs]
            recorder.warm_up(self._backward)
            del self.outputs, self.inputs  # from the warm-up, not in the recordings' memory
            self.replay_forward = recorder.record(self._forward)
            self.replay_backward = recorder.record(self._backward)

    def _forward(self) -> list[Tensor]:
        x = self.buffers.x.detach().requires_grad_(self.wants_dx)
        self.inputs = _with_gradient(x, self.buffers.call)
        self.outputs = self.buffers.run(x)
        return [output.detach() for output in self.outputs]

    def _backward(self) -> tuple[Tensor | None, ...]:
        return _gradients(self.outputs, self.inputs, self.gradients)

    def forward(self, x: Tensor, call: Call) -> list[Tensor]:
        self.buffers.fill(x, call)
        return call.own(x, self.replay_forward())

    def backward(self, x: Tensor, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Gradients of x, if it requires one, and of the parameters; once after each forward.

        gradients: of the outputs, None where there is none
        """
        for buffer, gradient in zip(self.gradients, gradients, strict=True):
            put(buffer, buffer[:0] if gradient is None else gradient, 0)
        found = list(self.replay_backward())
        if self.wants_dx and found[0] is not None:
            found[0] = found[0][: len(x)]
        own = iter(copies_of([gradient for gradient in found if gradient is not None]))
        return tuple(None if gradient is None else next(own) for gradient in found)


class Replayed(torch.autograd.Function):
    """The layers in training: replays a forward graph, and a backward graph for the gradient.

    The backward graph can be replayed once after each forward, and cannot be differentiated. For
    other gradients the layers run again without graphs, as under activation checkpointing.
    """

    @staticmethod
    def forward(
        ctx: Any, pending: Any, call: Call, x: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        """pending: has `forward` (x, call), and `backward` (x, the outputs' gradients), which
        returns None where the graphs no longer hold the tensors that the forward saved."""
        ctx.pending, ctx.call = pending, call
        ctx.set_materialize_grads(False)  # a state that nothing uses has no gradient
        # saved so that autograd raises its usual error if weights change before the backward
        ctx.save_for_backward(x, *parameters)
        return tuple(pending.forward(x, call))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        (x, *_), call, found = ctx.saved_tensors, ctx.call, None
        is_differentiated = torch.is_grad_enabled()
        # without the last output's gradient, its layers' parameters have none; the graph has zeros
        if not is_differentiated and gradients[0] is not None:
            found = ctx.pending.backward(x, gradients)
        if not is_differentiated:
            x = x.detach().requires_grad_(x.requires_grad)
        if found is None:
            with torch.enable_grad():
                outputs = call.run(x)
            inputs = _with_gradient(x, call)
            found = _gradients(outputs, inputs, gradients, create_graph=is_differentiated)
        return None, None, *(found if x.requires_grad else (None, *found))


def _with_gradient(x: Tensor, call: Call) -> list[Tensor]:
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
