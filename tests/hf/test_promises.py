"""What a user hooks, replaces or registers counts as it does without `patch`.

By the kinds of public reports of silent differences; each runs on three families.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastbert
from tests.hf.changes import LEAVES, layer, replace_a_linear
from tests.hf.promises_case import FAMILIES, MASK, REAL, assert_alike, ids, pair, states
from tests.versions import IS_V4


@pytest.mark.parametrize("change", LEAVES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_leaf_that_is_hooked_or_replaced_sees_padded_sequences(family, change):
    assert_alike(change, family)


def test_explain_names_the_leaf():
    _, ours = pair()
    replace_a_linear(ours)
    told = fastbert.explain(ours, ids(), attention_mask=MASK, show=False)
    assert any("a Gate in the place of a leaf" in route.reason for route in told.routes)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hook_in_the_masked_lm_head_sees_padded_sequences(family):
    theirs, ours = pair(family, "ForMaskedLM")
    labels = ids().masked_fill(~REAL | (torch.arange(10) % 3 > 0), -100)
    losses = []
    for model in (theirs, ours):
        names = {"Bert": "cls.predictions.transform.dense", "Roberta": "lm_head.dense"}
        name = names.get(family, "vocab_transform")
        shapes = []
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, shapes=shapes: shapes.append(output.shape) or output * 2
        )
        losses.append(model.train(False)(ids(), attention_mask=MASK, labels=labels).loss)
        assert [tuple(shape[:2]) for shape in shapes] == [tuple(MASK.shape)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
@pytest.mark.parametrize("how", ["replaced", "hooked", "hooked inside"])
def test_a_pooler_of_the_users_own_sees_all_states(family, how):
    class MeanPooler(nn.Module):
        def forward(self, hidden_states):
            weights = MASK[..., None].float()
            return (hidden_states * weights).sum(1) / weights.sum(1)

    theirs, ours = pair(family)
    found = []
    for model in (theirs, ours):
        if how == "replaced":
            model.pooler = MeanPooler()
        else:
            inner = model.pooler if how == "hooked" else model.pooler.dense
            inner.register_forward_hook(
                lambda module, args, output: output * (args[0].shape[-2] if args[0].ndim > 2 else 2)
            )
        found.append(model(ids(), attention_mask=MASK).pooler_output)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def half_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    mask = attention_mask
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return (out / 2).transpose(1, 2).contiguous(), None


@pytest.mark.skipif(IS_V4, reason="4.57's models choose their attention as they are made")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["sdpa_mine", "flash_attention_mine", "mine"])
def test_an_attention_that_the_user_registers_runs_by_whatever_name(family, name):
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, half_attention)
    AttentionMaskInterface.register(name, sdpa_mask)

    def change(model):
        model.config._attn_implementation = name

    assert_alike(change, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_attention_registered_in_the_place_of_a_built_in_one_runs(family, monkeypatch):
    from transformers import AttentionInterface

    def change(model):
        model.config._attn_implementation = "sdpa"
        monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", half_attention)

    theirs, ours = pair(family)
    with torch.no_grad():
        change(theirs)
        change(ours)
        torch.testing.assert_close(states(ours), states(theirs), rtol=1e-4, atol=1e-5)
    assert fastbert.explain(ours, ids(), attention_mask=MASK, show=False).routes[0].reason


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_hook_on_attentions_dropout_counts_as_often(family, training):
    """4.57's eager attention calls the module in eval mode too, which shows the probabilities."""
    found = []
    for model in pair(family, attn_implementation="eager"):
        calls = []
        for module in model.train(training).modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        attention = layer(model).attention
        getattr(attention, "self", attention).dropout.register_forward_hook(
            lambda module, args, y, calls=calls: calls.append(y.shape) or 2 * y
        )
        with torch.no_grad():
            found.append((states(model), calls))
    (expected, theirs), (actual, ours) = found
    assert ours == theirs
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


CLASSES = {
    "Bert": [
        *("BertSelfAttention", "BertSelfOutput", "BertIntermediate", "BertEmbeddings", "BertLayer"),
        *("BertEncoder", "BertModel"),
    ],
    "Roberta": ["RobertaSelfAttention", "RobertaOutput", "RobertaEncoder", "RobertaModel"],
    "DistilBert": [
        *("DistilBertSelfAttention", "FFN", "Embeddings", "DistilBertModel", "TransformerBlock"),
    ],
}


@pytest.mark.parametrize("wraps", [False, True], ids=["", "wraps"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("family", "name"), [(f, n) for f, ns in CLASSES.items() for n in ns])
def test_a_class_whose_forward_is_replaced_runs_it(family, name, when, wraps, monkeypatch):
    """Also a forward that `functools.wraps` has made look like the one that it replaces."""
    if IS_V4 and "SelfAttention" in name:
        pytest.skip("4.57's models use other classes for it")
    theirs, ours = pair(family)
    modeling = __import__(theirs.__module__, fromlist=[name])
    cls = getattr(modeling, name)
    original, calls = cls.forward, []

    def forward(self, *args, **kwargs):
        calls.append(self)
        return original(self, *args, **kwargs)

    forward = functools.wraps(original)(forward) if wraps else forward
    with torch.no_grad():
        states(ours)
        if when == "before":
            fastbert.unpatch(ours)
        monkeypatch.setattr(cls, "forward", forward)
        expected = states(theirs)
        count = len(calls)
        if when == "before":
            fastbert.patch(ours)
        torch.testing.assert_close(states(ours), expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == 2 * count > 0
