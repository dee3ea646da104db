"""What a BERT layer computes over packed tokens, whichever modules hold its weights.

fastbert's own `BertLayer` and the layers of patched Hugging Face models all run these functions.
T packed tokens of B sequences, M of which are wanted, H hidden, N heads, D head size.
"""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbert.check import require
from fastbert.modules.activations import dense_and_activate
from fastbert.modules.linear import Leaf, fused_linear, split_bias
from fastbert.ops.attention import Call as Attention
from fastbert.ops.attention import attention, attention_qkvpacked
from fastbert.ops.compact import compact
from fastbert.ops.dropout import check_dropout, drawn, dropout
from fastbert.ops.gather_rows import Call as Gather
from fastbert.ops.gather_rows import gather_rows
from fastbert.ops.layer_norm import Call as Norm
from fastbert.ops.layer_norm import Save, dropout_add_layer_norm
from fastbert.rng import DropoutState


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Which M of the T packed tokens are wanted, in order.

    index: (M,) int32, each row's token, -1 for a spare row; inverse: (T,) int32, each token's row
    or -1; cu_seqlens: (B + 1,) int32, where each sequence's rows begin; max_seqlen: an upper bound
    of how many a sequence has.
    """

    index: Tensor
    inverse: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    @classmethod
    def where(cls, wanted: Tensor, cu_seqlens: Tensor, max_seqlen: int, capacity: int) -> "Rows":
        """The tokens that `wanted` (T,) bool marks, at most `capacity` of them; no host waits."""
        kept = compact(wanted[None], 0, capacity)
        before = torch.cat([wanted.new_zeros(1), wanted]).cumsum(0, dtype=torch.int32)
        begins = before[cu_seqlens.long()].clamp(max=capacity)
        return cls(kept.positions, kept.slots, begins, max_seqlen)

    @classmethod
    def read_by_losses(
        cls,
        cu_seqlens: Tensor,
        max_seqlen: int,
        num_tokens: int,
        *,
        first: bool,
        has_label: Tensor | None = None,
        num_labels: int = 0,
    ) -> "Rows":
        """Each sequence's first token if `first`, and the tokens that (T,) bool `has_label` marks.

        num_labels: how many these are, or an upper bound of it. The host waits for nothing.
        """
        wanted = torch.zeros(num_tokens + 1, dtype=torch.bool, device=cu_seqlens.device)
        capacity = num_labels
        if first:  # an empty sequence has its successor's place, or the one behind all
            # an assignment through an index would copy its value from the host, and wait for that
            wanted.index_fill_(0, cu_seqlens[:-1].long(), True)
            capacity += cu_seqlens.shape[0] - 1
        wanted = wanted[:-1]
        if has_label is not None:
            wanted = wanted | has_label
        longest = min(max_seqlen, 1) if has_label is None else max_seqlen
        return cls.where(wanted, cu_seqlens, longest, min(capacity, num_tokens))

    def of(self, x: Tensor) -> Tensor:
        """(T, H) -> (M, H), zeros in spare rows."""
        return gather_rows.run(Gather(x, self.index, self.inverse))

    def take(self, values: Tensor, spare: int) -> Tensor:
        """(T,) -> (M,), `spare` in spare rows."""
        return torch.where(self.index >= 0, values[self.index.clamp(min=0)], spare)


@dataclasses.dataclass(frozen=True, eq=False)
class Sequences:
    """How the T packed tokens of one forward pass belong together.

    cu_seqlens: (B + 1,) int32, where each sequence begins, and T at the end; max_seqlen: an upper
    bound of their lengths; mask: which of its sequence's tokens each may attend to, as `attention`
    takes it, None for all; rng: what dropout draws from, None where none is; rows: the only tokens
    whose output is wanted, None for all.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    mask: Tensor | None = None
    rng: DropoutState | None = None
    rows: Rows | None = None

    def check(self, num_tokens: int) -> None:
        """Raises ValueError where these are not sequences of so many tokens.

        Asked once in a forward pass, as layers do not check what they give to operators.
        """
        cu_seqlens, mask, rng = self.cu_seqlens, self.mask, self.rng
        if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or not len(cu_seqlens):
            got = f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
            require(False, "attention", "cu_seqlens of dtype int32 and shape (batch + 1,)", got)
        if not cu_seqlens.is_contiguous():
            require(False, "attention", "contiguous cu_seqlens", cu_seqlens.stride())
        if mask is not None:
            self._check_mask(mask)
        if rng is not None:
            check_dropout("dropout", num_tokens, cu_seqlens.device, 0.5, rng)

    def _check_mask(self, mask: Tensor) -> None:
        batch, longest = len(self.cu_seqlens) - 1, self.max_seqlen
        full = (batch, None, longest, longest)  # how many heads there are, the layers know
        sizes = zip(reversed(mask.shape), reversed(full), strict=False)
        require(
            mask.ndim <= 4
            and all(limit is None or size in (1, limit) for size, limit in sizes)
            and (mask.dtype == torch.bool or mask.is_floating_point()),
            "attention",
            f"a mask of dtype bool or floating, broadcasting to {(batch, 'heads', *full[2:])}",
            f"{mask.dtype} {tuple(mask.shape)}",
        )

    def at(self, site: int) -> "Sequences":
        """The same, with the dropout of another place in the model."""
        if self.rng is None:
            return self
        return Sequences(self.cu_seqlens, self.max_seqlen, self.mask, self.rng.at(site), self.rows)

    def only(self, rows: Rows | None) -> "Sequences":
        if rows is self.rows:
            return self
        return Sequences(self.cu_seqlens, self.max_seqlen, self.mask, self.rng, rows)

    def wanted(self, x: Tensor) -> Tensor:
        """(T, H) -> the rows of it that are wanted"""
        return x if self.rows is None else self.rows.of(x)

    def wanted_rng(self, offset: int = 0) -> DropoutState | None:
        """Dropout of the wanted rows, at the site `offset` behind the present one."""
        if self.rng is None:
            return None
        rng = self.rng if self.rows is None else self.rng.rows(self.rows.index)
        return rng.at(rng.site + offset)


def self_attention(
    x: Tensor,
    query: Leaf,
    key: Leaf,
    value: Leaf,
    num_heads: int,
    dropout_p: float,
    sequences: Sequences,
) -> Tensor:
    """(T, H) -> (T, H), or (M, H) where only some rows are wanted; before the output projection."""
    rows = sequences.rows
    if rows is None:
        qkv = fused_linear(x, (query, key, value)).unflatten(-1, (3, num_heads, -1))
        mask, rng = sequences.mask, sequences.rng
        boundaries, longest = sequences.cu_seqlens, sequences.max_seqlen
        if mask is not None:
            mask = mask.expand(len(boundaries) - 1, num_heads, longest, longest)
        rng = drawn(len(x), x.device, dropout_p, rng) if dropout_p else None
        scale = qkv.shape[3] ** -0.5
        lengths = (boundaries, boundaries, longest, longest)
        call = Attention(qkv, None, None, *lengths, scale, dropout_p, rng, mask)
        context = attention_qkvpacked.run(call)
    else:
        q = query(rows.of(x)).unflatten(-1, (num_heads, -1))
        k, v = fused_linear(x, (key, value)).unflatten(-1, (2, num_heads, -1)).unbind(1)
        context = attention(
            q,
            k,
            v,
            rows.cu_seqlens,
            sequences.cu_seqlens,
            rows.max_seqlen,
            sequences.max_seqlen,
            dropout_p=dropout_p,
            rng=sequences.wanted_rng(),
        )
    return context.flatten(1)


def project_and_norm(
    x: Tensor,
    residual: Tensor,
    dense: Leaf,
    norm: Leaf,
    dropout_p: float,
    rng: DropoutState | None,
    save: Save = "z",
) -> Tensor:
    """`norm(residual + dropout(dense(x)))`: the end of each half of a layer."""
    affine = norm.is_plain and norm.weight is not None and norm.bias is not None
    x, x_bias = split_bias(x, dense, dropout_add_layer_norm if affine else None)
    if affine:
        weight = norm.weight
        if x.shape != residual.shape or weight.shape != x.shape[-1:]:  # of modules put together
            expected = f"a product of {tuple(residual.shape)} and a weight of {tuple(weight.shape)}"
            require(False, "LayerNorm", f"{expected} to fit", tuple(x.shape))
        rng = drawn(len(x), x.device, dropout_p, rng) if dropout_p else None
        eps: Any = norm.module.eps
        call = Norm(x, residual, weight, norm.bias, eps, x_bias, dropout_p, rng, save)
        return dropout_add_layer_norm.run(call)
    return norm(residual + dropout(x, dropout_p, rng)).to(residual.dtype)


class LayerParts(NamedTuple):
    """The modules of a layer by what they do, and its dropout probabilities, 0 in eval mode."""

    query: Leaf
    key: Leaf
    value: Leaf
    num_heads: int
    attention_dropout: float
    attention_output: Leaf
    attention_output_dropout: float
    attention_norm: Leaf
    intermediate: Leaf
    activation: Callable
    output: Leaf
    output_dropout: float
    output_norm: Leaf
    attention_save: Save = "z"
    output_save: Save = "z"


def run_layer(parts: LayerParts, x: Tensor, sequences: Sequences) -> Tensor:
    """(T, H) -> (T, H), or (M, H); the layer's three dropouts are three sites from rng's on."""
    context = self_attention(
        x,
        parts.query,
        parts.key,
        parts.value,
        parts.num_heads,
        parts.attention_dropout,
        sequences,
    )
    x = project_and_norm(
        context,
        sequences.wanted(x),
        parts.attention_output,
        parts.attention_norm,
        parts.attention_output_dropout,
        sequences.wanted_rng(1),
        parts.attention_save,
    )
    intermediate = dense_and_activate(x, parts.intermediate, parts.activation)
    return project_and_norm(
        intermediate,
        x,
        parts.output,
        parts.output_norm,
        parts.output_dropout,
        sequences.wanted_rng(2),
        parts.output_save,
    )


# Every dropout of a model has a number of its own: the embeddings' is 0, and each layer has three.
_SITES_PER_LAYER = 3


def run_layers(
    num_layers: int,
    x: Tensor,
    sequences: Sequences,
    wanted_states: bool | Collection[int],
    rows: Rows | None,
    call: Callable[[int, Tensor, Sequences], Tensor],
) -> tuple[Tensor, tuple[Tensor | None, ...] | None]:
    """(T, H) -> the last layer's output, (T, H), or (M, H) for `rows` alone; and hidden states.

    call(number, x, sequences) runs one layer. wanted_states: True for x and each layer's output,
    layer numbers for these layers' outputs with None for the others, as in Hugging Face. Raises
    ValueError if both rows and states are wanted, as the last state would lack rows.
    """
    every = wanted_states is True
    chosen = () if isinstance(wanted_states, bool) else wanted_states
    require(
        rows is None or not wanted_states,
        "BertEncoder",
        "no output_hidden_states where only some rows are wanted",
        wanted_states,
    )
    states: list[Tensor | None] = [x] if every else []
    for number in range(num_layers):
        here = sequences.at(1 + _SITES_PER_LAYER * number)
        if number == num_layers - 1 and sequences.mask is None:
            here = here.only(rows)
        x = call(number, x, here)
        states.append(x if every or number in chosen else None)
    if rows is not None and (not num_layers or sequences.mask is not None):
        x = rows.of(x)  # a mask's rows are places in a sequence, so it takes all of them
    return x, tuple(states) if wanted_states else None
