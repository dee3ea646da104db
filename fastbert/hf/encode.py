"""The packed path through a patched Hugging Face model: the forwards that replace its own.

Each function takes the module, its own forward `original`, and the arguments of the call by name.
Calls that the packed path does not support go to `original`; the exception `Unsupported` has the
reason, which `fastbert.explain` shows.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from fastbert import events
from fastbert.hf.embeddings import embedded
from fastbert.hf.families import (
    Forward,
    Unsupported,
    keeps_padding,
    patched_base,
    runs_patched,
)
from fastbert.hf.hooks import is_hooked, is_theirs
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
from fastbert.models.heads import first_tokens
from fastbert.modules.embeddings import own_dtype, stream_dtype
from fastbert.modules.encoder import pad_states
from fastbert.modules.graphs.buckets import may_replay
from fastbert.modules.linear import PRODUCTS
from fastbert.modules.request import DOCUMENTS, asked, read_layout
from fastbert.modules.sequences import Rows, Sequences
from fastbert.ops.embedding import Call as Embedding
from fastbert.ops.unpad import Unpadding
from fastbert.rng import DropoutState, for_batch


@dataclasses.dataclass
class Encoded:
    """x: (T, H), or (M, H) if only `rows` were computed; states: (T, H) each, if wanted; dtype:
    that of the hidden states which Hugging Face would return."""

    x: Tensor
    states: tuple[Tensor | None, ...] | None
    padding: Unpadding
    rows: Rows | None
    dtype: torch.dtype


# The residual stream (T, H), or the call that makes it, and its dtype without autocast.
Embedded = tuple[Tensor | Embedding, torch.dtype]

# The head whose own forward calls its bare model now; for each thread.
_HEAD: ContextVar[Any] = ContextVar("head", default=None)


def called_by(head: Any, forward: Forward) -> Forward:
    """`forward`, inside of which the bare model of `head` may return its first tokens alone.

    These are (B, 1, H), where nobody can see the others. Not for a trace of torch.compile, which
    cannot read a context variable.
    """

    def call(**arguments: Any) -> Any:
        token = _HEAD.set(head)
        try:
            return forward(**arguments)
        finally:
            _HEAD.reset(token)

    return call


def run_model(model: Any, original: Forward, arguments: dict[str, Any]) -> Any:
    """The patched forward of a bare model: `BertModel`, `RobertaModel`, ..."""
    encoded = rows = None
    try:
        head = None if torch.compiler.is_compiling() else _HEAD.get()
        if head is not None and head.base_model is model:
            rows = functools.partial(_first_rows, head)
        encoded = encode(model, arguments, rows)
    except Unsupported as reason:
        events.refused(model, reason)
    if encoded is None:  # outside `except`, so that errors do not show Unsupported as their context
        return original(**arguments)
    return _model_output(model, encoded, arguments)


def _first_rows(head: Any, padding: Unpadding, hidden_size: int) -> Rows | None:
    """Each sequence's first token, where `head` reads no others and that saves time."""
    if not _is_by_row(padding) or not Rows.first_pay(padding, hidden_size):
        return None
    return Rows.read_by_losses(padding, first=True) if reads_first_tokens(head) else None


def _is_by_row(padding: Unpadding) -> bool:
    """Whether each row is a sequence; documents share a row."""
    return padding.cu_seqlens.shape[0] - 1 == padding.batch_shape[0]


def reads_first_tokens(model: Any) -> bool:
    """Whether the model's forward reads each sequence's first token alone of its bare model's."""
    name, base = patched_base(model).__name__, model.base_model
    is_watched = is_hooked(base) or torch.nn.modules.module._has_any_global_hook()
    if is_watched or not runs_patched(base):
        return False
    pooler = getattr(base, "pooler", None)
    if not name.endswith(_POOLED) or not (pooler is None or is_plain_pooler(pooler)):
        return False
    if name.startswith(("Bert", "DistilBert")):  # a pooler's output, or the first column
        return True
    if name.endswith("ForMultipleChoice"):  # ELECTRA's, without a pooler, may summarize all tokens
        return pooler is not None
    return is_theirs(model.classifier) and not is_hooked(model.classifier)  # which gets all tokens


_POOLED = "ForSequenceClassification", "ForMultipleChoice", "ForNextSentencePrediction"


def encode(
    model: Any,
    arguments: dict[str, Any],
    rows: Callable[[Unpadding, int], Rows | None] | None = None,
) -> Encoded:
    """Packs, embeds and runs the layers; raises Unsupported for calls that need Hugging Face's.

    rows: (Unpadding, H) -> Rows, the only tokens that the last layer has to compute, None for all.
    """
    arguments = dict(arguments)
    input_ids = arguments.pop("input_ids", None)
    inputs_embeds = arguments.pop("inputs_embeds", None)
    token_type_ids = arguments.pop("token_type_ids", None)
    mask, position_ids = arguments.get("attention_mask"), arguments.get("position_ids")
    given = input_ids if inputs_embeds is None else inputs_embeds
    if given is None or (input_ids is not None and inputs_embeds is not None) or given.ndim < 2:
        raise Unsupported("input that Hugging Face refuses")
    if mask is not None and mask.ndim not in (2, 4):
        raise Unsupported(f"an attention_mask of {mask.ndim} dimensions")
    encoder = getattr(model, family_of_module(model).stack)
    if is_hooked(encoder) or not is_theirs(encoder):
        raise Unsupported(f"a {type(encoder).__name__} of the user's own, or a hook on it")

    def embed(padding: Unpadding, rng: DropoutState | None, defers: bool) -> Embedded:
        ids = position_ids, token_type_ids
        x = embedded(model, padding, rng, input_ids, inputs_embeds, *ids, defers=defers)
        return x, own_dtype(model.embeddings)

    modules = (model, model.embeddings, *encoder.layer)
    return _run(model, encoder.layer, modules, given, arguments, embed, rows)


def run_encoder(encoder: Any, original: Forward, arguments: dict[str, Any]) -> Any:
    """The patched forward of an encoder, which users' own models call directly."""
    wanted = dict(arguments)
    hidden_states = wanted.pop("hidden_states")

    def embed(padding: Unpadding, rng: DropoutState | None, defers: bool) -> Embedded:
        own = hidden_states.dtype
        x = padding.pack(hidden_states)
        return x.to(stream_dtype(own, x.device, encoder)), own

    encoded = None
    try:
        layers = encoder.layer
        encoded = _run(encoder, layers, layers, hidden_states, wanted, embed)
    except Unsupported as reason:
        events.refused(encoder, reason)
    if encoded is None:
        return original(**arguments)
    padding, dtype = encoded.padding, encoded.dtype
    output = of_transformers("modeling_outputs").BaseModelOutputWithPastAndCrossAttentions(
        last_hidden_state=padding.pad(encoded.x.to(dtype)),
        hidden_states=pad_states(encoded.states, padding, dtype),
    )
    # the encoders of transformers 5 accept return_dict and ignore it
    return output.to_tuple() if returns_tuples() and wanted.get("return_dict") is False else output


def _run(
    module: Any,
    layers: nn.ModuleList,
    with_dropout: Iterable[nn.Module],
    given: Tensor,
    arguments: dict[str, Any],
    embed: Callable[[Unpadding, DropoutState | None, bool], Embedded],
    rows: Callable[[Unpadding, int], Rows | None] | None = None,
) -> Encoded:
    """Packs, embeds and runs the layers of a model or an encoder, or raises Unsupported.

    with_dropout: the modules that need a dropout state in training mode; given: (B, S, ...);
    arguments: the call's others; embed: makes the residual stream (T, H), or if its last argument
    says so may return the call that makes it, and the dtype that Hugging Face's has without
    autocast; rows: see `encode`.
    """
    mask, positions = arguments.pop("attention_mask", None), arguments.pop("position_ids", None)
    packed = {name: arguments.pop(name, None) for name in DOCUMENTS}
    trains = any(one.training for one in with_dropout)
    assumes = not trains and may_replay(given.device)
    reading = require_encoder(module.config, layers, arguments, assumes=assumes)
    if given.is_meta:
        raise Unsupported("the meta device: a batch is packed by the values of its mask")
    require_kernels(given.device)
    padding, general = read_layout(
        given, mask, positions, keeps_padding=keeps_padding(module), **packed
    )
    rng = for_batch(padding.cu_seqlens, padding.num_tokens) if trains else None
    wanted = states_wanted(module, arguments)
    defers = assumes and not wanted and PRODUCTS not in vars(layers)
    x, own = embed(padding, rng, defers)
    sequences = Sequences(padding.cu_seqlens, padding.max_seqlen, general, rng)
    chosen = rows(padding, x.shape[1]) if rows is not None and not wanted else None
    x, states = run_packed(module, layers, reading, x, sequences, padding, wanted, chosen)
    return Encoded(x, states, padding, chosen, boundary_dtype(own, x.device))


def _model_output(model: Any, encoded: Encoded, arguments: dict[str, Any]) -> Any:
    family = family_of_module(model)
    padding, rows, dtype = encoded.padding, encoded.rows, encoded.dtype
    x, pooler = encoded.x.to(dtype), getattr(model, "pooler", None)
    cu_seqlens = padding.cu_seqlens if rows is None else rows.cu_seqlens
    fields: dict[str, Any] = {}
    if rows is None:
        fields["last_hidden_state"] = padding.pad(x)
    else:
        fields["last_hidden_state"] = _first_column(first_tokens(x, cu_seqlens), padding)
    # a batch without padding has each sequence's first token in column 0, which poolers read
    is_dense = rows is None and padding.slots is None and _is_by_row(padding)
    if pooler is not None and not is_dense and is_plain_pooler(pooler):
        # it gets each first real token as a sequence of length 1
        fields["pooler_output"] = pooler(first_tokens(x, cu_seqlens)[:, None])
    elif pooler is not None:
        fields["pooler_output"] = pooler(fields["last_hidden_state"])
    fields["hidden_states"] = pad_states(encoded.states, padding, dtype)
    output = getattr(of_transformers("modeling_outputs"), family.output)(**fields)
    if asked(model.config, arguments, "return_dict"):
        return output
    states, *rest = output.to_tuple()
    # the heads of transformers 4.57 read hidden states from the third element of the tuple on
    leaves_a_place = returns_tuples() and pooler is None and hasattr(output, "pooler_output")
    return (states, None, *rest) if leaves_a_place else (states, *rest)


def _first_column(first: Tensor, padding: Unpadding) -> Tensor:
    """First tokens (B, H) -> (B, 1, H), the first column of the padded form: zeros at padding."""
    if padding.slots is not None:
        is_token = padding.slots.view(padding.batch_shape)[:, :1] >= 0
        first = torch.where(is_token, first, 0.0)
    return first[:, None]


def is_plain_pooler(pooler: nn.Module) -> bool:
    """Whether `pooler` is transformers' own, which reads the first token, and has no hooks."""
    return is_theirs(pooler) and not any(map(is_hooked, pooler.modules()))
