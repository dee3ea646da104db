"""The input of BERT (Devlin et al. 2018, https://arxiv.org/abs/1810.04805): three embeddings."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbert.backend import op
from fastbert.check import require
from fastbert.ops.dropout import device_numbers, dropout, dropout_state
from fastbert.ops.layer_norm import DTYPES, as_rows, refusal
from fastbert.rng import DropoutState

WHO = "embedding_layer_norm"


@op("triton", dtypes=(torch.int64, torch.int32))
def embedding_layer_norm(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-12,
    *,
    padding_idx: int | None = None,
    dropout_p: float = 0.0,
    rng: DropoutState | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`dropout(layer_norm(word[input_ids] + token_type[token_type_ids] + position[position_ids]))`.

    input_ids: (...) int64, usually (T,) packed tokens; position_ids and token_type_ids broadcast to
    it, and token_type_ids of None means all zeros; word: (V, H); position: (P, H); token_type:
    (S, H); weight, bias: (H,). The result (..., H) has `dtype`, by default the tables'; sums and
    statistics are in float32 or wider. The row `padding_idx` of the word table gets no gradient, as
    in torch.nn.Embedding; negative ones count from the end. Dropout is that of
    `dropout_add_layer_norm`.

    Gradients are dense, summed in float32 and always in the same order.

    An id that its table does not have is an IndexError in the reference on a CPU and a failed
    device assertion on a GPU. The kernels read and write nothing for it and return a row of NaN, as
    raising would make the host wait.

    Raises ValueError for other shapes, a padding_idx outside the table, or a dropout_p not in
    [0, 1).
    """
    ids = _check_ids(input_ids, position_ids, token_type_ids)
    _check_tables(word, position, token_type, weight, bias)
    wide = torch.promote_types(word.dtype, torch.float32)
    if padding_idx is not None:
        padding_idx = _padding_id(padding_idx, word)
    z = F.embedding(ids[0], word, padding_idx).to(wide)
    z = z + (token_type[0] if ids[2] is None else F.embedding(ids[2], token_type)).to(wide)
    z = z + F.embedding(ids[1], position).to(wide)
    y = F.layer_norm(z, weight.shape, weight.to(wide), bias.to(wide), eps)
    rng = dropout_state(WHO, input_ids.numel(), word.device, dropout_p, rng)
    y = dropout(y, dropout_p, rng) if rng is not None else y
    return y.to(dtype or word.dtype)


@embedding_layer_norm.refuses
def _refusal(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-12,
    *,
    padding_idx: int | None = None,
    dropout_p: float = 0.0,
    rng: DropoutState | None = None,
    dtype: torch.dtype | None = None,
) -> str | None:
    tables = (word, position, token_type)
    if reason := refusal(word, [word, position, token_type], [weight, bias]):
        return reason
    if len({table.dtype for table in tables}) > 1:
        return "tables of several dtypes"
    if not all(table.is_contiguous() for table in tables):
        return "tables that are not contiguous"
    if dtype is not None and dtype not in DTYPES:
        return f"a result in {dtype}"
    ids = (input_ids, position_ids, token_type_ids)
    if any(tensor is not None and tensor.device != word.device for tensor in ids):
        return "tensors on several devices"
    return None


@embedding_layer_norm.fused
def _fused(
    kernels: Any,
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-12,
    *,
    padding_idx: int | None = None,
    dropout_p: float = 0.0,
    rng: DropoutState | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    ids = _check_ids(input_ids, position_ids, token_type_ids)
    _check_tables(word, position, token_type, weight, bias)
    padding_id = -1 if padding_idx is None else _padding_id(padding_idx, word)
    rng = dropout_state(WHO, input_ids.numel(), word.device, dropout_p, rng)
    flat = [None if t is None else t.reshape(-1).contiguous() for t in ids]
    y = _EmbeddingLayerNorm.apply(
        kernels, *flat, word, position, token_type, weight, bias, eps,
        *device_numbers(rng, dropout_p), padding_id, dtype or word.dtype,
    )  # fmt: skip
    return y.view(*input_ids.shape, word.shape[1])


class _EmbeddingLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, kernels, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None,
        word: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor,
        eps: float, state: Tensor | None, token_key: Tensor | None, site: int, threshold: int,
        padding_id: int, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        ids_and_tables = (input_ids, position_ids, token_type_ids, word, position, token_type)
        y, mean, rstd = kernels.embedding_layer_norm_fwd(
            *ids_and_tables, weight, bias, eps, state, token_key, site, threshold, dtype
        )
        ctx.save_for_backward(*ids_and_tables, weight, mean, rstd, state, token_key)
        ctx.kernels, ctx.numbers = kernels, (site, threshold, padding_id)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        gradients = ctx.kernels.embedding_layer_norm_bwd(
            as_rows(dy), *ctx.saved_tensors, *ctx.numbers
        )
        return None, None, None, None, *gradients, *[None] * 7


def _check_ids(
    input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three kinds of ids, each of the shape of the first."""
    types = token_type_ids
    return (
        _expand("input_ids", input_ids, input_ids.shape),
        _expand("position_ids", position_ids, input_ids.shape),
        None if types is None else _expand("token_type_ids", types, input_ids.shape),
    )


def _expand(name: str, ids: Tensor, shape: torch.Size) -> Tensor:
    is_integer = ids.dtype in (torch.int64, torch.int32)
    require(is_integer, WHO, f"{name} of dtype int64 or int32", ids.dtype)
    sizes = zip(reversed(ids.shape), reversed(shape), strict=False)
    fits = ids.ndim <= len(shape) and all(a in (1, b) for a, b in sizes)
    require(fits, WHO, f"{name} that broadcast to {tuple(shape)}", tuple(ids.shape))
    return ids.expand(shape)


def _check_tables(
    word: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor
) -> None:
    require(word.ndim == 2, WHO, "a word table of shape (words, hidden)", tuple(word.shape))
    hidden = word.shape[1]
    for name, table in (("position", position), ("token_type", token_type)):
        is_table = table.ndim == 2 and table.shape[1] == hidden
        require(is_table, WHO, f"a {name} table of shape (rows, {hidden})", tuple(table.shape))
    for name, vector in (("weight", weight), ("bias", bias)):
        require(vector.shape == (hidden,), WHO, f"{name} of shape ({hidden},)", tuple(vector.shape))


def _padding_id(padding_idx: int, word: Tensor) -> int:
    size = word.shape[0]
    require(-size <= padding_idx < size, WHO, f"a padding_idx within {size} words", padding_idx)
    return padding_idx % size
