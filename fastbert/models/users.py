"""Calls modules of a user's in a model as Hugging Face calls them: with a padded batch."""

import dataclasses
from typing import Any

from torch import Tensor

from fastbert.models.inputs import Request
from fastbert.modules.embeddings import own_dtype
from fastbert.modules.linear import has_own_hooks, is_defined_in
from fastbert.modules.sequences import Rows, first_tokens
from fastbert.ops.unpad import Unpadding
from fastbert.outputs import BaseModelOutputWithPooling

_OWN = ("fastbert.",)
_OWN_OR_WRAPPED = (*_OWN, "torch.")  # torch's wrappers pass all arguments on
_OF_EMBEDDINGS = "input_ids", "token_type_ids", "position_ids", "inputs_embeds"


def may_be_left_out(module: Any) -> bool:
    """Whether a call of the module does what fastbert's own forward does, and nothing else."""
    return is_defined_in(type(module).forward, _OWN) and not has_own_hooks(module)


def takes_tokens(bare: Any) -> bool:
    """Whether the parts of a bare model take packed tokens, as none is of a user's class."""
    pooler = bare.pooler
    return (
        is_defined_in(type(bare.encoder).forward, _OWN)
        and is_defined_in(type(bare.embeddings).forward, _OWN_OR_WRAPPED)
        and (pooler is None or is_defined_in(type(pooler).forward, _OWN))
    )


def predict_in_rows(bare: Any, request: Request, wanted: Rows | None) -> BaseModelOutputWithPooling:
    """What `BertModel.predict` returns, by calls of its parts that are Hugging Face's.

    Each part gets one sequence in a row: ids and hidden states of (B, S), and a mask (B, 1, 1, S)
    bool, or a general one. fastbert's own pooler gets first real tokens. Dropout is by torch's
    generator alone.
    """
    batch, padding = request.batch, request.padding
    rows, is_by_row = padding, True
    if rows is None or not rows.is_by_row:
        sizes = batch.cu_seqlens, batch.max_seqlen, batch.num_tokens
        rows, is_by_row = Unpadding.from_cu_seqlens(*sizes), False
    mask = rows.mask if batch.attention_mask is None else batch.attention_mask

    def of_embeddings(name: str) -> Tensor | None:
        if is_by_row:  # at padding too as given
            return getattr(request.inputs, name)
        tokens = getattr(batch, name)
        return None if tokens is None else rows.pad(tokens)

    def in_form(states: Tensor | None) -> Any:
        """As the batch was given; zeros at padding."""
        return None if states is None else request.padded(rows.pack(states))

    x = bare.embeddings(**{name: of_embeddings(name) for name in _OF_EMBEDDINGS})
    x = x.to(own_dtype(bare.embeddings))  # also under autocast
    wanted_states = request.output_hidden_states
    asked = {"output_hidden_states": wanted_states} if wanted_states else {}
    encoded = bare.encoder(x, attention_mask=mask, **asked)
    x, pooled = encoded[0], None
    tokens = rows.pack(x)
    if bare.pooler is not None:
        is_own = is_defined_in(type(bare.pooler).forward, _OWN)
        pooled = bare.pooler(first_tokens(tokens, batch.cu_seqlens) if is_own else rows.pad(tokens))
    wanted = wanted or request.rows
    last = tokens if wanted is None else wanted.of(tokens)
    states = getattr(encoded, "hidden_states", None)
    return BaseModelOutputWithPooling(
        last_hidden_state=request.padded(last) if request.reads == "as given" else last,
        pooler_output=pooled,
        hidden_states=None if states is None else tuple(map(in_form, states)),
    )


def ask(bare: Any, request: Request) -> Any:
    """The output of a bare model that is called as Hugging Face's heads call theirs.

    Last hidden states, if they are read, become packed ones of the request's rows; a hook may have
    kept the output, so that stays as it is.
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
