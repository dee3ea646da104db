"""What users set on classes and modules of a patched model, and what they ask of its results."""

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrizations

import fastbert
from tests.hf.changes import give_another_kind_of_weight, layer
from tests.hf.promises_case import FAMILIES, MASK, assert_alike, ids, pair, states
from tests.versions import IS_V4


def attention_of(model):
    attention = layer(model).attention
    return getattr(attention, "self", attention)


def change_the_scaling(model):
    attention_of(model).scaling *= 2


def prune_a_head_by_hand(model):
    """Hugging Face counts heads by the size of one."""
    attention = attention_of(model)
    names = (
        ("query", "key", "value") if hasattr(attention, "query") else ("q_lin", "k_lin", "v_lin")
    )
    for name in names:
        linear = getattr(attention, name)
        linear.weight = nn.Parameter(linear.weight[:48])
        linear.bias = nn.Parameter(linear.bias[:48])
        linear.out_features = 48
    end = (
        attention.out_lin if hasattr(attention, "out_lin") else layer(model).attention.output.dense
    )
    end.weight = nn.Parameter(end.weight[:, :48])
    end.in_features = 48


def double_the_feed_forward(model):
    owner = layer(model)
    owner, name = (
        (owner.ffn, "ff_chunk") if hasattr(owner, "ffn") else (owner, "feed_forward_chunk")
    )
    original = getattr(owner, name)
    setattr(owner, name, lambda *args: original(*args) * 2)


def drop_the_mask(model):
    """Of 5.x: nothing is masked."""
    model._create_attention_masks = lambda *args, **kwargs: (None, None)


def put_in_own_embeddings(model):
    class Doubled(nn.Module):
        def __init__(self, words):
            super().__init__()
            self.word_embeddings = words

        def forward(self, input_ids=None, *args, **kwargs):
            return self.word_embeddings(input_ids) * 2

    model.embeddings = Doubled(model.embeddings.word_embeddings)


def put_in_a_norm_of_the_sequence(model):
    owner = layer(model) if hasattr(layer(model), "output_layer_norm") else layer(model).output
    name = "output_layer_norm" if hasattr(owner, "output_layer_norm") else "LayerNorm"
    setattr(owner, name, nn.LayerNorm([*MASK.shape[1:], 64]))


def put_in_a_norm_of_the_sequence_in_the_embeddings(model):
    model.embeddings.LayerNorm = nn.LayerNorm([*MASK.shape[1:], 64])


def put_in_a_softmax_along_the_sequence(model):
    owner = getattr(layer(model), "ffn", None)
    if owner is None:
        layer(model).intermediate.intermediate_act_fn = nn.Softmax(dim=1)
    else:
        owner.activation = nn.Softmax(dim=1)


class Later(nn.ModuleList):
    """Leaves its first layer out, as LayerDrop's lists do at random."""

    def __iter__(self):
        return iter(list(super().__iter__())[1:])


def encoder_of(model):
    return getattr(model, "encoder", None) or model.transformer


def leave_a_layer_out(model):
    encoder_of(model).layer = Later(encoder_of(model).layer)


def keep_a_layer_in_a_tuple(model):
    encoder = encoder_of(model)
    layers = tuple(encoder.layer)
    del encoder.layer
    encoder.layer = layers[1:]


CHANGES = [
    leave_a_layer_out,
    keep_a_layer_in_a_tuple,
    change_the_scaling,
    prune_a_head_by_hand,
    double_the_feed_forward,
    put_in_own_embeddings,
    put_in_a_norm_of_the_sequence,
    put_in_a_norm_of_the_sequence_in_the_embeddings,
    put_in_a_softmax_along_the_sequence,
]


@pytest.mark.skipif(IS_V4, reason="4.57's modules have other attributes")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_set_on_a_module_counts(family, change):
    assert_alike(change, family)


@pytest.mark.skipif(IS_V4, reason="4.57's models make their masks elsewhere")
def test_masks_of_the_users_making_count():
    assert_alike(drop_the_mask, "Bert")


@pytest.mark.skipif(IS_V4, reason="4.57 reads no such attribute")
@pytest.mark.parametrize("where", ["config", "attention"])
@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_attention_that_is_made_causal_is(family, where):
    theirs, ours = pair(family)
    found = []
    for model in (theirs, ours):
        for one in [model.config] if where == "config" else map(attention_of, [model]):
            one.is_causal = True
        with torch.no_grad():
            found.append(model(ids()).last_hidden_state)
    assert not torch.allclose(found[0], copy.deepcopy(pair(family)[0])(ids()).last_hidden_state)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["feed_forward_chunk", "forward"])
def test_a_method_that_is_replaced_in_the_class_counts_after_a_first_call(method, monkeypatch):
    cls = transformers.models.bert.modeling_bert.BertLayer
    original = getattr(cls, method)
    theirs, ours = pair()

    def doubled(self, attention_output, *args, **kwargs):
        y = original(self, attention_output, *args, **kwargs)
        return (y[0] * 2, *y[1:]) if isinstance(y, tuple) else y * 2

    with torch.no_grad():
        before = states(ours)
        if method == "feed_forward_chunk":  # whose arguments transformers counts
            monkeypatch.setattr(cls, method, lambda self, x: original(self, x) * 2)
        else:
            monkeypatch.setattr(cls, method, doubled)
        expected = states(theirs)
        torch.testing.assert_close(states(ours), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, expected)


@pytest.mark.parametrize("kind", [nn.Linear, nn.LayerNorm, nn.Dropout])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_that_is_replaced_in_a_class_of_torch_runs(family, kind, monkeypatch):
    theirs, ours = pair(family)
    original = kind.forward
    with torch.no_grad():
        states(ours)
        monkeypatch.setattr(kind, "forward", lambda self, x: original(self, x) * 1.1)
        expected = states(theirs)
        torch.testing.assert_close(states(ours), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", [MASK, None], ids=["mask", "none"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("family", FAMILIES)
def test_labels_of_the_words_may_have_any_shape(family, training, mask):
    _, ours = pair(family, "ForMaskedLM")
    ours.train(training)
    labels, losses = ids().masked_fill(torch.arange(10) % 3 > 0, -100), []
    for one in (labels, labels.flatten(), labels[..., None]):
        torch.manual_seed(0)
        losses.append(ours(ids(), attention_mask=mask, labels=one).loss)
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_weight_of_another_kind_is_left_to_its_module(family):
    theirs, ours = pair(family)
    for linear in (module for module in layer(ours).modules() if isinstance(module, nn.Linear)):
        give_another_kind_of_weight(linear)
    with torch.no_grad():
        torch.testing.assert_close(states(ours), states(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoder_of_another_kind_is_left_to_its_module(family):
    _, ours = pair(family, "ForMaskedLM")
    labels, losses = ids().masked_fill(MASK == 0, -100), []
    for _ in range(2):
        losses.append(ours(ids(), attention_mask=MASK, labels=labels, skip_logits=True).loss)
        give_another_kind_of_weight(ours.get_output_embeddings())
    torch.testing.assert_close(*losses)


def test_a_norm_in_another_dtype_is_hugging_faces():
    theirs, ours = pair()
    for model in (theirs, ours):
        model.bfloat16()
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.float()
    with torch.no_grad():
        torch.testing.assert_close(states(ours), states(theirs), rtol=0.02, atol=0.02)


def test_a_parametrized_table_is_computed_as_often():
    """The power iteration of a spectral norm goes on with each look at the weight."""
    theirs, ours = pair()
    for model in (theirs, ours):
        torch.manual_seed(2)
        parametrizations.spectral_norm(model.embeddings.position_embeddings)
        for module in model.modules():
            module.training = "parametriz" in type(module).__module__ or "Spectral" in str(
                type(module)
            )
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(states(ours), states(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("modes", [(True, False), (False, True)], ids=["attention", "dropout"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_dropout_of_attention_is_on_where_hugging_faces_is(family, modes, attention):
    """transformers 5 reads the dropout's probability, and asks the attention for its mode."""
    drops = []
    for model in pair(family, attn_implementation=attention):
        one = attention_of(model)
        with torch.no_grad():
            before = states(model.eval())
            one.training, one.dropout.training = modes
            one.dropout.p = 0.5
            drops.append(not torch.allclose(states(model), before, atol=1e-3))
    theirs, ours = drops
    assert ours == theirs
    assert IS_V4 or theirs == modes[0]


class Wrapper(nn.Module):
    """As peft's for `modules_to_save`: it has its module's attributes."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["wrapped", "hooked norm", "PReLU"])
def test_what_works_by_token_stays_packed(family, how):
    theirs, ours = pair(family)
    for model in (theirs, ours):
        if how == "wrapped":
            model.embeddings = Wrapper(model.embeddings)
        elif how == "hooked norm":
            model.embeddings.LayerNorm.register_forward_hook(
                lambda module, args, output: output * 2
            )
        elif hasattr(layer(model), "ffn"):
            layer(model).ffn.activation = nn.PReLU()
        else:
            layer(model).intermediate.intermediate_act_fn = nn.PReLU()
    with torch.no_grad():
        torch.testing.assert_close(states(ours), states(theirs), rtol=1e-4, atol=1e-5)
    told = fastbert.explain(ours, ids(), attention_mask=MASK, show=False)
    assert any(route.layout.startswith("packed, 21") for route in told.routes)


@pytest.mark.parametrize("kind", ["patched", "own"])
def test_targets_that_are_not_numbers_are_seen_in_the_loss(kind):
    theirs, ours = pair("Bert", "ForSequenceClassification", num_labels=1)
    if kind == "own":
        ours = fastbert.BertForSequenceClassification(theirs.config).eval()
    for labels in ([float("nan")] * 3, [1.0, float("nan"), 2.0]):
        for options in ({}, {"num_items_in_batch": 3}):
            loss = ours(ids(), attention_mask=MASK, labels=torch.tensor(labels), **options).loss
            assert loss.isnan()
