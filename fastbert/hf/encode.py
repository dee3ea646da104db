"""The packed path through a patched Hugging Face model: what its forwards do instead of their own.

Each function takes the module, its own forward `original`, and the arguments of the call by name.
Where the packed path does not compute what is asked, it calls `original`: `Unsupported` carries the
reason, which `fastbert.explain` shows.
"""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from fastbert import events
from fastbert.check import require
from fastbert.hf.families import (
    Family,
    Unsupported,
    dropout_of,
    family_of,
    patched_base,
    runs_patched,
)
from fastbert.hf.hooks import is_hooked, is_observed
from fastbert.modules.embeddings import embed, stream_dtype
from fastbert.modules.heads import first_tokens
from fastbert.modules.layer import LayerParts, Rows, Sequences, run_layer, run_layers
from fastbert.modules.masks import document_boundaries, read_mask
from fastbert.ops.unpad import Unpadding, unpad
from fastbert.rng import for_batch

_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
# Arguments that say nothing to an encoder, whatever their value.
_IGNORED = {"num_items_in_batch", "seq_idx", "cache_position", "use_cache", "return_dict"}
_BUILT_IN_ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention", "fastbert")


@dataclasses.dataclass
class Encoded:
    """x: (T, H), or (M, H) where only some rows were computed; states: (T, H) each, if wanted;
    dtype: in which Hugging Face gives hidden states."""

    x: Tensor
    states: tuple[Tensor | None, ...] | None
    padding: Unpadding
    rows: Rows | None
    dtype: torch.dtype


def run_model(model: Any, original: Callable, arguments: dict[str, Any]) -> Any:
    """The forward of a bare model: `BertModel`, `RobertaModel`, ..."""
    wanted = dict(arguments)
    return_dict = wanted.pop("return_dict", None)
    try:
        encoded = encode(model, wanted)
    except Unsupported as reason:
        events.refused(model, reason)
        return original(**arguments)
    return _model_output(model, encoded, return_dict)


def encode(model: Any, arguments: dict[str, Any], rows: Callable | None = None) -> Encoded:
    """Packs, embeds and runs the layers; raises Unsupported where that is not what is asked.

    rows: (Unpadding) -> Rows, the only tokens that the last layer need compute.
    """
    family = _family(model)
    arguments = dict(arguments)
    input_ids = arguments.pop("input_ids", None)
    inputs_embeds = arguments.pop("inputs_embeds", None)
    attention_mask = arguments.pop("attention_mask", None)
    token_type_ids = arguments.pop("token_type_ids", None)
    position_ids = arguments.pop("position_ids", None)
    packed = {name: arguments.pop(name, None) for name in _PACKED}
    given = input_ids if inputs_embeds is None else inputs_embeds
    if given is None or (input_ids is not None and inputs_embeds is not None) or given.ndim < 2:
        raise Unsupported("input that Hugging Face refuses")
    encoder = family.encoder_of(model)
    if is_hooked(encoder) or _is_foreign(encoder):
        raise Unsupported(f"a {type(encoder).__name__} of the user's own, or a hook on it")
    layers = encoder.layer
    _require_encoder(model.config, layers, arguments)
    if attention_mask is not None and attention_mask.ndim not in (2, 4):
        raise Unsupported(f"an attention_mask of {attention_mask.ndim} dimensions")

    shape = batch, seqlen = given.shape[0], given.shape[1]
    padding, mask = _padding(
        given, batch, seqlen, attention_mask, position_ids=position_ids, **packed
    )
    if position_ids is None:
        position_ids = _positions(model, family, padding, input_ids, shape, given.device)

    def pack(ids: Tensor) -> Tensor:
        return padding.pack(ids.expand(shape).to(given.device))

    embeddings = model.embeddings
    num_tokens = padding.num_tokens
    rng = None
    if any(module.training for module in (model, embeddings, *layers)):
        rng = for_batch(padding.cu_seqlens, num_tokens)
    if is_hooked(embeddings) or _is_foreign(embeddings):
        ids = {"token_type_ids": token_type_ids} if family.has_types else {}
        x = embeddings(
            input_ids=input_ids, inputs_embeds=inputs_embeds, position_ids=position_ids, **ids
        )
        x = padding.pack(x).to(stream_dtype(x))
    else:
        x = embed(
            embeddings.word_embeddings,
            embeddings.position_embeddings,
            embeddings.token_type_embeddings if family.has_types else None,
            embeddings.LayerNorm,
            dropout_of(embeddings.dropout),
            None if input_ids is None else pack(input_ids),
            pack(position_ids),
            None if token_type_ids is None else pack(token_type_ids),
            None if inputs_embeds is None else padding.pack(inputs_embeds),
            rng,
        )
    if hasattr(model, "embeddings_project"):  # ELECTRA's small models embed narrower
        x = model.embeddings_project(x)
    sequences = Sequences(padding.cu_seqlens, padding.max_seqlen, mask, rng)
    states = _states_wanted(model, arguments)
    chosen = rows(padding) if rows is not None and not states else None
    _tell(model, layers, padding, mask, chosen)
    x, hidden_states = _run(layers, x, sequences, padding, states, chosen)
    dtype = _boundary_dtype(embeddings.LayerNorm.weight)
    return Encoded(x, hidden_states, padding, chosen, dtype)


def run_encoder(encoder: Any, original: Callable, arguments: dict[str, Any]) -> Any:
    """The forward of an encoder by itself, as models that users build around one call it."""
    wanted = dict(arguments)
    hidden_states = wanted.pop("hidden_states")
    mask = wanted.pop("attention_mask", None)
    packed = {name: wanted.pop(name, None) for name in (*_PACKED, "position_ids")}
    try:
        _require_encoder(encoder.config, encoder.layer, wanted)
        batch, seqlen, _ = hidden_states.shape
        padding, general = _padding(hidden_states, batch, seqlen, mask, **packed)
        x = padding.pack(hidden_states).to(stream_dtype(hidden_states))
        rng = None
        if any(layer.training for layer in encoder.layer):
            rng = for_batch(padding.cu_seqlens, x.shape[0])
        sequences = Sequences(padding.cu_seqlens, padding.max_seqlen, general, rng)
        _tell(encoder, encoder.layer, padding, general, None)
        states_wanted = _states_wanted(encoder, wanted)
        x, states = _run(encoder.layer, x, sequences, padding, states_wanted, None)
    except Unsupported as reason:
        events.refused(encoder, reason)
        return original(**arguments)
    dtype = _boundary_dtype(hidden_states)
    output = output_class("BaseModelOutputWithPastAndCrossAttentions")(
        last_hidden_state=padding.pad(x.to(dtype)), hidden_states=_padded(states, padding, dtype)
    )
    # the first models to drop return_dict from their encoders swallow it
    return output.to_tuple() if _returns_tuples() and wanted.get("return_dict") is False else output


def run_one_layer(
    layer: Any,
    original: Callable,
    hidden_states: Tensor,
    *args: Any,
    sequences: Sequences | None = None,
    padding: Unpadding | None = None,
    **kwargs: Any,
) -> Any:
    """The forward of a layer: its own, unless the packed path calls it with `sequences`.

    hidden_states: (T, H), or with padding (B, S, H), as whoever hooked the layer expects to see it.
    """
    if sequences is None:
        return original(hidden_states, *args, **kwargs)
    parts = parts_of(layer)
    if padding is None:
        return run_layer(parts, hidden_states, sequences)
    x = padding.pack(hidden_states).to(stream_dtype(hidden_states))
    x = padding.pad(run_layer(parts, x, sequences).to(_boundary_dtype(hidden_states)))
    return (x,) if _returns_tuples() else x


def parts_of(layer: Any) -> LayerParts:
    if not runs_patched(layer):
        raise Unsupported(f"a {type(layer).__name__} that is not patched, or of the user's own")
    return _family(layer).parts(layer)


def _run(
    layers: nn.ModuleList,
    x: Tensor,
    sequences: Sequences,
    padding: Unpadding,
    states: bool | Collection[int],
    rows: Rows | None,
) -> tuple[Tensor, tuple[Tensor | None, ...] | None]:
    def call(layer: nn.Module, x: Tensor, sequences: Sequences) -> Tensor:
        if not is_observed(layer):
            return layer(x, sequences=sequences)
        padded = padding.pad(x.to(_boundary_dtype(x)))
        # what a hook sees has all rows
        output = layer(padded, sequences=sequences.only(None), padding=padding)
        y = padding.pack(output[0] if isinstance(output, tuple) else output).to(x.dtype)
        return y if sequences.rows is None else sequences.rows.of(y)

    return run_layers(layers, x, sequences, states, rows, call)


def _tell(
    module: nn.Module,
    layers: nn.ModuleList,
    padding: Unpadding,
    mask: Tensor | None,
    rows: Rows | None,
) -> None:
    if not events.is_listening():
        return
    notes = []
    if mask is not None:
        notes.append("a general mask, so padding stays")
    if rows is not None:
        notes.append(f"the last layer computes {len(rows.index)} tokens")
    observed = sum(map(is_observed, layers))
    if observed:
        notes.append(f"{observed} layers have hooks and see (batch, seqlen, hidden)")
    places = padding.batch_shape[0] * padding.batch_shape[1]
    events.packed(module, padding.num_tokens, places, "; ".join(notes))


def _require_encoder(config: Any, layers: nn.ModuleList, arguments: dict[str, Any]) -> None:
    """Raises Unsupported unless the packed path computes what is asked of these layers."""
    if getattr(config, "is_decoder", False):
        raise Unsupported("a decoder: it attends to earlier tokens only")
    attentions = arguments.get("output_attentions")
    if config.output_attentions if attentions is None else attentions:
        raise Unsupported("output_attentions: the fused attention never forms the probabilities")
    for name, value in arguments.items():
        is_none = value is None or value is False or _all_none(value)
        if name in _IGNORED or name.startswith("output_") or is_none:
            continue
        raise Unsupported(f"the argument {name}")
    attention = getattr(config, "_attn_implementation", None) or "eager"
    if not attention.startswith(_BUILT_IN_ATTENTION):
        raise Unsupported(f"attn_implementation={attention!r}, an attention of the user's own")
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        raise Unsupported("tracing or export, which would fix the lengths of this batch")
    for layer in layers:
        parts_of(layer)


def _all_none(value: Any) -> bool:
    """4.57 expands a head_mask of None to a list of them."""
    return isinstance(value, (list, tuple)) and all(one is None for one in value)


def _padding(
    given: Tensor,
    batch: int,
    seqlen: int,
    attention_mask: Tensor | None,
    **packed: Any,
) -> tuple[Unpadding, Tensor | None]:
    """How the batch packs, and the mask that attention needs beside that."""
    if given.is_meta:
        raise Unsupported("the meta device: a batch is packed by the values of its mask")
    documents = document_boundaries(batch, seqlen, attention_mask, **packed)
    if documents is not None:
        return Unpadding.documents(*documents, seqlen), None
    mask, general = read_mask(attention_mask, batch, seqlen)
    if mask is None:
        return Unpadding.dense(batch, seqlen, given.device), general
    return unpad(mask.to(given.device)), None


def _positions(
    model: Any,
    family: Family,
    padding: Unpadding,
    input_ids: Tensor | None,
    shape: tuple[int, int],
    device: torch.device,
) -> Tensor:
    """(1 or B, S): each token's column, or RoBERTa's count of the tokens that are not padding."""
    table = model.embeddings.position_embeddings
    first = 0
    if family.counts_positions:
        first = model.embeddings.padding_idx + 1
        if input_ids is not None:
            is_token = input_ids != first - 1
            return is_token.cumsum(1) * is_token + first - 1
    rows = getattr(table, "num_embeddings", None)
    require(
        rows is None or shape[1] + first <= rows,
        type(model).__name__,
        f"at most {rows - first if rows else 0} tokens a sequence, as many as it has positions for",
        shape[1],
        "truncate them",
    )
    return torch.arange(first, shape[1] + first, device=device)[None]


def _states_wanted(module: Any, arguments: dict[str, Any]) -> bool | Collection[int]:
    wanted = arguments.get("output_hidden_states")
    if wanted is None:
        wanted = module.config.output_hidden_states
    is_choice = isinstance(wanted, (list, tuple, set)) and not _returns_tuples()
    return wanted if is_choice else bool(wanted)


def _model_output(model: Any, encoded: Encoded, return_dict: bool | None) -> Any:
    family = _family(model)
    padding, x, dtype = encoded.padding, encoded.x, encoded.dtype
    fields: dict[str, Any] = {"last_hidden_state": padding.pad(x.to(dtype))}
    pooler = getattr(model, "pooler", None)
    if pooler is not None:
        # a pooler reads the first column: that of these rows is the first real token
        fields["pooler_output"] = pooler(first_tokens(x, padding.cu_seqlens).to(dtype)[:, None])
    fields["hidden_states"] = _padded(encoded.states, padding, dtype)
    output = output_class(family.output)(**fields)
    if return_dict is None:
        return_dict = model.config.return_dict
    return output if return_dict else output.to_tuple()


def _padded(
    states: tuple[Tensor | None, ...] | None, padding: Unpadding, dtype: torch.dtype
) -> tuple[Tensor | None, ...] | None:
    if states is None:
        return None
    return tuple(None if x is None else padding.pad(x.to(dtype)) for x in states)


def _boundary_dtype(x: Tensor) -> torch.dtype:
    """Of hidden states as Hugging Face gives them: autocast runs its LayerNorm in float32."""
    is_narrow = x.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if is_narrow and torch.is_autocast_enabled(x.device.type) else x.dtype


def _is_foreign(module: nn.Module) -> bool:
    return not type(module).__module__.startswith("transformers.models.")


def _family(module: nn.Module) -> Family:
    family = family_of(patched_base(module))
    assert family is not None
    return family


def output_class(name: str) -> Callable:
    import transformers.modeling_outputs

    return getattr(transformers.modeling_outputs, name)


def _returns_tuples() -> bool:
    """Whether layers and encoders of this transformers may return tuples, as 4.57's do."""
    import transformers

    return int(transformers.__version__.partition(".")[0]) < 5
