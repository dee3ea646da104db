"""The transformer encoder over packed tokens.

T packed tokens of B sequences, H hidden, N heads, D head size. Module and parameter names are
Hugging Face's; what flows between the modules is one (T, H) tensor and the sequence boundaries.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastbert.check import require
from fastbert.config import check_config
from fastbert.modules.activations import activate, activation
from fastbert.modules.embeddings import stream_dtype
from fastbert.modules.linear import fused_linear, split_bias
from fastbert.modules.masks import key_padding_mask
from fastbert.ops.attention import attention_qkvpacked
from fastbert.ops.layer_norm import Save, dropout_add_layer_norm
from fastbert.ops.unpad import Unpadding, unpad
from fastbert.outputs import BaseModelOutput
from fastbert.rng import DropoutState, for_batch

Output = TypeVar("Output", bound=Any)

# Every dropout of a model has a number of its own: the embeddings' is 0, and each layer has three.
_SITES_PER_LAYER = 3


class BertSelfAttention(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        rng: DropoutState | None = None,
    ) -> Tensor:
        """(T, H) -> (T, H)"""
        qkv = fused_linear(hidden_states, (self.query, self.key, self.value))
        context = attention_qkvpacked(
            qkv.unflatten(-1, (3, self.num_attention_heads, -1)),
            cu_seqlens,
            max_seqlen,
            dropout_p=self.dropout.p if self.training else 0.0,
            rng=rng,
        )
        return context.flatten(1)


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
        x, x_bias = split_bias(hidden_states, self.dense)
        return dropout_add_layer_norm(
            x,
            residual,
            self.LayerNorm.weight,
            self.LayerNorm.bias,
            self.LayerNorm.eps,
            x_bias=x_bias,
            dropout_p=self.dropout.p if self.training else 0.0,
            rng=rng,
            save=self.save,
        )


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

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        rng: DropoutState | None = None,
    ) -> Tensor:
        context = self.self(hidden_states, cu_seqlens, max_seqlen, rng)
        return self.output(context, hidden_states, rng and rng.at(rng.site + 1))


class BertIntermediate(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = activation(config.hidden_act)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return activate(self.intermediate_act_fn, *split_bias(hidden_states, self.dense))


class BertLayer(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config)

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        rng: DropoutState | None = None,
    ) -> Tensor:
        """(T, H) -> (T, H); the layer's three dropouts are the sites from `rng.site` on."""
        hidden_states = self.attention(hidden_states, cu_seqlens, max_seqlen, rng)
        intermediate = self.intermediate(hidden_states)
        return self.output(intermediate, hidden_states, rng and rng.at(rng.site + 2))


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
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        output_hidden_states: bool = False,
        rng: DropoutState | None = None,
    ) -> BaseModelOutput:
        """Runs the layers.

        hidden_states: (B, S, H), with attention_mask as `key_padding_mask` takes it, or packed
        (T, H), with cu_seqlens (B + 1,) int32 and max_seqlen. The output has the input's form;
        pad positions hold zeros. hidden_states of the output, if asked for, has the input and the
        output of each layer. rng: with packed hidden_states, what dropout draws from; by default a
        fresh state of torch's generator, which numbers the sequences as they come.
        """
        if hidden_states.ndim == 3:
            batch, seqlen, _ = hidden_states.shape
            mask = key_padding_mask(attention_mask, batch, seqlen)
            if mask is None:
                padding = Unpadding.dense(batch, seqlen, hidden_states.device)
            else:
                padding = unpad(mask)
            packed = self(
                padding.pack(hidden_states).to(stream_dtype(hidden_states)),
                cu_seqlens=padding.cu_seqlens,
                max_seqlen=padding.max_seqlen,
                output_hidden_states=output_hidden_states,
            )
            return pad_output(packed, padding, hidden_states.dtype)

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
        assert cu_seqlens is not None
        if rng is None and self.training:
            rng = for_batch(cu_seqlens, hidden_states.shape[0])
        states = [hidden_states]
        for number, layer in enumerate(self.layer):
            site = 1 + _SITES_PER_LAYER * number
            hidden_states = layer(hidden_states, cu_seqlens, max_seqlen, rng and rng.at(site))
            if output_hidden_states:
                states.append(hidden_states)
        return BaseModelOutput(
            last_hidden_state=hidden_states,
            hidden_states=tuple(states) if output_hidden_states else None,
        )


def pad_output(output: Output, padding: Unpadding, dtype: torch.dtype) -> Output:
    """The padded form of an output whose token tensors are packed: (T, ...) -> (B, S, ...).

    Hidden states come back in `dtype`, as Hugging Face's do, which autocast keeps in float32;
    logits stay in the precision they were computed in.
    """

    def padded(hidden_states: Tensor) -> Tensor:
        return padding.pad(hidden_states.to(dtype))

    if output.hidden_states is not None:
        output.hidden_states = tuple(map(padded, output.hidden_states))
    if output.get("last_hidden_state") is not None:
        output.last_hidden_state = padded(output.last_hidden_state)
    for name in output.keys() & {"logits", "prediction_logits"}:
        output[name] = padding.pad(output[name])
    return output
