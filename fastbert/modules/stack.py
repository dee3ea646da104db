"""The layers of an encoder, own or patched, by the shortest way that this call allows."""

from collections.abc import Callable, Collection, Sequence
from typing import cast

from torch import Tensor, nn

from fastbert.modules.graphs import buckets
from fastbert.modules.layer import LayerParts, run_layer, run_layers
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
    """`run_layers`, as a CUDA graph or layer by layer.

    parts: what the layers are made of, None for one that cannot be read; call(number, x, sequences)
    calls a layer as a module, which is done where something looks at the call or a layer could not
    be read.
    """
    reason = "output_hidden_states" if wanted_states else ""
    is_called = calls_layers(layers)
    if is_called or None in parts:
        reason = "layers that are called as modules: hooks, checkpointing, or other classes"
    else:

        def call(number: int, x: Tensor, sequences: Sequences) -> Tensor:
            return run_layer(read[number], x, sequences)

    read = cast(Sequence[LayerParts], parts)
    sequences.check(len(x))
    output = buckets.replayed(layers, read, x, sequences, rows, reason)
    if output is not None:
        return output, None
    return run_layers(len(layers), x, sequences, wanted_states, rows, call)
