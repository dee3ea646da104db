"""Calls a user's modules inside a model as Hugging Face calls them: with a padded batch."""

import dataclasses
from typing import Any

from torch import Tensor, nn

from fastbert.models.heads import maps_rows
from fastbert.models.request import Request, drawn
from fastbert.modules.embeddings import own_dtype
from fastbert.modules.linear import (
    dropout_p_of,
    has_own_hooks,
    is_defined_in,
    is_plain,
    is_plain_table,
    is_watched,
)
from fastbert.modules.sequences import first_tokens
from fastbert.modules.users import is_own
from fastbert.outputs import BaseModelOutputWithPooling
from fastbert.rng import DropoutState

_TABLES = "word_embeddings", "position_embeddings", "token_type_embeddings"
_OF_EMBEDDINGS = "input_ids", "token_type_ids", "position_ids", "inputs_embeds"


def may_be_left_out(module: Any) -> bool:
    """Whether a call of the module only runs fastbert's own forward, which can be inlined."""
    return is_own(module) and not has_own_hooks(module)


def all_take_tokens(bare: Any) -> bool:
    """Whether the parts of a bare model take packed tokens: none has hooks or is a user's class.

    torch's wrappers of the embeddings pass all arguments on; a pooler's hooks see first tokens.
    """
    embeddings, encoder, pooler = bare.embeddings, bare.encoder, bare.pooler
    return (
        is_defined_in(type(embeddings).forward, ("fastbert.", "torch."))
        and is_own(encoder)
        and (pooler is None or is_own(pooler))
        and not (is_watched(embeddings) or is_watched(encoder))
    )


def tables_take_tokens(embeddings: Any) -> bool:
    """Whether the parts of the embeddings take packed tokens.

    A hook, another library's module, or an option such as max_norm reads the batch with padding.
    """
    tables = (getattr(embeddings, name, None) for name in _TABLES)  # a wrapper may hide them
    norm = getattr(embeddings, "LayerNorm", None)
    are_plain = all(table is None or is_plain_table(table) for table in tables)
    return are_plain and (norm is None or is_plain(norm, nn.LayerNorm))


def embedded_in_rows(bare: Any, request: Request, rng: DropoutState | None) -> Tensor:
    """The embeddings (B, S, H) of a batch with one sequence per row, as `request.by_sequence`.

    rng: of the packed tokens, None if no dropout is on
    """
    batch, rows, ids = request.batch, request.by_sequence, dict[str, Any]()
    for name in _OF_EMBEDDINGS:
        if rows is request.padding:  # with the caller's values at padding too
            ids[name] = getattr(request.inputs, name)
        else:
            tokens = getattr(batch, name)
            ids[name] = None if tokens is None else rows.pad(tokens)
    if rng is not None and is_own(bare.embeddings):
        ids["rng"] = rng if rows.slots is None else rng.rows(rows.slots)
    embedded: Tensor = bare.embeddings(**ids)
    return embedded


def through(module: Any, x: Tensor, request: Request, *others: Any) -> Any:
    """The output of a head's module for tokens x (T, H) and the other arguments of its forward.

    A user's module, or one with hooks, gets them padded, as all do if a graph gave x (B, S, H).
    """
    if not request.is_packed or request.padding is None or maps_rows(module):
        return module(x, *others)
    found = module(request.padded(x), *others)
    tokens, *rest = found if isinstance(found, tuple) else (found,)
    tokens = request.padding.pack(tokens)
    return (tokens, *rest) if rest else tokens


def predict_in_rows(bare: Any, request: Request) -> BaseModelOutputWithPooling:
    """What `BertModel.predict` returns, with the parts called as Hugging Face calls them.

    Each part gets one sequence per row: ids (B, S), hidden states (B, S, H), and a mask bool
    (B, 1, 1, S), or a general one. fastbert's parts draw the same dropout masks as without hooks.
    """
    batch, rows = request.batch, request.by_sequence
    mask = rows.mask if batch.attention_mask is None else batch.attention_mask

    def in_form(states: Tensor | None) -> Any:
        """The states in the input's form, with zeros at padding."""
        return None if states is None else request.padded(rows.pack(states))

    embeddings, encoder, pooler = bare.embeddings, bare.encoder, bare.pooler
    asked: dict[str, Any] = {}
    rng = None
    if request.output_hidden_states:
        asked["output_hidden_states"] = request.output_hidden_states
    drops = is_own(encoder) and encoder.reading(batch.device, trains=bare.training).drops()
    if batch.num_tokens and (drops or any(map(dropout_p_of, embeddings.children()))):
        rng = drawn(batch)
        if is_own(encoder):
            asked["rng"] = rng if rows.slots is None else rng.rows(rows.slots)
    # autocast may have changed the dtype
    x = embedded_in_rows(bare, request, rng).to(own_dtype(embeddings))
    encoded = encoder(x, attention_mask=mask, **asked)
    tokens, pooled = rows.pack(encoded[0]), None
    if pooler is not None:
        read = first_tokens(tokens, batch.cu_seqlens) if is_own(pooler) else rows.pad(tokens)
        pooled = pooler(read)
    last = tokens if request.rows is None else request.rows.of(tokens)
    states = getattr(encoded, "hidden_states", None)
    return BaseModelOutputWithPooling(
        last_hidden_state=request.padded(last) if request.reads == "as given" else last,
        pooler_output=pooled,
        hidden_states=None if states is None else tuple(map(in_form, states)),
    )


def call_padded(bare: Any, request: Request) -> Any:
    """The output of a bare model, called as Hugging Face's heads call theirs.

    If the last hidden states are read, they are packed and reduced to the request's rows, in a copy
    of the output, because a hook may have kept the original.
    """
    ids, *others = request.inputs
    named = dict(zip(request.inputs._fields[1:], others, strict=True))
    named |= {name: x for name, x in request.documents.items() if x is not None}
    states = request.output_hidden_states
    output = bare(ids, **named, output_hidden_states=states, return_dict=True)
    if request.reads == "pooled":
        return output
    padding, rows = request.padding, request.rows
    x = output.last_hidden_state if padding is None else padding.pack(output[0])
    return dataclasses.replace(output, last_hidden_state=x if rows is None else rows.of(x))
