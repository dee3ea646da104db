"""What users do to a model of transformers, patched or not: hooks, own modules, buffers."""

from functools import partial

import torch
from torch import nn


class Gate(nn.Module):
    """A module that looks at the whole sequence."""

    def __init__(self, inner=None):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        y = x if self.inner is None else self.inner(x)
        return y * torch.sigmoid(y.mean(1, keepdim=True))


class ByLength(nn.Module):
    """A pooler that counts the columns."""

    def forward(self, hidden_states):
        return hidden_states[:, 0] * hidden_states.shape[1]


class OnlyLinear(torch.Tensor):
    """A weight that knows one operation, as quantized ones may."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear or function.__name__ in ("__get__", "detach", "clone"):
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        raise NotImplementedError(function.__name__)


def give_another_kind_of_weight(module):
    """As quantizing does."""
    weight = module.weight.detach()
    del module.weight
    module._parameters["weight"] = weight.as_subclass(OnlyLinear)


def base(model):
    return getattr(model, model.base_model_prefix, model)


def layer(model, number=0):
    return next(m for m in base(model).modules() if isinstance(m, nn.ModuleList))[number]


def linear_of(model):
    """The output projection of the first layer's attention, and who holds it under what name."""
    first = layer(model)
    if hasattr(first.attention, "out_lin"):
        return first.attention, "out_lin"
    return first.attention.output, "dense"


def first_token_hook(module, args, output):
    output = output.clone()
    output[:, 0] = 0
    return output


def hook_a_linear(model):
    owner, name = linear_of(model)
    getattr(owner, name).register_forward_hook(first_token_hook)


def replace_a_linear(model):
    owner, name = linear_of(model)
    setattr(owner, name, Gate(getattr(owner, name)))


def replace_a_norm(model):
    first = layer(model)
    owner, name = (first, "sa_layer_norm")
    if hasattr(first.attention, "output"):
        owner, name = first.attention.output, "LayerNorm"
    setattr(owner, name, Gate(getattr(owner, name)))


def replace_an_activation(model):
    first = layer(model)
    if hasattr(first, "ffn"):
        first.ffn.activation = Gate()
    else:
        first.intermediate.intermediate_act_fn = Gate()


def replace_a_dropout(model):
    first = layer(model)
    owner = first.ffn if hasattr(first, "ffn") else first.output
    owner.dropout = Gate()


def hook_the_words(model):
    base(model).embeddings.word_embeddings.register_forward_hook(first_token_hook)


def replace_the_words(model):
    embeddings = base(model).embeddings
    embeddings.word_embeddings = Gate(embeddings.word_embeddings)


def replace_the_embeddings_norm(model):
    embeddings = base(model).embeddings
    embeddings.LayerNorm = Gate(embeddings.LayerNorm)


def replace_the_pooler(model):
    if getattr(base(model), "pooler", None) is not None:
        base(model).pooler = ByLength()


def change_a_buffer(model, name, value):
    buffer = getattr(base(model).embeddings, name, None)
    if buffer is not None:
        buffer.fill_(value)


def set_an_option(model, table, name, value):
    setattr(getattr(base(model).embeddings, table), name, value)


OF_LAYERS = [hook_a_linear, replace_a_linear, replace_a_norm, replace_an_activation]
OF_LAYERS += [replace_a_dropout]
LEAVES = [*OF_LAYERS, hook_the_words, replace_the_words, replace_the_embeddings_norm]
OPTIONS = ({"sparse": True}, {"max_norm": 0.5}, {"scale_grad_by_freq": True})
CHANGES = {
    **{change.__name__: change for change in LEAVES},
    "replace_the_pooler": replace_the_pooler,
    "positions": partial(change_a_buffer, name="position_ids", value=3),
    "types": partial(change_a_buffer, name="token_type_ids", value=1),
    **{
        f"{table} {name}": partial(set_an_option, table=table, name=name, value=value)
        for table in ("word_embeddings", "position_embeddings")
        for option in OPTIONS
        for name, value in option.items()
    },
}
