"""The Hugging Face models whose layers have BERT's shape, and where each keeps its parts.

A family is one `modeling_*.py` of transformers. It is recognized by the module name of a class, so
that this file need not import transformers. transformers 4.57 and 5.x differ in signatures and
masks, not in what these modules compute.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.hf.hooks import PATCHED, THEIRS, has_their, is_hooked, is_theirs, works_by_token
from fastbert.modules.activations import GELU_TANH, Activation, dense_and_activate
from fastbert.modules.adapters import read_leaf
from fastbert.modules.bert_layer import read_parts
from fastbert.modules.embeddings import normalized
from fastbert.modules.layer import End, LayerParts
from fastbert.modules.linear import Leaf, dropout_p_of, is_defined_in, is_plain_dropout
from fastbert.rng import keeps_some

Forward = Callable[..., Any]  # of one of transformers' modules, or its replacement


class Unsupported(Exception):
    """The packed path does not support a module or a call; the message says why."""


class MaskedHead(NamedTuple):
    """A masked-LM head: `transform`, (C, H) -> (C, E), and `decoder`, to logits."""

    transform: Callable[[Tensor], Tensor]
    decoder: nn.Module


def _require_untouched(*modules: nn.Module) -> None:
    """Raises Unsupported unless the modules are transformers' own and without hooks.

    The packed path calls the modules inside them, and skips their own forward.
    """
    for module in modules:
        if not is_theirs(module):
            raise Unsupported(f"a {type(module).__name__} of another library or the user's own")
        if is_hooked(module):
            raise Unsupported(f"a hook on a {type(module).__name__}")


def dropout_of(module: nn.Module, reader: nn.Module | None = None) -> float:
    """`dropout_p_of`; raises Unsupported for other modules and for a dropout of everything."""
    if not is_plain_dropout(module):
        raise Unsupported(f"a {type(module).__name__} as dropout, or a hook on it")
    p = dropout_p_of(module, reader)
    if not keeps_some(p):
        raise Unsupported(f"a dropout of {p}, which keeps nothing")
    return p


def _attention_dropout(attention: Any) -> float:
    reads = hasattr(attention, "scaling") or hasattr(attention, "dropout_prob")
    return dropout_of(attention.dropout, attention if reads else None)  # eager in 4.57 calls it


# transformers' GELU modules; the tanh variants differ in rounding only
_ACTIVATIONS: dict[str, Activation] = {
    "GELUActivation": F.gelu,
    "NewGELUActivation": GELU_TANH,
    "FastGELUActivation": GELU_TANH,
    "AccurateGELUActivation": GELU_TANH,
    "PytorchGELUTanh": GELU_TANH,
    "GELUTanh": GELU_TANH,
}


_NOT_BY_ELEMENT = {  # of torch's activations
    *("GLU", "LogSoftmax", "MultiheadAttention", "Softmax", "Softmax2d", "Softmin"),
}


def activation_of(function: Activation) -> Activation:
    """The GELU function for transformers' GELU modules; other elementwise functions unchanged.

    Raises Unsupported for a function that might not be elementwise, or a module with hooks.
    """
    if isinstance(function, nn.Module):
        cls = type(function)
        is_known = cls.__module__ in ("transformers.activations", "torch.nn.modules.activation")
        is_known = is_known and cls.__name__ not in _NOT_BY_ELEMENT
        is_known = is_known and is_defined_in(cls.forward, ("torch.", *THEIRS))
        if is_hooked(function) or not is_known or getattr(function, "num_parameters", 1) > 1:
            raise Unsupported(f"a {cls.__name__} as activation, or a hook on it")
        return _ACTIVATIONS.get(cls.__name__, function)
    if not is_torchs(function.func if isinstance(function, functools.partial) else function):
        raise Unsupported("a function of the user's own as activation")
    return function


def is_torchs(function: Any) -> bool:
    """Whether torch defines a function, in Python or not."""
    if hasattr(function, "__globals__"):
        return is_defined_in(function, ("torch",))
    return (getattr(function, "__module__", None) or "torch").startswith("torch")


is_torchs._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see fastbert.backend


def leaf(module: Any, kind: type[nn.Module] = nn.Linear) -> Leaf:
    """`module` as a Leaf; raises Unsupported if it might read more than one token at a time."""
    found = read_leaf(module, kind)
    if not (found.is_read or works_by_token(module)):
        raise Unsupported(f"a {type(module).__name__} in the place of a leaf, or a hook on one")
    return found


def _bert_parts(layer: Any) -> LayerParts:
    attention = layer.attention
    _require_untouched(attention)
    this = attention.self
    _require_untouched(this, attention.output, layer.intermediate, layer.output)
    if getattr(this, "position_embedding_type", "absolute") != "absolute":
        raise Unsupported("relative positions")
    _require_plain_layer(layer, layer, "feed_forward_chunk")
    _require_usual_scores(this, this.query, this.num_attention_heads)
    return read_parts(layer, _attention_dropout(this), leaf, dropout_of, activation_of)


def _distilbert_parts(layer: Any) -> LayerParts:
    attention, ffn = layer.attention, layer.ffn
    _require_untouched(attention, ffn)
    _require_plain_layer(layer, ffn, "ff_chunk")
    _require_usual_scores(attention, attention.q_lin, attention.n_heads)
    return LayerParts(
        projections=(leaf(attention.q_lin), leaf(attention.k_lin), leaf(attention.v_lin)),
        head_dim=attention.dim // attention.n_heads,
        attention_dropout=_attention_dropout(attention),
        attention_end=End(leaf(attention.out_lin), 0.0, leaf(layer.sa_layer_norm, nn.LayerNorm)),
        intermediate=leaf(ffn.lin1),
        activation=activation_of(ffn.activation),
        output=End(
            leaf(ffn.lin2), dropout_of(ffn.dropout), leaf(layer.output_layer_norm, nn.LayerNorm)
        ),
    )


def _require_plain_layer(layer: Any, feeder: Any, method: str) -> None:
    """Raises Unsupported for changed layers; `feeder.method` computes feed-forwards in chunks."""
    if feeder.chunk_size_feed_forward:
        raise Unsupported("chunk_size_feed_forward, which trades speed for memory")
    if getattr(layer, "is_decoder", False):
        raise Unsupported("a decoder's layer")
    if method in vars(feeder) or not has_their(feeder, method):
        raise Unsupported(f"a {method} of the user's own")


def _require_usual_scores(attention: Any, query: Any, num_heads: int) -> None:
    """Raises Unsupported for attributes of attention that users have changed."""
    head_dim = getattr(attention, "attention_head_size", None)  # 4.57's DistilBERT lacks these
    if head_dim is None:
        return
    if getattr(query, "out_features", num_heads * head_dim) != num_heads * head_dim:
        raise Unsupported(f"other than {num_heads} heads of {head_dim}")
    if getattr(attention, "scaling", head_dim**-0.5) != head_dim**-0.5:
        raise Unsupported("a scaling of the user's own")
    if getattr(attention, "is_causal", False):
        raise Unsupported("attention to earlier tokens only")


def _masked_head(dense: Any, activation: Activation, norm: Any, decoder: nn.Module) -> MaskedHead:
    linear, function = leaf(dense), activation_of(activation)
    leaf(norm, nn.LayerNorm)

    def transform(rows: Tensor) -> Tensor:
        return normalized(dense_and_activate(rows, linear, function), norm)

    return MaskedHead(transform, decoder)


def _bert_head(model: Any) -> MaskedHead:
    _require_untouched(model.cls)
    head = model.cls.predictions
    _require_untouched(head)
    parts = head.transform
    _require_untouched(parts)
    return _masked_head(parts.dense, parts.transform_act_fn, parts.LayerNorm, head.decoder)


def _roberta_head(model: Any) -> MaskedHead:
    head = model.lm_head
    _require_untouched(head)
    return _masked_head(head.dense, F.gelu, head.layer_norm, head.decoder)


def _distilbert_head(model: Any) -> MaskedHead:
    return _masked_head(
        model.vocab_transform, model.activation, model.vocab_layer_norm, model.vocab_projector
    )


def _electra_head(model: Any) -> MaskedHead:
    head = model.generator_predictions
    _require_untouched(head)
    return _masked_head(head.dense, head.activation, head.LayerNorm, model.generator_lm_head)


class Family(NamedTuple):
    """How to read the models of one `transformers.models.*` module.

    prefix: of its class names; head: (masked LM) -> MaskedHead, and parts: (layer) -> LayerParts,
    which both may raise Unsupported; stack: the name of the model's attribute whose `.layer` has
    the layers; has_types: whether there are token types; counts_positions: whether positions number
    the real tokens from padding_idx + 1, as RoBERTa's do; output: the class that the bare model
    returns, in transformers.modeling_outputs.
    """

    prefix: str
    head: Callable[[Any], MaskedHead]
    parts: Callable[[Any], LayerParts] = _bert_parts
    stack: str = "encoder"
    has_types: bool = True
    counts_positions: bool = False
    output: str = "BaseModelOutputWithPoolingAndCrossAttentions"


FAMILIES: dict[str, Family] = {
    "bert": Family("Bert", _bert_head),
    "roberta": Family("Roberta", _roberta_head, counts_positions=True),
    "xlm_roberta": Family("XLMRoberta", _roberta_head, counts_positions=True),
    "camembert": Family("Camembert", _roberta_head, counts_positions=True),
    "electra": Family("Electra", _electra_head, output="BaseModelOutputWithPastAndCrossAttentions"),
    "distilbert": Family(
        "DistilBert",
        _distilbert_head,
        _distilbert_parts,
        stack="transformer",
        has_types=False,
        output="BaseModelOutput",
    ),
}


def patched_base(module: nn.Module) -> Any:
    """The patched class among a module's class and its bases; None if there is none.

    FSDP2 derives a class from each class that it shards, and users derive their own.
    """
    return getattr(type(module), PATCHED, None)


def runs_patched(module: nn.Module) -> bool:
    """Whether a module's forward is the packed one, not one of a user's subclass."""
    base = patched_base(module)
    forward: Any = type(module).forward
    if base is None:
        return False
    # from 5.23 on transformers wraps the forward of each class that derives from a layer's
    while forward is not base.forward and hasattr(forward, "__wrapped__"):
        if not is_defined_in(forward, THEIRS):
            return False
        forward = forward.__wrapped__
    return forward is base.forward


def keep_padding(module: nn.Module, keeps: bool) -> None:
    """Sets whether a patched module computes padded tokens too, as Hugging Face does."""
    vars(module).pop(_KEEPS_PADDING, None)
    if keeps:
        vars(module)[_KEEPS_PADDING] = True


def keeps_padding(module: nn.Module) -> bool:
    """Whether `keep_padding` made the module compute padded tokens."""
    return _KEEPS_PADDING in vars(module)


_KEEPS_PADDING = "_fastbert_keeps_padding"  # an attribute, so that copies and pickles keep it


def family_of(cls: type) -> Family | None:
    """The family whose transformers module a class comes from; None for any other class."""
    package, _, name = cls.__module__.rpartition(".")
    folder = package.removeprefix("transformers.models.")
    if f"transformers.models.{folder}.modeling_{folder}" != f"{package}.{name}":
        return None
    return FAMILIES.get(folder)
