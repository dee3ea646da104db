"""What an encoder's plan was read from may change after a call, and the next call sees it."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import fastbert
from fastbert.modules import bert_layer, plan
from tests.hf.changes import give_another_kind_of_weight
from tests.modules.plan_case import build, result


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def dense(layer):
    return layer.intermediate.dense


def set_tensor(layer):
    """As FSDP1 does."""
    weight = dense(layer).weight.detach() * 2
    del dense(layer).weight
    dense(layer).weight = weight


def set_weight(layer):
    dense(layer).weight = nn.Parameter(torch.ones_like(dense(layer).weight))


def set_a_weight_of_another_kind(layer):
    query = layer.attention.self.query
    query.weight = nn.Parameter(torch.ones_like(query.weight))
    give_another_kind_of_weight(query)


def set_data(layer):
    dense(layer).weight.data = torch.ones_like(dense(layer).weight)


def replace_leaf(layer):
    layer.output.dense = Doubled(48, 32)


def replace_by_alike(layer):
    layer.output.dense = nn.Linear(48, 32)


def change_class(layer):
    layer.attention.self.query.__class__ = Doubled


def replace_norm(layer):
    layer.output.LayerNorm = nn.LayerNorm(32, elementwise_affine=False)


def remove_bias(layer):
    dense(layer).bias = None


def change_eps(layer):
    layer.attention.output.LayerNorm.eps = 0.5


def change_heads(layer):
    layer.attention.self.num_attention_heads = 2
    layer.attention.self.attention_head_size = 16


def hook_a_leaf(layer):
    layer.attention.output.dense.register_forward_hook(lambda m, i, o: o * 2)


def hook_a_leaf_before(layer):
    layer.attention.self.key.register_forward_pre_hook(lambda m, i: (i[0] * 2,))


def doubled(module, inputs, output):
    """A hook; transformers 4.57's layers give tuples."""
    return (output[0] * 2,) if isinstance(output, tuple) else output * 2


def hook_the_layer(layer):
    layer.register_forward_hook(doubled)


def set_forward(layer):
    forward = layer.output.dense.forward
    layer.output.dense.forward = lambda x: forward(x) * 2


def set_activation(layer):
    is_module = isinstance(layer.intermediate.intermediate_act_fn, nn.Module)
    layer.intermediate.intermediate_act_fn = nn.ReLU() if is_module else F.relu


def parametrize(layer):
    nn.utils.parametrizations.weight_norm(dense(layer))
    dense(layer).parametrizations.weight.original0.data *= 2


CHANGES = [
    set_tensor, set_weight, set_a_weight_of_another_kind, set_data, replace_leaf, replace_by_alike,
    change_class, replace_norm, remove_bias, change_eps, change_heads, hook_a_leaf,
    hook_a_leaf_before, hook_the_layer, set_forward, set_activation, parametrize,
]  # fmt: skip


def watch(model):
    """Puts hooks on all layers, so that these are called as modules."""
    for layer in model.encoder.layer:
        layer.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("kind", ["patched", "own"])
def test_parameters_that_are_given_back_are_read(kind):
    """FSDP1 has tensors in the place of all of a layer's parameters while it computes."""
    model = build(kind)
    before, modules = result(model), list(model.encoder.layer.modules())
    parameters = [dict(module._parameters) for module in modules]
    for module, own in zip(modules, parameters, strict=True):
        module._parameters.clear()
        for name, parameter in own.items():
            setattr(module, name, parameter.detach() * 2)
    assert not torch.allclose(result(model), before, atol=1e-4)
    for module, own in zip(modules, parameters, strict=True):
        for name in own:
            delattr(module, name)
        module._parameters.update(own)
    assert torch.equal(result(model), before)


@pytest.mark.parametrize("is_watched", [False, True])
@pytest.mark.parametrize("kind", ["patched", "own"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_after_a_call_is_seen(change, kind, is_watched):
    """As by a model that was changed before its first call."""
    model, fresh = build(kind), build(kind)
    if is_watched:
        watch(model), watch(fresh)
    before = result(model)
    assert torch.equal(result(model), before)
    for one in (model, fresh):
        torch.manual_seed(1)
        change(one.encoder.layer[1])
    expected = result(fresh)
    assert not torch.allclose(expected, before, atol=1e-4)
    assert torch.equal(result(model), expected)


@pytest.mark.parametrize("kind", ["patched", "own"])
def test_a_hook_may_change_its_layer_in_the_middle_of_a_call(kind):
    model, fresh = build(kind), build(kind)
    before = result(watch(model))
    for one in (model, fresh):
        first, second = one.encoder.layer
        first.register_forward_hook(lambda *_, layer=second: change_eps(layer))
    expected = result(fresh)
    assert not torch.allclose(expected, before, atol=1e-4)
    assert torch.equal(result(model), expected)


@pytest.mark.parametrize("kind", ["patched", "own"])
def test_a_hook_that_is_gone_is_not_missed(kind):
    model = build(kind)
    before = result(model)
    for module in (model.encoder.layer[1], model.encoder.layer[0].output.dense):
        hook = module.register_forward_hook(doubled)
        assert not torch.allclose(result(model), before, atol=1e-4)
        hook.remove()
        assert torch.equal(result(model), before)


@pytest.mark.parametrize("kind", ["patched", "own"])
def test_a_layer_may_be_replaced_or_removed(kind):
    model, fresh = build(kind), build(kind)
    before = result(model)
    del model.encoder.layer[0], fresh.encoder.layer[0]
    expected = result(fresh)
    assert not torch.allclose(expected, before, atol=1e-4)
    assert torch.equal(result(model), expected)


@pytest.mark.parametrize("kind", ["patched", "own"])
def test_modes_and_probabilities_are_those_of_now(kind):
    model = build(kind)
    before = result(model)
    model.train()
    assert torch.equal(result(model), before)
    dropout = model.encoder.layer[1].output.dropout
    dropout.p = 0.5
    dropped = result(model)
    assert not torch.allclose(dropped, before, atol=1e-4)
    model.eval()
    assert torch.equal(result(model), before)
    dropout.training = True
    assert not torch.allclose(result(model), before, atol=1e-4)


def test_a_class_whose_forward_is_replaced_is_seen(monkeypatch):
    """Where transformers looks forward up at each call, a plan must as well."""
    model = build("patched")
    result(model)
    reads = []
    held = plan.Plan.holds
    monkeypatch.setattr(plan.Plan, "holds", lambda self: reads.append(held(self)) or reads[-1])
    result(model)
    assert reads == [True, True]  # of the embeddings and of the layers
    cls = transformers.models.bert.modeling_bert.BertSelfOutput
    forward, calls = cls.forward, []
    monkeypatch.setattr(cls, "forward", lambda *args: calls.append(1) or forward(*args))
    reads.clear()
    result(model)
    assert reads[0] is False
    assert len(calls) == 2


@pytest.mark.parametrize(
    "name",
    ["BertLayer", "BertAttention", "BertSelfAttention", "BertSelfOutput", "BertIntermediate"],
)
def test_an_own_class_whose_forward_is_replaced_runs_it(name, monkeypatch):
    model = build("own")
    before, cls = result(model), getattr(bert_layer, name)
    forward, calls = cls.forward, []
    monkeypatch.setattr(cls, "forward", lambda *args: calls.append(1) or forward(*args))
    assert torch.equal(result(model), before)
    assert len(calls) == 2


@pytest.mark.parametrize("kind", ["patched", "own"])
def test_a_global_hook_sees_every_layer(kind):
    model = build(kind)
    result(model)
    seen = []
    name = type(model.encoder.layer[0]).__name__
    hook = nn.modules.module.register_module_forward_hook(
        lambda m, i, o: seen.append(type(m).__name__)
    )
    try:
        result(model)
    finally:
        hook.remove()
    assert seen.count(name) == 2


@pytest.mark.parametrize("is_wrapped", [False, True])
@pytest.mark.parametrize("is_watched", [False, True])
@pytest.mark.parametrize("kind", ["patched", "own"])
def test_a_plan_goes_with_its_model(kind, is_watched, is_wrapped):
    model = build(kind)
    if is_watched:
        watch(model)
    if is_wrapped:  # as Accelerate does
        for layer in model.encoder.layer:
            layer.forward = layer.forward
    result(model)
    watched = [weakref.ref(one) for one in (model, model.encoder.layer, model.encoder.layer[0])]
    del model
    gc.collect()
    assert [one() for one in watched] == [None] * 3


def test_copies_have_plans_of_their_own():
    model = build("patched")
    before = result(model)
    other = copy.deepcopy(model)
    other.encoder.layer[1].output.dense.weight.data.zero_()
    changed = result(other)
    assert not torch.allclose(changed, before, atol=1e-4)
    assert torch.equal(result(model), before)
    assert torch.equal(result(other), changed)


def test_what_each_end_of_a_layer_saves_is_read_from_its_module():
    config = fastbert.BertConfig(hidden_size=32, num_attention_heads=2, intermediate_size=48)
    layer = bert_layer.BertLayer(config)
    layer.output.save = "y"
    parts = bert_layer.parts_of(layer)
    assert (parts.attention_end.save, parts.output.save) == ("z", "y")
