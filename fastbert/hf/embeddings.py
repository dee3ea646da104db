"""The embeddings of a patched model over packed tokens, and the default position ids."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.backend import is_transformed
from fastbert.check import require
from fastbert.hf.families import Unsupported, dropout_of
from fastbert.hf.hooks import THEIRS, is_hooked, is_theirs, works_by_token
from fastbert.hf.stack import family_of_module, returns_tuples
from fastbert.modules.embeddings import Tables, embed, own_dtype, stream_dtype
from fastbert.modules.graphs.call import PaddedBatch
from fastbert.modules.linear import (
    Leaf,
    is_defined_in,
    is_parametrized,
    is_plain,
    is_plain_dropout,
    reads_rows,
)
from fastbert.modules.plan import Planner
from fastbert.ops.unpad import Unpadding
from fastbert.rng import DropoutState, for_batch


def embedded(
    model: Any,
    padding: Unpadding,
    rng: DropoutState | None,
    input_ids: Any,
    inputs_embeds: Any,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
) -> Tensor:
    """The packed residual stream (T, H) before the first layer.

    input_ids: (B, S), or None with inputs_embeds (B, S, E); position_ids, token_type_ids: the
    user's own, broadcasting to (B, S), None for transformers' defaults.
    """
    embeddings, has_types = model.embeddings, family_of_module(model).has_types
    token_type_ids = token_type_ids if has_types else None  # which transformers 5 ignores, too
    plain = _plain(embeddings)
    positions = position_ids
    if positions is None:
        given = input_ids if inputs_embeds is None else inputs_embeds
        positions = positions_of(model, input_ids, given)
    # the device of the input, because an offloaded model's weights are on the meta device
    dtype = stream_dtype(own_dtype(embeddings), positions.device, model)
    if plain is None:
        # transformers 4.57's DistilBERT has fewer arguments, and this one under another name
        embeds = "input_embeds" if returns_tuples() and not has_types else "inputs_embeds"
        others = {embeds: inputs_embeds, "position_ids": position_ids}
        if has_types:
            others["token_type_ids"] = token_type_ids
        others = {name: tensor for name, tensor in others.items() if tensor is not None}
        x: Any = padding.pack(embeddings(input_ids=input_ids, **others)).to(dtype)
    else:
        if has_types and token_type_ids is None and not _types_are_zero(embeddings):
            types = embeddings.token_type_ids.to(positions.device)
            # transformers 4.57 reads them by column, whatever the positions are
            by_column = returns_tuples()
            token_type_ids = types[:, : positions.shape[1]] if by_column else types[0][positions]

        def pack(ids: Tensor | None) -> Any:
            return None if ids is None else padding.pack(ids.expand(padding.batch_shape))

        tables, dropout_p = plain
        if dropout_p and rng is None:  # only the embeddings have dropout
            rng = for_batch(padding.cu_seqlens, padding.num_tokens)
        x = embed(
            tables,
            dropout_p,
            pack(input_ids),
            pack(positions),
            pack(token_type_ids),
            None if inputs_embeds is None else padding.pack(inputs_embeds),
            rng,
            dtype=dtype,
        )
    # the tables of ELECTRA's small models are narrower than H
    project = getattr(model, "embeddings_project", None)
    if project is None:
        return x
    if works_by_token(project):
        return project(x).to(dtype)
    return padding.pack(project(padding.pad(x))).to(dtype)


def positions_of(model: Any, input_ids: Tensor | None, given: Tensor) -> Tensor:
    """(1 or B, S) int64: each token's column, or in RoBERTa's families its place among real tokens.

    given: (B, S, ...), input_ids or embeddings. Raises ValueError if the model has fewer positions
    than there are columns, or in RoBERTa's families real tokens.
    """
    counts = family_of_module(model).counts_positions
    seqlen, device = given.shape[1], given.device
    first, rows, positions = _places(model)
    counted = None
    if counts and input_ids is not None:
        is_token = input_ids != first - 1
        counted = is_token.cumsum(1)
        if torch.compiler.is_compiling():  # a trace reads no values
            rows = None
        elif rows is not None and seqlen > rows:  # the only case in which the host waits
            seqlen = int(counted[:, -1].max())
    if rows is not None and seqlen > rows:
        expected = f"at most {rows} tokens a sequence, as many as it has positions for"
        require(False, type(model).__name__, expected, seqlen, "truncate them")
    if counted is not None:
        return counted * is_token + first - 1
    if positions is not None and not positions.is_meta:
        return positions[:, :seqlen].to(device)
    return torch.arange(first, seqlen + first, device=device)[None]


def _places(model: Any) -> tuple[int, int | None, Tensor | None]:
    """The first position; how many places a sequence may have, None if that is not known; and the
    positions (1, ...) of all places, a buffer that users may change, or None."""
    embeddings, counts = model.embeddings, family_of_module(model).counts_positions
    first = embeddings.padding_idx + 1 if counts else 0
    table = embeddings.position_embeddings
    weight = None if is_parametrized(table) else getattr(table, "weight", None)
    most = [len(weight) - first] if isinstance(weight, Tensor) else []
    positions = None if counts else getattr(embeddings, "position_ids", None)
    if positions is not None:
        most.append(positions.shape[1])
    return first, min(most, default=None), positions


def padded_batch(
    model: Any,
    input_ids: Tensor | None,
    mask: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
) -> PaddedBatch | None:
    """The batch for a graph, from `PaddedBatch.of`; None if no graph can begin with it.

    The arguments are a call's, None for those that were not given.
    """
    embeddings = model.embeddings
    plain, projection = _plain(embeddings), getattr(model, "embeddings_project", None)
    if input_ids is None or plain is None or not (projection is None or is_plain(projection)):
        return None
    tables, dropout_p = plain
    types = token_type_ids if family_of_module(model).has_types else None
    has_types = types is not None or tables.types is None or _types_are_zero(embeddings)
    if dropout_p or not has_types:  # a graph would repeat the mask of a dropout
        return None
    first, widest, places = _places(model)
    owner = weakref.ref(model)

    def embed(
        ids: Tensor, types: Tensor | None, positions: Tensor | None, padding: Unpadding
    ) -> Tensor:
        return embedded(owner(), padding, None, ids, None, positions, types)

    return PaddedBatch.of(
        tables,
        (input_ids, mask, types, position_ids),
        embed,
        others=(places, *(getattr(projection, name, None) for name in ("weight", "bias"))),
        first=first,
        widest=widest,
        hidden_size=model.config.hidden_size,
        dtype=stream_dtype(own_dtype(embeddings), input_ids.device, model),
    )


def require_embeddings(embeddings: nn.Module, device: torch.device) -> None:
    """Raises Unsupported for embeddings without the usual modules, or of several dtypes."""
    names = "word_embeddings", "position_embeddings", "LayerNorm"
    words, positions, norm = (getattr(embeddings, name, None) for name in names)
    if words is None or positions is None or norm is None:
        raise Unsupported(f"a {type(embeddings).__name__} of the user's own as embeddings")
    # RoBERTa's count; 4.57 has a function, see `replaced_function`
    count = getattr(type(embeddings), "create_position_ids_from_input_ids", None)
    if count is not None and not is_defined_in(count, THEIRS):
        raise Unsupported("position ids of the user's own making")
    table, weight = words._parameters.get("weight"), norm._parameters.get("weight")
    is_one = table is None or weight is None or table.dtype == weight.dtype
    if not (is_one or torch.is_autocast_enabled(device.type)):
        raise Unsupported("a LayerNorm of another dtype than the word embeddings")


def _plain(embeddings: Any) -> tuple[Tables, float] | None:
    # a plan does not check for hooks on the embeddings themselves
    return None if is_hooked(embeddings) else _PLANNER.parts(embeddings)[0]


def _plain_parts(embeddings: Any) -> tuple[Tables, float] | None:
    """The tables and the probability of dropout; None for embeddings that must be called.

    The tables may be read, or called with packed tokens.
    """
    if not is_theirs(embeddings):
        return None
    found = Tables.of(embeddings)
    tables = [one for one in found[:3] if one is not None]
    if not (
        all(works_by_token(table) and reads_rows(table) for table in tables)
        and Leaf(embeddings.LayerNorm, nn.LayerNorm).is_plain
        and is_plain_dropout(embeddings.dropout)
    ):
        return None
    return found, dropout_of(embeddings.dropout)


_PLANNER = Planner(_plain_parts)


def _types_are_zero(embeddings: Any) -> bool:
    """Whether transformers' default token_type_ids are zeros: those in a buffer, if there is one.

    The buffer is read once, for which the host waits for a GPU, and again after a change.
    """
    types = getattr(embeddings, "token_type_ids", None)
    if types is None or types.is_meta:
        return True
    # a trace and torch.func's vmap cannot read values, and an inference tensor has no version that
    # shows a change
    if torch.compiler.is_compiling() or is_transformed() or types.is_inference():
        return False
    known = _ARE_ZERO.get(embeddings)
    if known is None or known[0]() is not types or known[1] != types._version:
        are_zero = not bool(types.any())
        known = _ARE_ZERO[embeddings] = weakref.ref(types), types._version, are_zero
    return bool(known[2])


_ARE_ZERO: weakref.WeakKeyDictionary[nn.Module, tuple[Any, ...]] = weakref.WeakKeyDictionary()
