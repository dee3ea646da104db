"""The packed path through a patched Hugging Face model: the forwards that replace its own.

Each function takes the module, its own forward `original`, and the arguments of the call by name.
Calls that the packed path does not support go to `original`; the exception `Unsupported` has the
reason, which `fastbert.explain` shows.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from fastbert import events
from fastbert.backend import is_transformed
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
    boundary_dtype,
    family_of_module,
    of_transformers,
    require_encoder,
    require_kernels,
    returns_tuples,
    run_packed,
    states_wanted,
)
from fastbert.modules.embeddings import own_dtype, stream_dtype
from fastbert.modules.graphs.buckets import may_replay, refusal_of
from fastbert.modules.graphs.padded import PaddedBatch
from fastbert.modules.linear import PRODUCTS
from fastbert.modules.plan import Reading
from fastbert.modules.request import DOCUMENTS, asked, read_layout
from fastbert.modules.sequences import Rows, Sequences, first_tokens
from fastbert.modules.stack import replay_padded
from fastbert.ops.unpad import Unpadding
from fastbert.rng import DropoutState, for_batch


@dataclasses.dataclass
class Encoded:
    """x: (T, H), or (M, H) if only `rows` were computed; states: (B, S, H) each, if wanted; dtype:
    that of the hidden states which Hugging Face would return."""

    x: Tensor
    states: tuple[Tensor | None, ...] | None
    padding: Unpadding
    rows: Rows | None
    dtype: torch.dtype

    @property
    def last(self) -> Tensor:
        """The last hidden state (B, S, H)."""
        last = self.states[-1] if self.states else None
        return self.padding.pad(self.x.to(self.dtype)) if last is None else last


class Padded(NamedTuple):
    """What a bare model returns: (B, S, H), or the first column alone; and hidden states.

    first: (B, H), each sequence's first token, None where that is the one in column 0, or no pooler
    reads it
    """

    last: Tensor
    first: Tensor | None
    states: tuple[Tensor | None, ...] | None = None


Embed = Callable[[Unpadding, DropoutState | None], Tensor]  # makes the residual stream (T, H)
ChooseRows = Callable[[Unpadding, int], Rows | None]


def run_model(model: Any, original: Forward, arguments: dict[str, Any]) -> Any:
    """The patched forward of a bare model: `BertModel`, `RobertaModel`, ..."""
    padded = None
    try:
        padded = _padded(model, arguments, present_head(model))
    except Unsupported as reason:
        events.refused(model, reason)
    if padded is None:  # outside `except`, so that errors do not show Unsupported as their context
        return original(**arguments)
    return _model_output(model, padded, arguments)


def _padded(model: Any, arguments: dict[str, Any], head: Any) -> Padded:
    """The call's result, by a graph that packs and pads, or by `Call.run`.

    head: the one whose forward calls the model, or None. Raises Unsupported as `read_call` does.
    """
    call = read_call(model, arguments)
    batch = _for_a_graph(model, call, arguments, has_head=head is not None)
    if batch is not None:
        outputs = replay_padded(call.layers, call.reading, batch)
        if outputs is not None:
            last, first = (output.to(call.dtype) for output in outputs)
            return Padded(last, first)
    rows = None if head is None else functools.partial(first_rows, head)
    encoded = call.run(rows)
    x, padding = encoded.x.to(encoded.dtype), encoded.padding
    if encoded.rows is not None:
        first = first_tokens(x, encoded.rows.cu_seqlens)
        return Padded(first_column(first, padding), first)
    # a batch without padding has each sequence's first token in column 0
    is_dense = padding.slots is None and padding.is_by_row
    if is_dense or not is_plain_pooler(getattr(model, "pooler", None)):
        return Padded(encoded.last, None, encoded.states)
    if not call.wanted and reads_pooler(head, padding):
        leading = first_tokens(x, padding.cu_seqlens)
        return Padded(leading[:, None], leading)
    last = encoded.last
    if last.requires_grad:  # the pooler's gradient reaches what the caller gets
        x = padding.pack(last)
    return Padded(last, first_tokens(x, padding.cu_seqlens), encoded.states)


def _for_a_graph(
    model: Any, call: "Call", arguments: dict[str, Any], *, has_head: bool
) -> PaddedBatch | None:
    """The batch for a graph that packs, embeds and pads it; None where it had better not."""
    if call.wanted or PRODUCTS in vars(call.layers) or keeps_padding(model):
        return None
    if any(arguments.get(name) is not None for name in ("inputs_embeds", *DOCUMENTS)):
        return None
    places = call.given.shape[:2].numel()
    if has_head and Rows.pay(places, model.config.hidden_size, call.given.device):
        return None  # the last layer may compute first tokens alone
    if not call.may_replay():
        return None
    return padded_batch(
        model,
        *map(arguments.get, ("input_ids", "attention_mask", "token_type_ids", "position_ids")),
    )


def read_call(model: Any, arguments: dict[str, Any]) -> "Call":
    """Reads the arguments of a bare model; raises Unsupported for calls that need Hugging Face's.

    So may the call's `run`.
    """
    arguments = dict(arguments)
    input_ids = arguments.pop("input_ids", None)
    inputs_embeds = arguments.pop("inputs_embeds", None)
    token_type_ids = arguments.pop("token_type_ids", None)
    mask, position_ids = arguments.get("attention_mask"), arguments.get("position_ids")
    given = input_ids if inputs_embeds is None else inputs_embeds
    if given is None or (input_ids is not None and inputs_embeds is not None) or given.ndim < 2:
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

    modules, own = (model, model.embeddings, *encoder.layer), own_dtype(model.embeddings)
    return Call.of(model, encoder.layer, modules, given, arguments, embed, own)


def run_encoder(encoder: Any, original: Forward, arguments: dict[str, Any]) -> Any:
    """The patched forward of an encoder, which users' own models call directly."""
    wanted = dict(arguments)
    given, layers = wanted.pop("hidden_states"), encoder.layer

    def embed(padding: Unpadding, rng: DropoutState | None) -> Tensor:
        return padding.pack(given).to(stream_dtype(given.dtype, given.device, encoder))

    encoded = None
    try:
        encoded = Call.of(encoder, layers, layers, given, wanted, embed, given.dtype).run()
    except Unsupported as reason:
        events.refused(encoder, reason)
    if encoded is None:
        return original(**arguments)
    output = of_transformers("modeling_outputs").BaseModelOutputWithPastAndCrossAttentions(
        last_hidden_state=encoded.last, hidden_states=encoded.states
    )
    # the encoders of transformers 5 accept return_dict and ignore it
    return output.to_tuple() if returns_tuples() and wanted.get("return_dict") is False else output


class Call(NamedTuple):
    """A call of a model or an encoder that the packed path supports, before its mask is read.

    given: (B, S, ...); layout: other arguments of `read_layout`; trains: whether a module may drop;
    assumes: as in `Reading`; wanted: which hidden states; dtype: as in `Encoded`
    """

    module: Any
    layers: nn.ModuleList
    reading: Reading
    given: Tensor
    layout: dict[str, Any]
    embed: Embed
    trains: bool
    assumes: bool
    wanted: bool | Collection[int]
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        module: Any,
        layers: nn.ModuleList,
        with_dropout: Iterable[nn.Module],
        given: Tensor,
        arguments: dict[str, Any],
        embed: Embed,
        own: torch.dtype,
    ) -> "Call":
        """Reads the arguments besides the tokens; raises Unsupported.

        with_dropout: the modules that need a dropout state in training mode; own: the dtype of the
        residual stream without autocast
        """
        layout = {name: arguments.pop(name, None) for name in _LAYOUT}
        mask = layout["attention_mask"]
        if mask is not None:
            if not isinstance(mask, Tensor):
                raise Unsupported(f"a {type(mask).__name__} as attention_mask")
            if is_transformed() and torch._C._functorch.is_functorch_wrapped_tensor(mask):
                raise Unsupported("a mask inside torch.func, whose values may not be read")
        trains = any(one.training for one in with_dropout)
        assumes = not trains and may_replay(given.device)
        reading = require_encoder(module.config, layers, arguments, assumes=assumes)
        if given.is_meta or isinstance(given, FakeTensor):
            raise Unsupported("no values, as on the meta device: a batch is packed by its mask's")
        require_kernels(given.device)
        is_projected = hasattr(module, "embeddings_project")  # ELECTRA's small models
        dtype = boundary_dtype(own, given.device, is_projected=is_projected)
        wanted = states_wanted(module, arguments)
        return cls(module, layers, reading, given, layout, embed, trains, assumes, wanted, dtype)

    def may_replay(self) -> bool:
        """Whether a graph may compute the layers, in inference."""
        if not self.assumes or self.reading.called():
            return False
        return not refusal_of(self.layers, self.reading)

    def run(self, rows: ChooseRows | None = None) -> Encoded:
        """Packs, embeds and runs the layers.

        rows: (Unpadding, H) -> Rows, the only tokens that the last layer has to compute, None for
        all.
        """
        module, layers, wanted = self.module, self.layers, self.wanted
        padding, general = read_layout(
            self.given,
            **self.layout,
            hidden_size=module.config.hidden_size if self.may_replay() else None,
            keeps_padding=keeps_padding(module),
        )
        drops = self.trains and self.reading.drops()
        rng = for_batch(padding.cu_seqlens, padding.num_tokens) if drops else None
        x = self.embed(padding, rng)
        sequences = Sequences(padding.cu_seqlens, padding.max_seqlen, general, rng)
        chosen = rows(padding, x.shape[1]) if rows is not None and not wanted else None
        packed = x, sequences, padding, wanted, chosen, self.dtype
        x, states = run_packed(module, layers, self.reading, *packed)
        return Encoded(x, states, padding, chosen, self.dtype)


_LAYOUT = "attention_mask", "position_ids", *DOCUMENTS
_MASKS = "_create_attention_masks", "get_extended_attention_mask"  # methods, of 5.x and of 4.57


def _model_output(model: Any, padded: Padded, arguments: dict[str, Any]) -> Any:
    family, pooler = family_of_module(model), getattr(model, "pooler", None)
    fields: dict[str, Any] = {"last_hidden_state": padded.last}
    if pooler is not None:
        # it gets each first real token as a sequence of length 1
        first = padded.first if is_plain_pooler(pooler) else None
        fields["pooler_output"] = pooler(padded.last if first is None else first[:, None])
    fields["hidden_states"] = padded.states
    output = getattr(of_transformers("modeling_outputs"), family.output)(**fields)
    if asked(model.config, arguments, "return_dict"):
        return output
    states, *rest = output.to_tuple()
    # the heads of transformers 4.57 read hidden states from the third element of the tuple on
    leaves_a_place = returns_tuples() and pooler is None and hasattr(output, "pooler_output")
    return (states, None, *rest) if leaves_a_place else (states, *rest)
