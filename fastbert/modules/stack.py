"""Runs the layers of an encoder, own or patched, in the fastest way that the call allows."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fastbert.check import require
from fastbert.modules.graphs import buckets
from fastbert.modules.graphs.call import PaddedBatch
from fastbert.modules.layer import LayerParts, Share, Stream, layers_of, run_layer, run_layers
from fastbert.modules.plan import Reading
from fastbert.modules.products import PRODUCTS
from fastbert.modules.request import wanted_states
from fastbert.modules.sequences import Rows, Sequences
from fastbert.ops.unpad import Unpadding
from fastbert.rng import for_batch


def run_stack(
    reading: Reading,
    x: Tensor,
    sequences: Sequences,
    output_hidden_states: Any,
    rows: Rows | None,
    call: Callable[[int, Tensor, Sequences], Tensor],
    share: Share,
) -> tuple[Tensor, tuple[Tensor | None, ...] | None]:
    """(T, H) -> the last layer's output, (T, H), or (M, H) for `rows` alone; and hidden states.

    The layers run as a CUDA graph or one by one. If a dropout is on and `sequences` has no dropout
    state, a fresh one is drawn. x: the residual stream; reading: has each layer's parts, None for a
    layer that could not be read; output_hidden_states: as in `wanted_states`; the states are x and
    each layer's output, with None for those that are not wanted; call(number, x, sequences): calls
    a layer as a module, if it has hooks, is checkpointed, or could not be read, and all later ones
    if a hook has changed any; share: converts states for the caller. Raises ValueError if
    `sequences` does not fit x, and if both rows and states are wanted, because the last state would
    lack tokens.
    """
    expected = "no output_hidden_states where only some rows are wanted"
    require(rows is None or not output_hidden_states, "BertEncoder", expected, output_hidden_states)
    num_layers, reason = len(reading.layers), ""
    wanted = wanted_states(output_hidden_states, num_layers)
    states = tuple(place - 1 for place in range(1, num_layers) if place in (wanted or ()))
    parts = reading.parts
    read = cast(Sequence[LayerParts], parts)
    run, called = layers_of(read), reading.called()
    if called:
        reason = "layers that are called as modules: hooks, checkpointing, or other classes"
        is_known = True  # whether layers are as read; a hook of an earlier one may change them

        def run(number: int, stream: Stream, sequences: Sequences) -> Stream:
            nonlocal called, is_known
            if number not in called and not is_known:
                called, is_known = reading.called(), reading.holds()
            if number not in called and is_known:
                return run_layer(read[number], stream, sequences)
            x, is_known = call(number, stream.residual, sequences), False
            return Stream(x, x)

    sequences.check(x.shape[0])
    if sequences.rng is None and reading.drops():
        sequences = dataclasses.replace(sequences, rng=for_batch(sequences.cu_seqlens, x.shape[0]))
    outputs, given = None, x
    of: dict[int, Tensor] = {}
    if wanted and 0 in wanted:
        of[0], x = share(x)
    if not reading.has_tried_graph:
        outputs = buckets.replayed(reading, x, sequences, states, rows, share, reason)
    reading.settle()  # while the GPU works
    if reading.parts is not parts:
        return run_stack(reading, given, sequences, output_hidden_states, rows, call, share)
    if outputs is None:
        products = vars(reading.layers).get(PRODUCTS)
        if products is not None:
            products.begin(x, reading.layers.training)
        outputs = run_layers(range(num_layers), x, sequences, states, rows, run, share)
    x, *shared = outputs
    if wanted is None:
        return x, None
    of |= {number + 1: state for number, state in zip(states, shared, strict=True)}
    if num_layers and num_layers in wanted:
        of[num_layers], x = share(x)
    return x, tuple(map(of.get, range(num_layers + 1)))


def share_padded(padding: Unpadding, dtype: torch.dtype) -> Share:
    """A `Share` that gives the caller hidden states (B, S, H) in `dtype`, zeros at padding.

    If these require a gradient, the later layers read them, so that they get their whole gradient.
    """

    def share(x: Tensor) -> tuple[Tensor, Tensor]:
        padded = padding.pad(x.to(dtype))
        return padded, padding.pack(padded).to(x.dtype) if padded.requires_grad else x

    return share


def replay_padded(reading: Reading, batch: PaddedBatch) -> list[Tensor] | None:
    """The last layer's output (B, S, H), zeros at padding, and each sequence's first token (B, H).

    They come from a CUDA graph that begins with the embeddings. None if the call must run without
    it; a graph of the layers alone is not tried then, because this one is recorded at the next use.
    """
    parts, reading.has_tried_graph = reading.parts, True
    outputs = buckets.replayed(reading, batch, None)
    reading.settle()  # while the GPU works
    if reading.parts is parts:
        return outputs
    return buckets.replayed(reading, batch, None) if buckets.may_compute(reading) else None
