"""The transformer encoder over packed tokens.

T packed tokens of B sequences, M of which are wanted, H hidden, N heads. Module and parameter names
are Hugging Face's; what flows between the modules is one (T, H) tensor and its `Sequences`.
"""

import dataclasses
import sys
from collections.abc import Callable, Collection
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastbert import events
from fastbert.check import require
from fastbert.config import check_config
from fastbert.modules.activations import activation, dense_and_activate
from fastbert.modules.embeddings import stream_dtype
from fastbert.modules.layer import (
    LayerParts,
    Rows,
    Sequences,
    project_and_norm,
    run_layer,
    run_layers,
    self_attention,
)
from fastbert.modules.linear import Leaf, is_plain
from fastbert.modules.masks import document_boundaries, read_mask
from fastbert.modules.plan import Planner, calls_layers
from fastbert.ops.layer_norm import Save
from fastbert.ops.unpad import Unpadding, unpad
from fastbert.outputs import BaseModelOutputWithPastAndCrossAttentions
from fastbert.rng import DropoutState, for_batch

Output = TypeVar("Output", bound=Any)


class BertSelfAttention(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(self, hidden_states: Tensor, sequences: Sequences) -> Tensor:
        """(T, H) -> (T, H), or (M, H) where only some rows are wanted"""
        return self_attention(
            hidden_states,
            Leaf(self.query),
            Leaf(self.key),
            Leaf(self.value),
            self.num_attention_heads,
            self.dropout.p if self.training else 0.0,
            sequences,
        )


class _ProjectAndNorm(nn.Module):
    """`LayerNorm(residual + dropout(dense(x)))`: the end of each half of a layer.

    save: what `dropout_add_layer_norm` keeps for its backward. It may be set on an instance, or on
    this class for all; "y" saves memory, and is for weights of LayerNorm that are not near 0.
    """

    save: Save = "z"

    def __init__(self, in_features: int, config) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, hidden_states: Tensor, residual: Tensor, rng: DropoutState | None = None
    ) -> Tensor:
        dropout_p = self.dropout.p if self.training else 0.0
        dense, norm = Leaf(self.dense), Leaf(self.LayerNorm, nn.LayerNorm)
        return project_and_norm(hidden_states, residual, dense, norm, dropout_p, rng, self.save)


class BertSelfOutput(_ProjectAndNorm):
    def __init__(self, config) -> None:
        super().__init__(config.hidden_size, config)


class BertOutput(_ProjectAndNorm):
    def __init__(self, config) -> None:
        super().__init__(config.intermediate_size, config)


class BertAttention(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertSelfOutput(config)

    def forward(self, hidden_states: Tensor, sequences: Sequences) -> Tensor:
        context = self.self(hidden_states, sequences)
        return self.output(context, sequences.wanted(hidden_states), sequences.wanted_rng(1))


class BertIntermediate(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = activation(config.hidden_act)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return dense_and_activate(hidden_states, Leaf(self.dense), self.intermediate_act_fn)


class BertLayer(nn.Module):
    # `gradient_checkpointing_enable`, ours and Hugging Face's, sets both on each layer
    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable = staticmethod(checkpoint)

    def __init__(self, config) -> None:
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config)

    def forward(self, hidden_states: Tensor, sequences: Sequences) -> Tensor:
        """(T, H) -> (T, H) or (M, H); its three dropouts are the sites from `sequences`' on."""
        hidden_states = self.attention(hidden_states, sequences)
        intermediate = self.intermediate(hidden_states)
        return self.output(intermediate, hidden_states, sequences.wanted_rng(2))


class BertEncoder(nn.Module):
    """A stack of BERT layers with Hugging Face's constructor, parameter names and return value.

    `config` is a `fastbert.BertConfig` or a Hugging Face `BertConfig`, kept by reference. Padded
    input is packed once, before the first layer, and padded once, after the last.
    """

    def __init__(self, config) -> None:
        super().__init__()
        check_config(config)
        self.config = config
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        mask: Tensor | None = None,
        output_hidden_states: bool | Collection[int] = False,
        rng: DropoutState | None = None,
        rows: Rows | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Runs the layers.

        hidden_states: (B, S, H), with attention_mask as `read_mask` takes it; or (1, T, H) with
        Hugging Face's cu_seq_lens_q and max_length_q; or packed (T, H), with cu_seqlens (B + 1,)
        int32, max_seqlen and a mask as `Sequences` has it. The output has the input's form; pad
        positions hold zeros.
        output_hidden_states: True adds the input and the output of each layer; a list of layer
        numbers adds these layers' outputs, with None for the others. rng: with packed
        hidden_states, what dropout draws from; by default a fresh state of torch's generator, which
        numbers the sequences as they come. rows: with packed hidden_states, the tokens that the
        last layer computes; last_hidden_state is then (M, H).
        """
        _refuse_decoding(
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        if hidden_states.ndim == 3:
            return self._forward_padded(
                hidden_states, attention_mask, output_hidden_states, **kwargs
            )
        require(
            hidden_states.ndim == 2 and cu_seqlens is not None and max_seqlen is not None,
            "BertEncoder",
            "hidden_states (batch, seqlen, hidden), or (tokens, hidden) and cu_seqlens, max_seqlen",
            tuple(hidden_states.shape),
        )
        require(
            attention_mask is None,
            "BertEncoder",
            "no attention_mask with packed hidden_states",
            "one",
            "cu_seqlens says where the sequences end",
        )
        refuse_unknown("BertEncoder", kwargs)
        assert cu_seqlens is not None
        assert max_seqlen is not None
        sequences = Sequences(cu_seqlens, max_seqlen, mask, rng)
        return self._run(hidden_states, sequences, output_hidden_states, rows)

    def _forward_padded(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        output_hidden_states: bool | Collection[int],
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        refuse_unknown("BertEncoder", kwargs)
        batch, seqlen, _ = hidden_states.shape
        documents = document_boundaries(
            batch, seqlen, attention_mask, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k,
            position_ids,
        )  # fmt: skip
        if documents is not None:
            padding = Unpadding.documents(*documents, seqlen)
            general = None
        else:
            mask, general = read_mask(attention_mask, batch, seqlen)
            if mask is None:
                padding = Unpadding.dense(batch, seqlen, hidden_states.device)
            else:
                padding = unpad(mask)
        captured = _captured_around()
        if "hidden_states" in captured and not output_hidden_states:
            output_hidden_states = True
        own, device = hidden_states.dtype, hidden_states.device
        dtype = stream_dtype(own, device, self.config, training=self.training)
        stream = padding.pack(hidden_states).to(dtype)
        sequences = Sequences(padding.cu_seqlens, padding.max_seqlen, general)
        packed = self._run(stream, sequences, output_hidden_states)
        output = pad_output(packed, padding, hidden_states.dtype)
        captured.get("hidden_states", []).extend(output.hidden_states or ())
        return output

    def _run(
        self,
        x: Tensor,
        sequences: Sequences,
        output_hidden_states: bool | Collection[int] = False,
        rows: Rows | None = None,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """The layers over a packed (T, H) stream."""
        events.packed(self, x)
        if sequences.rng is None and self.training:
            rng = for_batch(sequences.cu_seqlens, x.shape[0])
            sequences = dataclasses.replace(sequences, rng=rng)
        layers, parts = self.layer, _PLANNER.parts(self.layer)
        is_called = calls_layers(layers)

        def call(number: int, x: Tensor, sequences: Sequences) -> Tensor:
            layer, read = cast(BertLayer, layers[number]), parts[number]
            if not is_called and read is not None:
                return run_layer(read, x, sequences)
            if layer.gradient_checkpointing and layer.training:
                return layer._gradient_checkpointing_func(layer.__call__, x, sequences)
            return layer(x, sequences)

        x, states = run_layers(len(layers), x, sequences, output_hidden_states, rows, call)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=x, hidden_states=states)


def _parts_of(layer: Any) -> LayerParts | None:
    """None where modules or their classes' forwards were replaced, or hooked: these are called."""
    is_own = all(kind.forward is forward for kind, forward in _FORWARDS.items())
    if type(layer) is not BertLayer or not is_own:
        return None
    attention, this = layer.attention, layer.attention.self
    outputs = attention.output, layer.output
    modules = (attention, this, *outputs, layer.intermediate)
    if not all(map(is_plain, modules, list(_FORWARDS)[1:])):
        return None
    dropouts = [one.dropout for one in (this, *outputs)]
    return LayerParts(
        Leaf(this.query),
        Leaf(this.key),
        Leaf(this.value),
        this.num_attention_heads,
        dropouts[0].p if this.training else 0.0,
        Leaf(attention.output.dense),
        dropouts[1].p if outputs[0].training else 0.0,
        Leaf(attention.output.LayerNorm, nn.LayerNorm),
        Leaf(layer.intermediate.dense),
        layer.intermediate.intermediate_act_fn,
        Leaf(layer.output.dense),
        dropouts[2].p if outputs[1].training else 0.0,
        Leaf(layer.output.LayerNorm, nn.LayerNorm),
        outputs[0].save,
        outputs[1].save,
    )


# Of a layer, and of its modules in the order in which `_parts_of` asks for them.
_FORWARDS = {
    kind: kind.forward
    for kind in (
        BertLayer,
        BertAttention,
        BertSelfAttention,
        BertSelfOutput,
        BertOutput,
        BertIntermediate,
    )
}
_PLANNER = Planner(_parts_of)


def _refuse_decoding(**arguments: Any) -> None:
    for name, value in arguments.items():
        require(
            value is None or value is False,
            "BertEncoder",
            f"no {name}",
            "one",
            "it encodes only; a model patched by fastbert.patch decodes as Hugging Face does",
        )


# What Hugging Face's models hand on to their encoder and a bidirectional one has no use for.
_IGNORED = {"num_items_in_batch", "seq_idx", "return_dict", "cache_position"}


def _captured_around() -> dict[str, list]:
    """What a Hugging Face model around this encoder records of its layers in this call.

    transformers 5 records by hooks on layers of its own class, which are not here.
    """
    capturing = sys.modules.get("transformers.utils.output_capturing")
    collected = capturing._active_collector.get() if capturing is not None else None
    refuse_attentions("attentions" in (collected or {}))
    return collected or {}


def refuse_unknown(who: str, kwargs: dict[str, Any]) -> None:
    for name, value in kwargs.items():
        if isinstance(value, (list, tuple)) and all(one is None for one in value):
            continue  # a head_mask of None, as transformers 4.57 hands it on
        if name in _IGNORED or value is None or value is False:
            continue
        refuse_attentions(name == "output_attentions")
        require(
            False,
            who,
            "only arguments that an encoder has a use for",
            name,
            "leave it out, or use a model patched by fastbert.patch",
        )


def refuse_attentions(output_attentions: bool) -> None:
    require(
        not output_attentions,
        "output_attentions",
        "False",
        True,
        "the fused attention never forms the probabilities; a model patched by fastbert.patch "
        "takes Hugging Face's path for such a call",
    )


def pad_output(output: Output, padding: Unpadding, dtype: torch.dtype) -> Output:
    """The padded form of an output whose hidden states are packed: (T, H) -> (B, S, H).

    They come back in `dtype`, as Hugging Face's do, which autocast keeps in float32.
    """

    def padded(hidden_states: Tensor) -> Tensor:
        return padding.pad(hidden_states.to(dtype))

    if output.hidden_states is not None:
        output.hidden_states = tuple(
            None if state is None else padded(state) for state in output.hidden_states
        )
    if output.get("last_hidden_state") is not None:
        output.last_hidden_state = padded(output.last_hidden_state)
    return output
