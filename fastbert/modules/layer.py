"""The computation of a BERT layer over packed tokens, independent of the modules with the weights.

fastbert's own `BertLayer` and the layers of patched Hugging Face models all run these functions.
T packed tokens of B sequences, M rows whose output is wanted, H hidden, N heads, D head size.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbert.backend import Op
from fastbert.check import require
from fastbert.modules.activations import Activation, feed_forward
from fastbert.modules.linear import Leaf, fused_linear, split_bias
from fastbert.modules.sequences import Rows, Sequences
from fastbert.modules.whole_layer import WholeLayer
from fastbert.ops.attention import attention, attention_qkvpacked
from fastbert.ops.attention_plain import Attention
from fastbert.ops.dropout import drawn, dropout
from fastbert.ops.layer_norm import Norm, Save, dropout_add_layer_norm
from fastbert.rng import DropoutState


class Stream(NamedTuple):
    """The residual stream (T, H) twice: x for linear layers, and the residual for the sum.

    Both hold the same numbers, but x may already be rounded to the dtype of products. After a
    LayerNorm they are two outputs of it: its backward gets a gradient for each, and adds the two
    as it reads them.
    """

    x: Tensor
    residual: Tensor

    def read_by(self, *leaves: Leaf) -> Tensor:
        """The tensor for these layers: x, or the residual, as in Hugging Face, if one is called."""
        return self.x if all(leaf.is_read for leaf in leaves) else self.residual


def self_attention(
    x: Tensor,
    wanted: Tensor,
    projections: tuple[Leaf, Leaf, Leaf],
    head_dim: int,
    dropout_p: float,
    sequences: Sequences,
) -> Tensor:
    """Attention without its output projection: (T, H) -> (T, H), or (M, H) for sequences.rows.

    wanted: (M, H), the rows of x whose output is wanted; x itself if all are. projections: the
    linear layers to queries, keys and values.
    """
    rows = sequences.rows
    if rows is None:
        qkv, bias = fused_linear(x, projections, attention_qkvpacked, sequences.rng)
        num_tokens, size = qkv.shape
        num_heads = size // (3 * head_dim)  # pruning and tensor parallelism leave fewer
        qkv = qkv.view(num_tokens, 3, num_heads, head_dim)
        mask, rng = sequences.mask, sequences.rng
        boundaries, longest = sequences.cu_seqlens, sequences.max_seqlen
        if mask is not None:
            mask = mask.expand(len(boundaries) - 1, num_heads, longest, longest)
        rng = drawn(num_tokens, x.device, dropout_p, rng) if dropout_p else None
        scale = head_dim**-0.5
        lengths = (boundaries, boundaries, longest, longest)
        call = Attention(qkv, None, None, *lengths, scale, dropout_p, rng, mask, bias)
        context = attention_qkvpacked.run(call)
    else:
        q = projections[0](wanted, sequences.rows_rng)
        num_heads = q.shape[-1] // head_dim
        q = q.unflatten(-1, (num_heads, head_dim))
        kv, _ = fused_linear(x, projections[1:], None, sequences.rng)
        k, v = kv.unflatten(-1, (2, num_heads, head_dim)).unbind(1)
        context = attention(
            q,
            k,
            v,
            rows.cu_seqlens,
            sequences.cu_seqlens,
            rows.max_seqlen,
            sequences.max_seqlen,
            dropout_p=dropout_p,
            rng=sequences.rows_rng,
        )
    return context.flatten(1)


class End(NamedTuple):
    """The end of each half of a layer, `norm(residual + dropout(dense(x)))`.

    dropout: its probability, 0 in eval mode; save: as in `dropout_add_layer_norm`.
    """

    dense: Leaf
    dropout: float
    norm: Leaf
    save: Save = "z"

    def adds_bias(self) -> Op | None:
        """The operator that adds the dense layer's bias and normalizes, with all gradients.

        None if the norm is not plain or lacks a weight or bias.
        """
        own = self.norm.parameters
        affine = self.norm.is_plain and own["weight"] is not None and own["bias"] is not None
        return dropout_add_layer_norm if affine else None


def project_and_norm(x: Tensor, residual: Tensor, end: End, rng: DropoutState | None) -> Stream:
    """`norm(residual + dropout(dense(x)))`: (T, I) -> (T, H).

    residual: (T, H); rng: None draws a fresh state. Raises ValueError if the sizes of dense, norm
    and residual do not fit.
    """
    return add_and_norm(*split_bias(x, end.dense, end.adds_bias(), rng), residual, end, rng)


def add_and_norm(
    x: Tensor, x_bias: Tensor | None, residual: Tensor, end: End, rng: DropoutState | None
) -> Stream:
    """`norm(residual + dropout(x + x_bias))`: (T, H); x_bias: (H,), None without `adds_bias`."""
    norm, p = end.norm, end.dropout
    if end.adds_bias() is None:
        y = norm(residual + dropout(x, p, rng)).to(residual.dtype)
        return Stream(y, y)
    weight = norm.parameters["weight"]
    if x.shape != residual.shape or weight.shape != x.shape[-1:]:  # users may swap modules
        expected = f"input {tuple(residual.shape)}, and a weight of its last size"
        require(False, "LayerNorm", expected, f"{tuple(x.shape)} and {tuple(weight.shape)}")
    rng = drawn(len(x), x.device, p, rng) if p else None
    eps: Any = norm.module.eps
    bias = norm.parameters["bias"]
    call = Norm(x, residual, weight, bias, eps, x_bias, p, rng, end.save, True)
    return Stream(*dropout_add_layer_norm.run(call))


@dataclasses.dataclass(eq=False)
class LayerParts:
    """The modules of a layer by their role.

    projections: to queries, keys and values; attention_dropout: its probability, 0 in eval mode;
    leaves: all linear layers and norms, and those of adapters; drops: whether any dropout is on
    """

    projections: tuple[Leaf, Leaf, Leaf]
    head_dim: int
    attention_dropout: float
    attention_end: End
    intermediate: Leaf
    activation: Activation
    output: End
    leaves: list[Leaf] = dataclasses.field(init=False)
    drops: bool = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        first, second = self.attention_end, self.output
        linears = *self.projections, self.intermediate, first.dense, second.dense
        for place, leaf in enumerate(linears):
            leaf.place = place
        self.leaves = [leaf for one in (*linears, first.norm, second.norm) for leaf in one.inner]
        own = self.attention_dropout, first.dropout, second.dropout
        self.drops = any(own) or any(one.dropout for leaf in linears for one in leaf.adapters)

    @functools.cached_property
    def whole(self) -> WholeLayer | None:
        """The layer as one operator; None if its modules are not all plain ones."""
        return WholeLayer.of(self)

    def with_leaves(self, change: Callable[[Leaf], Leaf]) -> "LayerParts":
        """The same parts with `change` applied to each leaf."""

        def end(one: End) -> End:
            return one._replace(dense=change(one.dense), norm=change(one.norm))

        query, key, value = map(change, self.projections)
        return dataclasses.replace(
            self,
            projections=(query, key, value),
            attention_end=end(self.attention_end),
            intermediate=change(self.intermediate),
            output=end(self.output),
        )


RunLayer = Callable[[int, Stream, Sequences], Stream]  # runs a layer, given its number
# (T, H) -> the hidden state in the form that the caller gets, and (T, H) for the next layer
Share = Callable[[Tensor], tuple[Tensor, Tensor]]


def share_packed(x: Tensor) -> tuple[Tensor, Tensor]:
    """Gives the caller the packed state itself."""
    return x, x


def layers_of(parts: Sequence[LayerParts]) -> RunLayer:
    """A function that runs layers from their parts."""
    return lambda number, stream, sequences: run_layer(parts[number], stream, sequences)


def run_layer(parts: LayerParts, stream: Stream, sequences: Sequences) -> Stream:
    """(T, H) -> (T, H), or (M, H); the three dropouts use three sites from rng.site on."""
    whole = None if torch.compiler.is_compiling() else parts.whole
    if whole is not None and (outputs := whole.run(*stream, sequences)) is not None:
        return Stream(*outputs)
    wanted = sequences.wanted(stream.residual)
    context = self_attention(
        stream.read_by(*parts.projections),
        wanted,
        parts.projections,
        parts.head_dim,
        parts.attention_dropout,
        sequences,
    )
    stream = project_and_norm(context, wanted, parts.attention_end, sequences.wanted_rng(1))
    end, rng = parts.output, sequences.wanted_rng(2)
    x, bias = feed_forward(
        stream.read_by(parts.intermediate),
        parts.intermediate,
        parts.activation,
        end.dense,
        end.adds_bias(),
        rng,
    )
    return add_and_norm(x, bias, stream.residual, end, rng)


# Each dropout of a model has its own site number: 0 for the embeddings, then three per layer.
_SITES_PER_LAYER = 3


def run_layers(
    numbers: range,
    x: Tensor,
    sequences: Sequences,
    states: Collection[int],
    rows: Rows | None,
    run: RunLayer,
    share: Share = share_packed,
) -> list[Tensor]:
    """(T, H) -> a list of the last layer's output, (T, H), or (M, H) for `rows`, and of `states`.

    numbers: the layers to run; states: those of them whose outputs are wanted too, which follow in
    order, in the form that `share` gives them
    """
    outputs, stream = [], Stream(x, x)
    for number in numbers:
        here = sequences.at(1 + _SITES_PER_LAYER * number)
        if number == numbers[-1] and sequences.mask is None:
            here = here.only(rows)
        stream = run(number, stream, here)
        if number in states:
            # one tensor instead of two branches, so that the state gets its whole gradient
            shared, x = share(stream.residual)
            stream = Stream(x, x)
            outputs.append(shared)
    x = stream.residual
    if rows is not None and (not numbers or sequences.mask is not None):
        x = rows.of(x)  # a general mask has a row for every token, so attention computed all
    return [x, *outputs]
