"""The embeddings of a patched model over packed tokens, and the default position ids."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.check import require
from fastbert.hf.families import dropout_of
from fastbert.hf.hooks import is_hooked, is_theirs, works_by_token
from fastbert.hf.stack import family_of_module, returns_tuples
from fastbert.modules.embeddings import Tables, embed, own_dtype, stream_dtype
from fastbert.modules.linear import is_plain, reads_rows
from fastbert.modules.plan import Planner
from fastbert.ops.embedding import Call as Embedding
from fastbert.ops.unpad import Unpadding
from fastbert.rng import DropoutState


def embedded(
    model: Any,
    padding: Unpadding,
    rng: DropoutState | None,
    input_ids: Any,
    inputs_embeds: Any,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    *,
    defers: bool = False,
) -> Tensor | Embedding:
    """The packed residual stream (T, H) before the first layer; or with `defers` as `embed` says.

    input_ids: (B, S), or None with inputs_embeds (B, S, E); position_ids, token_type_ids: the
    user's own, broadcasting to (B, S), None for transformers' defaults.
    """
    embeddings, has_types = model.embeddings, family_of_module(model).has_types
    # a hook on the embeddings is no part of what a plan is read from
    plain = None if is_hooked(embeddings) else _PLANNER.parts(embeddings)[0]
    projects = hasattr(model, "embeddings_project")  # of ELECTRA's small models, narrower than H
    positions = position_ids
    if positions is None:
        given = input_ids if inputs_embeds is None else inputs_embeds
        positions = positions_of(model, input_ids, given)
    # the device of the input, because an offloaded model's weights are on the meta device
    dtype = stream_dtype(own_dtype(embeddings), positions.device, model)
    if plain is None:
        # those of transformers 4.57's DistilBERT have other names, and fewer
        embeds = "input_embeds" if returns_tuples() and not has_types else "inputs_embeds"
        others = {embeds: inputs_embeds, "position_ids": position_ids}
        if has_types:
            others["token_type_ids"] = token_type_ids
        given = {name: tensor for name, tensor in others.items() if tensor is not None}
        x: Any = padding.pack(embeddings(input_ids=input_ids, **given)).to(dtype)
    else:
        if has_types and token_type_ids is None:
            token_type_ids = _types(embeddings, positions)

        def pack(ids: Tensor | None) -> Any:
            return None if ids is None else padding.pack(ids.expand(padding.batch_shape))

        tables, dropout_p = plain
        x = embed(
            tables,
            dropout_p,
            pack(input_ids),
            pack(positions),
            pack(token_type_ids),
            None if inputs_embeds is None else padding.pack(inputs_embeds),
            rng,
            dtype=dtype,
            defers=defers and not projects,
        )
    return model.embeddings_project(x).to(dtype) if projects else x


def positions_of(model: Any, input_ids: Tensor | None, given: Tensor) -> Tensor:
    """(1 or B, S) int64: each token's column, or in RoBERTa's families its count of real tokens.

    given: (B, S, ...), input_ids or embeddings. Raises ValueError for more columns, or in RoBERTa's
    families real tokens, than the model has positions.
    """
    embeddings, family = model.embeddings, family_of_module(model)
    seqlen, device = given.shape[1], given.device
    first = embeddings.padding_idx + 1 if family.counts_positions else 0
    weight = getattr(embeddings.position_embeddings, "weight", None)
    rows = len(weight) - first if isinstance(weight, Tensor) else None
    counted = None
    if family.counts_positions and input_ids is not None:
        is_token = input_ids != first - 1
        counted = is_token.cumsum(1)
        if torch.compiler.is_compiling():  # a trace reads no values
            rows = None
        elif rows is not None and seqlen > rows:  # the only case in which the host waits
            seqlen = int(counted[:, -1].max())
    # a buffer, which users may fill with other positions
    positions = None if family.counts_positions else getattr(embeddings, "position_ids", None)
    if positions is not None:
        rows = positions.shape[1] if rows is None else min(rows, positions.shape[1])
    if rows is not None and seqlen > rows:
        expected = f"at most {rows} tokens a sequence, as many as it has positions for"
        require(False, type(model).__name__, expected, seqlen, "truncate them")
    if counted is not None:
        return counted * is_token + first - 1
    if positions is not None and not positions.is_meta:
        return positions[:, :seqlen].to(device)
    return torch.arange(first, seqlen + first, device=device)[None]


def _plain_parts(embeddings: Any) -> tuple[Tables, float] | None:
    """The tables, which may be read, or take packed tokens, and the probability of dropout.

    None for embeddings that must be called.
    """
    if not is_theirs(embeddings):
        return None
    found = Tables.of(embeddings)
    tables = [one for one in found[:3] if one is not None]
    is_dropout = any(is_plain(embeddings.dropout, kind) for kind in (nn.Dropout, nn.Identity))
    if not (
        all(works_by_token(table) and reads_rows(table) for table in tables)
        and is_plain(embeddings.LayerNorm, nn.LayerNorm)
        and is_dropout
    ):
        return None
    return found, dropout_of(embeddings.dropout)


_PLANNER = Planner(_plain_parts)


def _types(embeddings: Any, position_ids: Tensor) -> Tensor | None:
    """transformers' default token_type_ids, from a buffer; None where these are zeros.

    The buffer is read once, for which the host waits for a GPU, and again after a change.
    """
    types = getattr(embeddings, "token_type_ids", None)
    if types is None or types.is_meta:
        return None
    # a trace cannot read values, and an inference tensor has no version that shows a change
    if not torch.compiler.is_compiling() and not types.is_inference():
        known = _ARE_ZERO.get(embeddings)
        if known is None or known[0]() is not types or known[1] != types._version:
            are_zero = not bool(types.any())
            known = _ARE_ZERO[embeddings] = weakref.ref(types), types._version, are_zero
        if known[2]:
            return None
    types = types.to(position_ids.device)
    if returns_tuples():  # transformers 4.57 reads them by column, whatever the positions are
        return types[:, : position_ids.shape[1]]
    return types[0][position_ids]


_ARE_ZERO: weakref.WeakKeyDictionary[nn.Module, tuple[Any, ...]] = weakref.WeakKeyDictionary()
