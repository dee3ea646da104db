"""The packed path through a patched Hugging Face model: the forwards that replace its own.

Each function takes the module, its own forward `original`, and the arguments of the call by name.
Calls that the packed path does not support go to `original`; the exception `Unsupported` has the
reason, which `fastbert.explain` shows.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastbert import events
from fastbert.hf.embeddings import embedded, own_dtype, positions_of
from fastbert.hf.families import Forward, Unsupported, keeps_padding
from fastbert.hf.hooks import is_hooked, is_theirs
from fastbert.hf.stack import (
    boundary_dtype,
    family_of_module,
    require_encoder,
    require_values,
    returns_tuples,
    run_packed,
    states_wanted,
)
from fastbert.modules.embeddings import stream_dtype
from fastbert.modules.heads import first_tokens
from fastbert.modules.request import DOCUMENTS, read_layout
from fastbert.modules.sequences import Rows, Sequences
from fastbert.ops.unpad import Unpadding
from fastbert.rng import for_batch


@dataclasses.dataclass
class Encoded:
    """x: (T, H), or (M, H) if only `rows` were computed; states: (T, H) each, if wanted; dtype:
    that of the hidden states which Hugging Face would return."""

    x: Tensor
    states: tuple[Tensor | None, ...] | None
    padding: Unpadding
    rows: Rows | None
    dtype: torch.dtype


def run_model(model: Any, original: Forward, arguments: dict[str, Any]) -> Any:
    """The patched forward of a bare model: `BertModel`, `RobertaModel`, ..."""
    wanted = dict(arguments)
    return_dict = wanted.pop("return_dict", None)
    encoded = None
    try:
        encoded = encode(model, wanted)
    except Unsupported as reason:
        events.refused(model, reason)
    if encoded is None:  # outside `except`, so that errors do not show Unsupported as their context
        return original(**arguments)
    return _model_output(model, encoded, return_dict)


def encode(
    model: Any, arguments: dict[str, Any], rows: Callable[[Unpadding], Rows] | None = None
) -> Encoded:
    """Packs, embeds and runs the layers; raises Unsupported for calls that need Hugging Face's.

    rows: (Unpadding) -> Rows, the only tokens that the last layer has to compute.
    """
    family = family_of_module(model)
    arguments = dict(arguments)
    input_ids = arguments.pop("input_ids", None)
    inputs_embeds = arguments.pop("inputs_embeds", None)
    attention_mask = arguments.pop("attention_mask", None)
    token_type_ids = arguments.pop("token_type_ids", None)
    position_ids = arguments.pop("position_ids", None)
    packed = {name: arguments.pop(name, None) for name in DOCUMENTS}
    given = input_ids if inputs_embeds is None else inputs_embeds
    if given is None or (input_ids is not None and inputs_embeds is not None) or given.ndim < 2:
        raise Unsupported("input that Hugging Face refuses")
    encoder = family.encoder_of(model)
    if is_hooked(encoder) or not is_theirs(encoder):
        raise Unsupported(f"a {type(encoder).__name__} of the user's own, or a hook on it")
    layers = encoder.layer
    parts = require_encoder(model.config, layers, arguments)
    if attention_mask is not None and attention_mask.ndim not in (2, 4):
        raise Unsupported(f"an attention_mask of {attention_mask.ndim} dimensions")

    shape = given.shape[0], given.shape[1]
    require_values(given)
    keeps = keeps_padding(model)
    padding, mask = read_layout(given, attention_mask, position_ids, keeps_padding=keeps, **packed)
    positions = position_ids
    if positions is None:
        positions = positions_of(model, family, input_ids, shape, given.device)

    rng = None
    if any(module.training for module in (model, model.embeddings, *layers)):
        rng = for_batch(padding.cu_seqlens, padding.num_tokens)
    asked = {"position_ids": position_ids}
    if family.has_types:
        asked["token_type_ids"] = token_type_ids
    x = embedded(model, padding, rng, input_ids, inputs_embeds, positions, asked)
    sequences = Sequences(padding.cu_seqlens, padding.max_seqlen, mask, rng)
    states = states_wanted(model, arguments)
    chosen = rows(padding) if rows is not None and not states else None
    x, hidden_states = run_packed(model, layers, parts, x, sequences, padding, states, chosen)
    dtype = boundary_dtype(own_dtype(model.embeddings), x.device)
    return Encoded(x, hidden_states, padding, chosen, dtype)


def run_encoder(encoder: Any, original: Forward, arguments: dict[str, Any]) -> Any:
    """The patched forward of an encoder, which users' own models call directly."""
    wanted = dict(arguments)
    hidden_states = wanted.pop("hidden_states")
    mask = wanted.pop("attention_mask", None)
    positions = wanted.pop("position_ids", None)
    packed = {name: wanted.pop(name, None) for name in DOCUMENTS}
    found = None
    try:
        parts = require_encoder(encoder.config, encoder.layer, wanted)
        require_values(hidden_states)
        keeps = keeps_padding(encoder)
        padding, general = read_layout(
            hidden_states, mask, positions, keeps_padding=keeps, **packed
        )
        own, device = hidden_states.dtype, hidden_states.device
        dtype = stream_dtype(own, device, encoder.config, training=encoder.training)
        x = padding.pack(hidden_states).to(dtype)
        rng = None
        if any(layer.training for layer in encoder.layer):
            rng = for_batch(padding.cu_seqlens, x.shape[0])
        sequences = Sequences(padding.cu_seqlens, padding.max_seqlen, general, rng)
        chosen = states_wanted(encoder, wanted)
        found = run_packed(encoder, encoder.layer, parts, x, sequences, padding, chosen, None)
    except Unsupported as reason:
        events.refused(encoder, reason)
    if found is None:
        return original(**arguments)
    x, states = found
    dtype = boundary_dtype(hidden_states.dtype, hidden_states.device)
    output = output_class("BaseModelOutputWithPastAndCrossAttentions")(
        last_hidden_state=padding.pad(x.to(dtype)), hidden_states=_padded(states, padding, dtype)
    )
    # the encoders of transformers 5 accept return_dict and ignore it
    return output.to_tuple() if returns_tuples() and wanted.get("return_dict") is False else output


def _model_output(model: Any, encoded: Encoded, return_dict: bool | None) -> Any:
    family = family_of_module(model)
    padding, x, dtype = encoded.padding, encoded.x, encoded.dtype
    fields: dict[str, Any] = {"last_hidden_state": padding.pad(x.to(dtype))}
    pooler = getattr(model, "pooler", None)
    if pooler is not None and is_plain_pooler(pooler):
        # the pooler reads column 0, so it gets each first real token as a sequence of length 1
        fields["pooler_output"] = pooler(first_tokens(x, padding.cu_seqlens).to(dtype)[:, None])
    elif pooler is not None:
        fields["pooler_output"] = pooler(fields["last_hidden_state"])
    fields["hidden_states"] = _padded(encoded.states, padding, dtype)
    output = output_class(family.output)(**fields)
    if return_dict is None:
        return_dict = model.config.return_dict
    if return_dict:
        return output
    states, *rest = output.to_tuple()
    # the heads of transformers 4.57 read hidden states from the third element of the tuple on
    leaves_a_place = returns_tuples() and pooler is None and hasattr(output, "pooler_output")
    return (states, None, *rest) if leaves_a_place else (states, *rest)


def is_plain_pooler(pooler: nn.Module) -> bool:
    """Whether `pooler` is transformers' own, which reads the first token, and has no hooks."""
    return is_theirs(pooler) and not any(map(is_hooked, pooler.modules()))


def _padded(
    states: tuple[Tensor | None, ...] | None, padding: Unpadding, dtype: torch.dtype
) -> tuple[Tensor | None, ...] | None:
    if states is None:
        return None
    return tuple(None if x is None else padding.pad(x.to(dtype)) for x in states)


def output_class(name: str) -> Any:
    import transformers.modeling_outputs

    return getattr(transformers.modeling_outputs, name)
