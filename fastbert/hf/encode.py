"""The packed path through a patched Hugging Face model: the forwards that replace its own.

Each function takes the module, its own forward `original`, and the arguments of the call by name.
Calls that the packed path does not support go to `original`; the exception `Unsupported` has the
reason, which `fastbert.explain` shows.
"""

from typing import Any

from torch import Tensor

from fastbert import events
from fastbert.hf.embeddings import embedded, padded_batch, require_embeddings
from fastbert.hf.families import Forward, Unsupported, keeps_padding
from fastbert.hf.first_tokens import (
    first_column,
    first_rows,
    is_plain_pooler,
    present_head,
    reads_pooler,
)
from fastbert.hf.hooks import has_their, is_hooked, is_theirs
from fastbert.hf.stack import (
    PackedCall,
    States,
    family_of_module,
    layers_inside,
    of_transformers,
    returns_tuples,
)
from fastbert.modules.embeddings import own_dtype, stream_dtype
from fastbert.modules.graphs.buckets import may_compute
from fastbert.modules.graphs.call import PaddedBatch
from fastbert.modules.request import DOCUMENTS, call_or_config, capturing_nothing
from fastbert.modules.sequences import Rows, first_tokens
from fastbert.modules.stack import replay_padded
from fastbert.ops.unpad import Unpadding
from fastbert.rng import DropoutState


def run_model(model: Any, original: Forward, arguments: dict[str, Any]) -> Any:
    """The patched forward of a bare model: `BertModel`, `RobertaModel`, ..."""
    found = None
    try:
        with capturing_nothing():  # hidden states come from the packed path itself
            found = _run(model, arguments)
    except Unsupported as reason:
        events.refused(model, reason)
    if found is None:  # outside `except`, so that errors do not show Unsupported as their context
        return original(**arguments)
    return _model_output(model, arguments, *found)


def _run(model: Any, arguments: dict[str, Any]) -> tuple[Tensor, Tensor | None, States]:
    """The last hidden state (B, S, H), or its first column alone; first tokens (B, H); states.

    They come from a graph that packs and pads, or from `PackedCall.run`. The first tokens are None
    if column 0 has them, or if no pooler of transformers' own reads them. Raises Unsupported as
    `read_call` does.
    """
    call, pooler = read_call(model, arguments), getattr(model, "pooler", None)
    head = None if call.wanted else present_head(model)  # hidden states show all tokens
    batch = _for_a_graph(model, call, arguments, has_head=head is not None)
    if batch is not None:
        outputs = replay_padded(call.reading, batch)
        if outputs is not None:
            last, first = (output.to(call.dtype) for output in outputs)
            return last, first if is_plain_pooler(pooler) else None, None
    padding, mask = call.read()
    rows = first_rows(head, padding, model.config.hidden_size)
    x, states = call.run(padding, mask, rows)
    x = x.to(call.dtype)
    if rows is not None:
        first = first_tokens(x, rows.cu_seqlens)
        return first_column(first, padding), first, states
    # a batch without padding has each sequence's first token in column 0
    if padding.seqlen or not is_plain_pooler(pooler):
        return call.last(x, padding, states), None, states
    if reads_pooler(head, padding):
        leading = first_tokens(x, padding.cu_seqlens)
        return leading[:, None], leading, states
    last = call.last(x, padding, states)
    if last.requires_grad:  # so the pooler's gradient reaches the caller's state
        x = padding.pack(last)
    return last, first_tokens(x, padding.cu_seqlens), states


def _for_a_graph(
    model: Any, call: PackedCall, arguments: dict[str, Any], *, has_head: bool
) -> PaddedBatch | None:
    """The batch for a graph that packs, embeds and pads it; None if no graph should do so."""
    if call.wanted or keeps_padding(model):
        return None
    if any(arguments.get(name) is not None for name in ("inputs_embeds", *DOCUMENTS)):
        return None
    places = call.given.shape[:2].numel()
    if has_head and Rows.pay(places, model.config.hidden_size, call.given.device):
        return None  # the last layer may compute first tokens alone
    if not may_compute(call.reading):
        return None
    return padded_batch(
        model,
        *map(arguments.get, ("input_ids", "attention_mask", "token_type_ids", "position_ids")),
    )


def read_call(model: Any, arguments: dict[str, Any]) -> PackedCall:
    """Reads the arguments of a bare model; raises Unsupported if Hugging Face's forward must run.

    The call's `run` may raise it, too.
    """
    arguments = dict(arguments)
    input_ids = arguments.pop("input_ids", None)
    inputs_embeds = arguments.pop("inputs_embeds", None)
    token_type_ids = arguments.pop("token_type_ids", None)
    mask, position_ids = arguments.get("attention_mask"), arguments.get("position_ids")
    given, ndim = (input_ids, 2) if inputs_embeds is None else (inputs_embeds, 3)
    is_one = (input_ids is None) != (inputs_embeds is None)
    if not (is_one and isinstance(given, Tensor) and given.ndim == ndim):
        raise Unsupported("input that Hugging Face refuses")
    if isinstance(mask, Tensor) and mask.ndim not in (2, 4):
        raise Unsupported(f"an attention_mask of {mask.ndim} dimensions")
    if any(name in vars(model) or not has_their(model, name) for name in _MASKS):
        raise Unsupported("masks of the user's own making")
    require_embeddings(model.embeddings, given.device)
    encoder = getattr(model, family_of_module(model).stack)
    if is_hooked(encoder) or not is_theirs(encoder):
        raise Unsupported(f"a {type(encoder).__name__} of the user's own, or a hook on it")

    def embed(padding: Unpadding, rng: DropoutState | None) -> Tensor:
        ids = position_ids, token_type_ids
        return embedded(model, padding, rng, input_ids, inputs_embeds, *ids)

    layers, own = layers_inside(encoder), own_dtype(model.embeddings)
    return PackedCall.of(model, layers, given, arguments, embed, own)


def run_encoder(encoder: Any, original: Forward, arguments: dict[str, Any]) -> Any:
    """The patched forward of an encoder, which users' own models call directly."""
    wanted = dict(arguments)
    given = wanted.pop("hidden_states")

    def embed(padding: Unpadding, rng: DropoutState | None) -> Tensor:
        return padding.pack(given).to(stream_dtype(given.dtype, given.device, encoder))

    last = None
    try:
        layers = layers_inside(encoder)
        call = PackedCall.of(encoder, layers, given, wanted, embed, given.dtype)
        padding, mask = call.read()
        x, states = call.run(padding, mask)
        last = call.last(x, padding, states)
    except Unsupported as reason:
        events.refused(encoder, reason)
    if last is None:
        return original(**arguments)
    output = of_transformers("modeling_outputs").BaseModelOutputWithPastAndCrossAttentions(
        last_hidden_state=last, hidden_states=states
    )
    # the encoders of transformers 5 accept return_dict and ignore it
    return output.to_tuple() if returns_tuples() and wanted.get("return_dict") is False else output


_MASKS = "_create_attention_masks", "get_extended_attention_mask"  # methods, of 5.x and of 4.57


def _model_output(
    model: Any, arguments: dict[str, Any], last: Tensor, first: Tensor | None, states: States
) -> Any:
    family, pooler = family_of_module(model), getattr(model, "pooler", None)
    fields: dict[str, Any] = {"last_hidden_state": last}
    if pooler is not None:
        # it gets each first real token as a sequence of length 1
        fields["pooler_output"] = pooler(last if first is None else first[:, None])
    fields["hidden_states"] = states
    output = getattr(of_transformers("modeling_outputs"), family.output)(**fields)
    if call_or_config(model.config, arguments, "return_dict"):
        return output
    last, *rest = output.to_tuple()
    # the heads of transformers 4.57 read hidden states from the third element of the tuple on
    leaves_a_place = returns_tuples() and pooler is None and hasattr(output, "pooler_output")
    return (last, None, *rest) if leaves_a_place else (last, *rest)
