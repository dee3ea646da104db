"""BERT's input (Devlin et al. 2018, https://arxiv.org/abs/1810.04805): three summed embeddings."""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.backend import DTYPES, op
from fastbert.check import require, require_floats, require_shape
from fastbert.ops.dropout import checked_rng, device_numbers, dropped
from fastbert.ops.fused import as_rows, once, run, shaped
from fastbert.ops.layer_norm import plain_layer_norm, refusal
from fastbert.rng import DropoutState

WHO = "embedding_layer_norm"


class EmbeddingLayerNorm(NamedTuple):
    """A call of `embedding_layer_norm`.

    All ids have the same shape. padding_idx: not negative; rng: None without dropout; dtype: of the
    result.
    """

    input_ids: Tensor
    position_ids: Tensor
    token_type_ids: Tensor | None
    word: Tensor
    position: Tensor
    token_type: Tensor | None
    weight: Tensor
    bias: Tensor
    eps: float
    padding_idx: int | None
    dropout_p: float
    rng: DropoutState | None
    dtype: torch.dtype


@op("triton")
def embedding_layer_norm(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-12,
    *,
    padding_idx: int | None = None,
    dropout_p: float = 0.0,
    rng: DropoutState | None = None,
    dtype: torch.dtype | None = None,
) -> EmbeddingLayerNorm:
    """`dropout(layer_norm(word[input_ids] + token_type[token_type_ids] + position[position_ids]))`.

    input_ids: (...) int64, usually (T,) packed tokens; position_ids and token_type_ids broadcast to
    it, and token_type_ids of None means all zeros; word: (V, H); position: (P, H); token_type:
    (S, H), None for models without types; weight, bias: (H,). The result (..., H) has `dtype`, by
    default the word table's; sums and statistics are in float32 or wider. The row `padding_idx` of
    the word table gets no gradient, as in torch.nn.Embedding; a negative one counts from the end.
    dropout_p and rng are as in `dropout_add_layer_norm`.

    Gradients are dense; the kernels sum them in float32 and always in the same order.

    For an id outside its table the reference raises an IndexError on a CPU and fails a device
    assertion on a GPU. The kernels, for which raising would make the host wait, read and write
    nothing for the id and return a row of NaN.

    Raises ValueError for other shapes, ids that are neither int64 nor int32, token_type_ids without
    their table, a padding_idx outside the table, or a dropout_p outside [0, 4095/4096].
    """
    require_floats(WHO, word=word)
    shape = input_ids.shape
    input_ids = _expand("input_ids", input_ids, shape)
    position_ids = _expand("position_ids", position_ids, shape)
    if token_type_ids is not None:
        require(token_type is not None, WHO, "a token_type table for token_type_ids", "none")
        token_type_ids = _expand("token_type_ids", token_type_ids, shape)
    _check_tables(word, position, token_type, weight, bias)
    if padding_idx is not None:
        size = word.shape[0]
        require(-size <= padding_idx < size, WHO, f"a padding_idx within {size} words", padding_idx)
        padding_idx %= size
    rng = checked_rng(WHO, input_ids.numel(), word.device, dropout_p, rng)
    return EmbeddingLayerNorm(
        input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias, eps,
        padding_idx, dropout_p, rng, dtype or word.dtype,
    )  # fmt: skip


def _expand(name: str, ids: Tensor, shape: torch.Size) -> Tensor:
    if ids.dtype not in (torch.int64, torch.int32):
        require(False, WHO, f"{name} of dtype int64 or int32", ids.dtype)
    if ids.shape == shape:
        return ids
    sizes = zip(reversed(ids.shape), reversed(shape), strict=False)
    fits = ids.ndim <= len(shape) and all(a in (1, b) for a, b in sizes)
    require(fits, WHO, f"{name} that broadcast to {tuple(shape)}", tuple(ids.shape))
    return ids.expand(shape)


def _check_tables(
    word: Tensor, position: Tensor, token_type: Tensor | None, weight: Tensor, bias: Tensor
) -> None:
    require(word.ndim == 2, WHO, "a word table of shape (words, hidden)", tuple(word.shape))
    hidden = word.shape[1]
    for name, table in (("position", position), ("token_type", token_type)):
        if table is not None and (table.ndim != 2 or table.shape[1] != hidden):
            expected = f"a {name} table of shape (rows, {hidden})"
            require(False, WHO, expected, tuple(table.shape))
    require_shape(WHO, (hidden,), weight=weight, bias=bias)


@embedding_layer_norm.plain
def _plain(call: EmbeddingLayerNorm) -> Tensor:
    word, weight = call.word, call.weight
    wide = torch.promote_types(word.dtype, torch.float32)
    z = F.embedding(call.input_ids, word, call.padding_idx).to(wide)
    types, type_ids = call.token_type, call.token_type_ids
    if types is not None:
        z = z + (types[0] if type_ids is None else F.embedding(type_ids, types)).to(wide)
    z = z + F.embedding(call.position_ids, call.position).to(wide)
    y = plain_layer_norm(z, weight, call.bias, call.eps)
    y = y if call.rng is None else dropped(y, call.dropout_p, call.rng)
    return y.to(call.dtype)


@embedding_layer_norm.refuses
def _refusal(call: EmbeddingLayerNorm) -> str | None:
    word, tables = call.word, tuple(table for table in call[3:6] if table is not None)
    if reason := refusal(tables, (call.weight, call.bias)):
        return reason
    if len({table.dtype for table in tables}) > 1:
        return "tables of several dtypes"
    if not all(table.is_contiguous() for table in tables):
        return "tables that are not contiguous"
    if call.dtype not in DTYPES:
        return f"a result in {call.dtype}"
    if any(ids is not None and ids.device != word.device for ids in call[:3]):
        return "tensors on several devices"
    return None


class EmbeddingLayerNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Any, *fields: Any) -> Tensor:
        call = EmbeddingLayerNorm(*fields)
        ids = [None if x is None else x.reshape(-1).contiguous() for x in call[:3]]
        types = call.token_type
        if types is None:  # a row of zeros, so that the kernels have a table
            types = call.word.new_zeros(1, call.word.shape[1])
        inputs = (*ids, call.word, call.position, types, call.weight)
        state, token_key, site, threshold = device_numbers(call.rng, call.dropout_p)
        y, *statistics = kernels.embedding_layer_norm_fwd(
            *inputs, call.bias, call.eps, state, token_key, site, threshold, call.dtype,
            ctx is not None,
        )  # fmt: skip
        if ctx is not None:
            ctx.save_for_backward(*inputs, *statistics, state, token_key)
            padding_id = -1 if call.padding_idx is None else call.padding_idx
            ctx.kernels, ctx.numbers = kernels, (site, threshold, padding_id)
            ctx.has_types = call.token_type is not None
        return shaped(y, (*call.input_ids.shape, call.word.shape[1]))

    @staticmethod
    @once(WHO)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dword, dposition, dtypes, sums = ctx.kernels.embedding_layer_norm_bwd(
            as_rows(dy), *ctx.saved_tensors, *ctx.numbers
        )
        dtypes = dtypes if ctx.has_types else None
        return None, None, None, None, dword, dposition, dtypes, *sums.unbind(), *[None] * 5


embedding_layer_norm.fused(partial(run, EmbeddingLayerNormFunction))
