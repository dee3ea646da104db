"""BERT's layer as modules under Hugging Face's names, and the parts that `run_layer` reads.

T packed tokens, M rows whose output is wanted, H hidden. The modules pass each other one (T, H)
tensor and its `Sequences`.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastbert.check import require
from fastbert.modules.activations import Activation, activation, dense_and_activate
from fastbert.modules.adapters import read_leaf
from fastbert.modules.layer import End, LayerParts, project_and_norm, self_attention
from fastbert.modules.linear import (
    Leaf,
    dropout_p_of,
    is_plain,
    is_plain_dropout,
    module_of_hook,
)
from fastbert.modules.sequences import Sequences
from fastbert.modules.users import Packed, in_rows, read_rows, takes_tokens
from fastbert.ops.layer_norm import Save
from fastbert.rng import DropoutState


class BertSelfAttention(nn.Module):
    """Self-attention without its output projection."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.attention_head_size = config.hidden_size // config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(
        self,
        hidden_states: Tensor,
        wanted: Tensor | None = None,
        sequences: Sequences | None = None,
        *,
        packed: Packed | None = None,
        **kwargs: Any,
    ) -> Any:
        """(T, H), and the wanted rows (M, H) of them -> (M, H).

        A call like Hugging Face's, with a mask as second argument, gives (B, S, H) in a tuple.
        """
        if sequences is None or wanted is None:
            mask = kwargs.pop("attention_mask", wanted)
            padding, sequences = read_rows(self, hidden_states, mask, packed, kwargs)
            x = padding.pack(hidden_states)
            return padding.pad(self._run(x, x, sequences)), None
        return self._run(hidden_states, wanted, sequences)

    def _run(self, hidden_states: Tensor, wanted: Tensor, sequences: Sequences) -> Tensor:
        return self_attention(
            hidden_states,
            wanted,
            (Leaf(self.query), Leaf(self.key), Leaf(self.value)),
            self.attention_head_size,
            dropout_p_of(self.dropout, self),
            sequences,
        )


class _ProjectAndNorm(nn.Module):
    """`LayerNorm(residual + dropout(dense(x)))`: the end of each half of a layer.

    save: what `dropout_add_layer_norm` saves for its backward, set on an instance, or on this class
    for all instances. "y" saves memory, and suits LayerNorm weights that are not near 0.
    """

    save: Save = "z"

    def __init__(self, in_features: int, config: Any) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, hidden_states: Tensor, residual: Tensor, rng: DropoutState | None = None
    ) -> Tensor:
        if not is_plain_dropout(self.dropout):  # it gets packed tokens, as hooks in a layer do
            x = self.dropout(self.dense(hidden_states))
            return self.LayerNorm(residual + x).to(residual.dtype)
        norm = Leaf(self.LayerNorm, nn.LayerNorm)
        end = End(Leaf(self.dense), dropout_p_of(self.dropout), norm, self.save)
        return project_and_norm(hidden_states, residual, end, rng).residual


class BertSelfOutput(_ProjectAndNorm):
    """The output projection of attention, dropout, residual sum and LayerNorm."""

    def __init__(self, config: Any) -> None:
        super().__init__(config.hidden_size, config)


class BertOutput(_ProjectAndNorm):
    """The second linear layer of the feed-forward, dropout, residual sum and LayerNorm."""

    def __init__(self, config: Any) -> None:
        super().__init__(config.intermediate_size, config)


class BertAttention(nn.Module):
    """The attention half of a layer."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertSelfOutput(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Sequences | Tensor | None = None,
        *,
        packed: Packed | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in `BertLayer`, except that (B, S, H) is returned in a tuple, as by Hugging Face's."""
        if isinstance(attention_mask, Sequences):
            return self._run(hidden_states, attention_mask)
        padding, sequences = read_rows(self, hidden_states, attention_mask, packed, kwargs)
        return padding.pad(self._run(padding.pack(hidden_states), sequences)), None

    def _run(self, x: Tensor, sequences: Sequences) -> Tensor:
        wanted = sequences.wanted(x)
        if takes_tokens(self.self, BertSelfAttention):
            context = self.self(x, wanted, sequences)
        else:
            context = in_rows(self.self, x, sequences, names_mask=True)
        return self.output(context, wanted, sequences.wanted_rng(1))


class BertIntermediate(nn.Module):
    """The first linear layer of the feed-forward and the activation."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = activation(config.hidden_act)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(T, H) -> (T, I)."""
        return dense_and_activate(hidden_states, Leaf(self.dense), self.intermediate_act_fn)


class BertLayer(nn.Module):
    """A layer of BERT (Devlin et al. 2018): attention and feed-forward, each followed by a norm."""

    # `gradient_checkpointing_enable`, fastbert's and Hugging Face's, sets both on each layer
    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Any] = staticmethod(checkpoint)

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Sequences | Tensor | None = None,
        *,
        packed: Packed | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """(T, H) -> (T, H) or (M, H); the three dropouts use three sites from rng.site on.

        attention_mask: the `Sequences` of packed tokens. In a call like Hugging Face's, (B, S, H)
        -> (B, S, H), it is a mask as in `read_mask`; packed: how these hidden states are packed, if
        that is known. Raises ValueError for other arguments that have an effect.
        """
        if isinstance(attention_mask, Sequences):
            return self._run(hidden_states, attention_mask)
        padding, sequences = read_rows(self, hidden_states, attention_mask, packed, kwargs)
        run = self._run
        # the caller is a user or a module around the layer, so no encoder has checkpointed it
        if packed is None and self.gradient_checkpointing and self.training:
            run = functools.partial(self._gradient_checkpointing_func, run)
        return padding.pad(run(padding.pack(hidden_states), sequences))

    def _run(self, x: Tensor, sequences: Sequences) -> Tensor:
        attention = self.attention
        if takes_tokens(attention, BertAttention):
            x = attention(x, sequences)
        else:
            x = in_rows(attention, x, sequences)
        return self.output(self.intermediate(x), x, sequences.wanted_rng(2))


def parts_of(layer: Any) -> LayerParts | None:
    """The parts of a layer; None if a module or forward in it was replaced or has a hook.

    Such a layer is called as a module.
    """
    is_own = all(kind.forward is forward for kind, forward in _FORWARDS.items())
    if type(layer) is not BertLayer or not is_own:
        return None
    attention = layer.attention
    if not is_plain(attention, BertAttention):
        return None
    this, ends = attention.self, (attention.output, layer.output)
    if not all(map(is_plain, (this, *ends, layer.intermediate), _KINDS[2:])):
        return None
    if not all(is_plain_dropout(end.dropout) for end in ends):
        return None
    attention_dropout = dropout_p_of(this.dropout, this)
    return read_parts(layer, attention_dropout, _leaf, dropout_p_of, lambda function: function)


def _leaf(module: Any, kind: type[nn.Module] = nn.Linear) -> Leaf:
    """`read_leaf`; raises ValueError for Opacus's hooks, which would take tokens for samples."""
    kinds = map(module_of_hook, module._forward_hooks.values())
    require(
        not any(kind.startswith("opacus.") for kind in kinds),
        "Opacus",
        "a Hugging Face model, patched by fastbert.patch or not",
        "layers of fastbert's own, in which it would take each packed token for a sample",
    )
    return read_leaf(module, kind)


def read_parts(
    layer: Any,
    attention_dropout: float,
    leaf: Callable[..., Leaf],
    dropout: Callable[[nn.Module], float],
    function: Callable[[Activation], Activation],
) -> LayerParts:
    """The parts of a layer with BERT's module names, Hugging Face's or fastbert's.

    leaf(module, class): reads a linear layer or norm; dropout: the probability of a dropout after a
    linear layer; function: reads the activation.
    """
    attention, this = layer.attention, layer.attention.self

    def end(output: Any) -> End:
        norm = leaf(output.LayerNorm, nn.LayerNorm)
        p = dropout(output.dropout)
        return End(leaf(output.dense), p, norm, getattr(output, "save", "z"))

    return LayerParts(
        projections=(leaf(this.query), leaf(this.key), leaf(this.value)),
        head_dim=this.attention_head_size,
        attention_dropout=attention_dropout,
        attention_end=end(attention.output),
        intermediate=leaf(layer.intermediate.dense),
        activation=function(layer.intermediate.intermediate_act_fn),
        output=end(layer.output),
    )


# The forwards of a layer and of its modules, in the order in which `parts_of` checks these.
_KINDS = (BertLayer, BertAttention, BertSelfAttention, BertSelfOutput, BertOutput, BertIntermediate)
_FORWARDS = {kind: kind.forward for kind in _KINDS}
