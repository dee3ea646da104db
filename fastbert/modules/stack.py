"""Runs the layers of an encoder, own or patched, in the fastest way that the call allows."""

from collections.abc import Callable, Collection, Sequence
from typing import cast

from torch import Tensor, nn

from fastbert.modules.graphs import buckets
from fastbert.modules.layer import LayerParts, Stream, layers_of, run_layers
from fastbert.modules.linear import PRODUCTS
from fastbert.modules.plan import calls_layers
from fastbert.modules.sequences import Rows, Sequences


def run_stack(
    layers: nn.ModuleList,
    parts: Sequence[LayerParts | None],
    x: Tensor,
    sequences: Sequences,
    wanted_states: bool | Collection[int],
    rows: Rows | None,
    call: Callable[[int, Tensor, Sequences], Tensor],
) -> tuple[Tensor, tuple[Tensor | None, ...] | None]:
    """Does what `run_layers` does, as a CUDA graph or layer by layer.

    parts: each layer's parts, None for a layer that could not be read; call(number, x, sequences)
    calls a layer as a module, which happens for all layers if one has hooks, is checkpointed, or
    could not be read. Raises ValueError where `sequences` does not fit x.
    """
    reason = "output_hidden_states" if wanted_states else ""
    read = cast(Sequence[LayerParts], parts)
    run = layers_of(read)
    if calls_layers(layers) or None in parts:
        reason = "layers that are called as modules: hooks, checkpointing, or other classes"

        def run(number: int, stream: Stream, sequences: Sequences) -> Stream:
            x = call(number, stream.x, sequences)
            return Stream(x, x)

    sequences.check(len(x))
    output = buckets.replayed(layers, read, x, sequences, rows, reason)
    if output is not None:
        return output, None
    products = vars(layers).get(PRODUCTS)
    if products is not None:
        products.begin(x, layers.training)
    return run_layers(len(layers), x, sequences, wanted_states, rows, run)
