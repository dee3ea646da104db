"""Word, position and segment embeddings, summed and normalized; the residual stream's dtype."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastbert.modules.linear import (
    dropout_p_of,
    is_parametrized,
    is_plain,
    is_plain_dropout,
    is_plain_table,
)
from fastbert.ops.dropout import dropout
from fastbert.ops.embedding import embedding_layer_norm
from fastbert.ops.layer_norm import layer_norm
from fastbert.rng import DropoutState


def stream_dtype(own: torch.dtype, device: torch.device, module: Any) -> torch.dtype:
    """The dtype of the residual stream: `own`; under autocast, float32 or the low precision.

    `module.config.residual_in_fp32`, in fastbert's or Hugging Face's configuration, decides. If it
    is None or missing, training mode uses the low precision, which halves the memory traffic of the
    operators between the products, and eval mode uses float32, as Hugging Face always does, for 2
    to 7 times smaller errors (measured in `docs/numerics.md`). Statistics are always in float32.
    Autocast leaves float64 as it is.
    """
    if own == torch.float64 or not torch.is_autocast_enabled(device.type):
        return own
    in_fp32 = getattr(module.config, "residual_in_fp32", None)
    if in_fp32 or (in_fp32 is None and not module.training):
        return torch.promote_types(own, torch.float32)
    return torch.get_autocast_dtype(device.type)


def own_dtype(embeddings: Any) -> torch.dtype:
    """The dtype of the embeddings' output without autocast."""
    norm = getattr(embeddings, "LayerNorm", embeddings)  # users may wrap the embeddings
    weight = None if is_parametrized(norm) else getattr(norm, "weight", None)
    return next(embeddings.parameters()).dtype if weight is None else weight.dtype


class Tables(NamedTuple):
    """The modules of embeddings under Hugging Face's names; types: None for DistilBERT's.

    are_plain: whether all of them are plain modules, which one operator can replace
    """

    words: Any
    positions: Any
    types: Any
    norm: Any
    are_plain: bool

    @classmethod
    def of(cls, embeddings: Any) -> "Tables":
        types = getattr(embeddings, "token_type_embeddings", None)
        tables = embeddings.word_embeddings, embeddings.position_embeddings, types
        norm = embeddings.LayerNorm
        are_plain = all(one is None or is_plain_table(one) for one in tables)
        return cls(*tables, norm, are_plain and is_plain(norm, nn.LayerNorm))

    def are_one_operator(self) -> bool:
        """Whether `embedding_layer_norm` computes for ids what these modules compute."""
        return self.are_plain and has_affine(self.norm)


def embed(
    tables: Tables,
    dropout_p: float,
    input_ids: Tensor | None,
    position_ids: Tensor,
    token_type_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    rng: DropoutState | None = None,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """`dropout(norm(words + types + positions))`: (...) ids -> (..., H) in `dtype`.

    tables: a module that is not a plain nn.Embedding or nn.LayerNorm is called. token_type_ids of
    None means zeros; inputs_embeds (..., H) replaces the word embeddings.
    """
    words, positions, types, norm, _ = tables
    if inputs_embeds is None and tables.are_one_operator():
        return embedding_layer_norm(
            input_ids,
            position_ids,
            token_type_ids,
            words.weight,
            _without_padding_gradient(positions),
            None if types is None else types.weight,
            norm.weight,
            norm.bias,
            norm.eps,
            padding_idx=words.padding_idx,
            dropout_p=dropout_p,
            rng=rng,
            dtype=dtype,
        )
    x = words(input_ids) if inputs_embeds is None else inputs_embeds
    if types is not None:
        if token_type_ids is None:
            token_type_ids = position_ids.new_zeros(x.shape[:-1])
        x = x + types(token_type_ids)
    x = x + positions(position_ids)
    return dropout(normalized(x, norm).to(dtype), dropout_p, rng)


def has_affine(norm: nn.LayerNorm) -> bool:
    """Whether a plain nn.LayerNorm has a weight and a bias, as the operators need."""
    return norm.weight is not None and norm.bias is not None


def normalized(x: Tensor, norm: Any) -> Tensor:
    """Applies a norm module to x (..., H), with the operator `layer_norm` if the norm is plain."""
    if is_plain(norm, nn.LayerNorm) and has_affine(norm):
        return layer_norm(x, norm.weight, norm.bias, norm.eps)
    return norm(x)


def _without_padding_gradient(positions: Any) -> Tensor:
    """The position table; RoBERTa's has a padding row, which gets no gradient."""
    table: Tensor = positions.weight
    if positions.padding_idx is None or not torch.is_grad_enabled():
        return table
    is_padding = torch.arange(len(table), device=table.device) == positions.padding_idx
    return torch.where(is_padding[:, None], table.detach(), table)


class BertEmbeddings(nn.Module):
    """The sum of the three embeddings, normalized; ids may be packed (T,) or padded (B, S)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.word_embeddings = nn.Embedding(
            config.vocab_size, hidden, padding_idx=config.pad_token_id
        )
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, hidden)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        rng: DropoutState | None = None,
    ) -> Tensor:
        """(...) int64 ids, or (..., H) embeddings, -> (..., H).

        token_type_ids: None means zeros; position_ids: None means the columns of ids (B, S).
        """
        tables = Tables.of(self)
        if position_ids is None:
            given: Any = input_ids if inputs_embeds is None else inputs_embeds
            position_ids = torch.arange(given.shape[1], device=given.device)[None]
            if inputs_embeds is None and tables.are_one_operator():
                position_ids = position_ids.expand(given.shape)
        dtype = stream_dtype(own_dtype(self), position_ids.device, self)
        ids = input_ids, position_ids, token_type_ids
        x = embed(tables, dropout_p_of(self.dropout), *ids, inputs_embeds, rng, dtype=dtype)
        return x if is_plain_dropout(self.dropout) else self.dropout(x)
