"""The transformer encoder over packed tokens, under Hugging Face's names.

T packed tokens of B sequences, M rows whose output is wanted, H hidden.
"""

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastbert import events
from fastbert.check import require
from fastbert.config.bert import check_config
from fastbert.modules.bert_layer import BertLayer, parts_of
from fastbert.modules.embeddings import stream_dtype
from fastbert.modules.graphs.buckets import off_by, read_layers
from fastbert.modules.layer import Share, share_packed
from fastbert.modules.plan import Planner, Reading, is_plain_list
from fastbert.modules.request import (
    DOCUMENTS,
    captured_around,
    numbers_layers,
    read_layout,
    refuse_attentions,
    refuse_unknown,
)
from fastbert.modules.sequences import Rows, Sequences
from fastbert.modules.stack import run_stack, share_padded
from fastbert.modules.users import in_rows, takes_tokens
from fastbert.outputs import BaseModelOutputWithPastAndCrossAttentions
from fastbert.rng import DropoutState


class BertEncoder(nn.Module):
    """A stack of BERT layers with Hugging Face's constructor, parameter names and return value.

    `config` is a `fastbert.BertConfig` or a Hugging Face `BertConfig`, kept by reference. Padded
    input is packed once before the first layer, and padded once after the last.
    """

    def __init__(self, config: Any) -> None:
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
        output_hidden_states: Any = False,
        rng: DropoutState | None = None,
        rows: Rows | None = None,
        share: Share = share_packed,
        reading: Reading | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Runs the layers.

        hidden_states: (B, S, H), with an attention_mask as in `read_mask`; or (1, T, H) with
        Hugging Face's cu_seq_lens_q and max_length_q; or packed (T, H), with cu_seqlens (B + 1,)
        int32, max_seqlen and a mask as in `Sequences`. The output is padded or packed like the
        input; padded positions hold zeros.
        output_hidden_states: True adds the input and the output of each layer; indices among these,
        negative ones from the end, add only some, with None for the others. rng: the dropout state
        of the tokens, padding included; None draws one from torch's generator and numbers the
        sequences of the batch. Only with packed hidden_states: rows, the tokens that the last layer
        computes, so that last_hidden_state is (M, H); share, which gives the added states another
        form; reading, what the method `reading` returned for this call.
        Raises ValueError for a decoder's arguments, output_attentions, unknown arguments, and
        shapes that do not fit together.
        """
        kwargs |= {
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
            "past_key_values": past_key_values,
        }
        if hidden_states.ndim == 3:
            return self._forward_padded(
                hidden_states, attention_mask, output_hidden_states, rng, **kwargs
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
        x, states = self._run(hidden_states, sequences, output_hidden_states, rows, share, reading)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=x, hidden_states=states)

    def reading(self, device: torch.device, *, trains: bool) -> Reading:
        """Reads the layers for one call with tokens on `device`.

        trains: whether the model around them is in training mode, or a dropout state is given.
        Raises ValueError if a call might not visit all layers.
        """
        remedy = "use a Hugging Face model patched by fastbert.patch"
        kind, expected = type(self.layer).__name__, "layers in a plain nn.ModuleList"
        require(is_plain_list(self.layer), "BertEncoder", expected, kind, remedy)
        return read_layers(_PLANNER, self.layer, device, trains=trains or self.training)

    def _forward_padded(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        output_hidden_states: Any,
        rng: DropoutState | None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        documents = {name: kwargs.pop(name, None) for name in DOCUMENTS}
        refuse_unknown("BertEncoder", kwargs)
        size = None if off_by(self.layer) else hidden_states.shape[-1]
        padding, general = read_layout(
            hidden_states, attention_mask, position_ids, hidden_size=size, **documents
        )
        captured, first = _captured_around()
        wanted = captured.get("_hidden_states_layers", "hidden_states" in captured)
        if first:  # these are numbers of layers, not of states
            wanted = {number + 1 for number in wanted}
        wanted = wanted or output_hidden_states
        dtype = stream_dtype(hidden_states.dtype, hidden_states.device, self)
        stream = padding.pack(hidden_states).to(dtype)
        if rng is not None and padding.positions is not None:
            rng = rng.rows(padding.positions)
        sequences = Sequences(padding.cu_seqlens, padding.max_seqlen, general, rng)
        share = share_padded(padding, hidden_states.dtype)
        x, states = self._run(stream, sequences, wanted, None, share)
        captured.get("hidden_states", []).extend((states or ())[first:])
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=padding.pad(x.to(hidden_states.dtype)), hidden_states=states
        )

    def _run(
        self,
        x: Tensor,
        sequences: Sequences,
        wanted: Any,
        rows: Rows | None,
        share: Share,
        reading: Reading | None = None,
    ) -> tuple[Tensor, tuple[Tensor | None, ...] | None]:
        """Runs the layers over a packed residual stream (T, H); returns what `run_stack` does."""
        events.packed(self, x)
        layers = self.layer
        if reading is None:
            reading = self.reading(x.device, trains=sequences.rng is not None)

        def call(number: int, x: Tensor, sequences: Sequences) -> Tensor:
            layer = cast(BertLayer, layers[number])
            run = layer.__call__
            if not takes_tokens(layer, BertLayer):
                run = functools.partial(in_rows, layer)
            if getattr(layer, "gradient_checkpointing", False) and layer.training:
                return layer._gradient_checkpointing_func(run, x, sequences)
            return run(x, sequences)

        return run_stack(reading, x, sequences, wanted, rows, call, share)


_PLANNER = Planner(parts_of)


def _captured_around() -> tuple[dict[str, Any], int]:
    """The lists in which a Hugging Face model around this encoder collects its outputs now.

    Also the first hidden state to collect, 0 or 1. This encoder lacks the layers that transformers
    hooks to fill the lists. Raises ValueError if the model collects attentions.
    """
    collected = captured_around()
    refuse_attentions("attentions" in collected)
    return collected, int("_hidden_states_layers" in collected and numbers_layers())
