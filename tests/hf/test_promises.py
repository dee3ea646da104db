"""What a user hooks, replaces, registers or passes counts as it does without `patch`.

By the kinds of public reports of silent differences; each runs on three families.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask

import fastbert
from tests.hf.changes import LEAVES, OPTIONS, layer, replace_a_linear
from tests.hf.promises_case import FAMILIES, MASK, REAL, assert_alike, ids, pair, states
from tests.versions import IS_V4


@pytest.mark.parametrize("change", LEAVES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_leaf_that_is_hooked_or_replaced_sees_padded_sequences(family, change):
    assert_alike(change, family)


@pytest.mark.parametrize("inside", ["base_layer", "lora_A.default", "lora_dropout.default"])
def test_a_hook_inside_an_adapter_sees_padded_sequences(inside):
    from peft import LoraConfig, get_peft_model

    shapes = []
    for model in pair():
        lora = LoraConfig(target_modules=["query"], init_lora_weights=False, lora_dropout=0.1)
        adapted = get_peft_model(model, lora).eval()
        query = layer(model).attention.self.query
        query.get_submodule(inside).register_forward_hook(
            lambda module, args, output: shapes.append(output.shape[:2])
        )
        adapted(ids(), attention_mask=MASK)
    assert [tuple(shape) for shape in shapes] == [tuple(MASK.shape)] * 2


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


@pytest.mark.parametrize("family", ["Bert", "DistilBert"])
def test_the_buffer_of_positions_counts(family):
    assert_alike(lambda model: model.embeddings.position_ids.zero_(), family)
    assert_alike(lambda model: model.embeddings.position_ids.copy_(63 - torch.arange(64)), family)


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_the_buffer_of_segments_counts_whenever_it_changes(family):
    theirs, ours = pair(family, type_vocab_size=3)
    states(ours)  # in which it is remembered that the buffer is zero
    for change in (
        lambda types: types.fill_(1),
        lambda types: types.fill_(2),
        lambda types: types.copy_(torch.arange(64) % 3),
        lambda types: types.zero_(),
    ):
        for model in (theirs, ours):
            change(model.embeddings.token_type_ids)
        with torch.no_grad():
            torch.testing.assert_close(states(ours), states(theirs), rtol=1e-4, atol=1e-5)


def test_a_model_made_in_inference_mode_reads_its_buffers_too():
    """Its tensors do not count their versions."""
    with torch.inference_mode():
        theirs, ours = pair(type_vocab_size=3)
        for types in (1, 2, 0):
            for model in (theirs, ours):
                model.embeddings.token_type_ids.fill_(types)
            torch.testing.assert_close(states(ours), states(theirs), rtol=1e-4, atol=1e-5)


def test_positions_that_were_lengthened_are_taken():
    theirs, ours = pair()
    long = torch.randint(5, 99, (2, 80))
    for model in (theirs, ours):
        table = model.embeddings.position_embeddings
        table.weight.data = torch.cat([table.weight.data, table.weight.data + 1])
        model.embeddings.position_ids = torch.arange(128)[None]
        model.embeddings.token_type_ids = torch.zeros(1, 128, dtype=torch.long)
    found = [model(long).last_hidden_state for model in (theirs, ours)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("table", ["word_embeddings", "position_embeddings"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_options_of_an_embedding_count(family, option, table):
    found = []
    for model in pair(family):
        for name, value in option.items():
            setattr(getattr(model.embeddings, table), name, value)
        out = states(model)
        out.square().sum().backward()
        weight = getattr(model.embeddings, table).weight
        assert weight.grad.is_sparse == ("sparse" in option)
        found.append((out, weight.detach(), weight.grad.to_dense()))
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_positions_count_as_often_as_hugging_face_looks_them_up(family):
    """From embeddings RoBERTa looks positions up once a sequence, BERT once for all."""
    gradients = []
    for model in pair(family):
        model.embeddings.position_embeddings.scale_grad_by_freq = True
        given = model.embeddings.word_embeddings(ids()).detach()
        out = model(inputs_embeds=given, attention_mask=MASK).last_hidden_state[REAL]
        out.square().sum().backward()
        gradients.append(model.embeddings.position_embeddings.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["Model", "ForSequenceClassification", "ForMaskedLM"])
def test_arguments_in_excess_are_pythons_own_type_error(family, kind):
    theirs, ours = pair(family, kind)
    calls = [((ids(),), {"input_ids": ids()}), ((ids(), MASK, *[None] * 20), {})]
    for args, kwargs in calls:
        for model in (theirs, ours):
            with pytest.raises(TypeError):
                model(*args, **kwargs)


@pytest.mark.parametrize("kind", ["Model", "ForMaskedLM", "ForTokenClassification"])
@pytest.mark.parametrize("name", ["special_tokens_mask", "length", "offset_mapping"])
def test_a_key_left_over_from_the_tokenizer_costs_nothing(kind, name):
    theirs, ours = pair(kind=kind)
    batch = {"input_ids": ids(), "attention_mask": MASK, name: torch.ones_like(MASK)}
    try:
        expected = theirs(**batch)[0][REAL]
    except TypeError:  # transformers 4.57's heads
        with pytest.raises(TypeError):
            ours(**batch)
        return
    torch.testing.assert_close(ours(**batch)[0][REAL], expected, rtol=1e-4, atol=1e-5)
    routes = fastbert.explain(ours, **batch, show=False).routes
    assert any(route.layout.startswith("packed") for route in routes)


def test_an_error_of_hugging_faces_own_forward_has_no_context_of_ours():
    _, ours = pair()
    with pytest.raises((ValueError, IndexError), match=r"not enough values|too many ind") as caught:
        ours(ids()[0], output_attentions=True)
    error: BaseException | None = caught.value
    while error is not None:
        assert type(error).__name__ != "Unsupported"
        error = error.__context__


def test_explain_tells_of_what_differs_on_purpose():
    _, ours = pair(kind="ForMaskedLM")
    ours.train()
    labels = ids()  # at padding, too
    batch = {"input_ids": ids(), "attention_mask": MASK, "labels": labels}
    told = {r.module: r for r in fastbert.explain(ours, **batch, show=False).routes}
    assert told["labels"].reason == "9 of them are at padding"
    assert told["BertForMaskedLM"].layout == "no logits"
    assert "return_logits=True" in told["BertForMaskedLM"].reason
    assert "rows of padding are zeros" in told["BertModel"].reason
    _, bare = pair()
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2]])
    told = fastbert.explain(bare, ids()[:1], position_ids=positions, show=False).routes
    assert any("3 documents in a row" in route.reason for route in told)


@pytest.mark.parametrize("p", [0.9999, 1.0])
@pytest.mark.parametrize("name", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_a_dropout_that_keeps_nothing_is_hugging_faces(name, p):
    others = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    models, found = pair("Bert", "ForSequenceClassification", **others | {name: p}), []
    for model in models:
        model.train().dropout.p = 0.0
        torch.manual_seed(0)
        found.append(model(ids(), attention_mask=MASK).logits)
    torch.testing.assert_close(*found)
    told = fastbert.explain(models[1], ids(), attention_mask=MASK, show=False)
    assert any("keeps nothing" in route.reason for route in told.routes)


@pytest.mark.skipif(IS_V4, reason="4.57 has no flex attention for BERT")
@pytest.mark.parametrize("hooked", [False, True], ids=["model", "encoder"])
def test_a_mask_of_flex_attention_is_hugging_faces(hooked):
    """It is no tensor; the encoder gets it where Hugging Face's own forward of the model runs."""
    mask = create_block_mask(lambda b, h, q, k: MASK[b, k] > 0, 3, None, 10, 10, "cpu")
    found = []
    for model in pair(kind="ForTokenClassification"):
        model.set_attn_implementation("flex_attention")
        if hooked:
            model.bert.encoder.register_forward_hook(lambda *_: None)
        # compiled it takes half a minute
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            output = model(ids(), attention_mask=mask, labels=ids() % 2)
        found.append((output.loss, output.logits))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(IS_V4, reason="4.57 looks at the values of its mask")
def test_gradients_of_each_sequence_by_vmap_are_hugging_faces():
    """The number of labels is then no number."""
    found, options = [], {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    options["attn_implementation"] = "eager"
    for model in pair(kind="ForMaskedLM", **options):

        def loss(parameters, ids, labels, model=model):
            batch = {"input_ids": ids[None], "labels": labels[None]}
            return torch.func.functional_call(model, parameters, (), batch).loss

        own = {name: parameter.detach() for name, parameter in model.train().named_parameters()}
        each = torch.vmap(torch.func.grad(loss), (None, 0, 0), randomness="different")
        found.append(each(own, ids(), ids().masked_fill(ids() % 3 > 0, -100)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_masks_inside_vmap_are_hugging_faces():
    """Which 4.57 computes, and 5 refuses."""
    found = []
    for model in pair(attn_implementation="eager"):

        def call(ids, mask, model=model):
            return model(ids[None], attention_mask=mask[None]).last_hidden_state[0]

        try:
            with torch.no_grad():
                found.append(torch.vmap(call)(ids(), MASK)[REAL])
        except RuntimeError as error:
            found.append(str(error))
    assert isinstance(found[0], str) != IS_V4
    if IS_V4:
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    else:
        assert found[0] == found[1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_model_without_dropout_draws_nothing(family, p):
    """Or what a user draws behind it, as noise or an order, would not be Hugging Face's."""
    names = ("dropout", "attention_dropout") if family == "DistilBert" else ()
    names = names or ("hidden_dropout_prob", "attention_probs_dropout_prob")
    drawn = []
    for model in pair(family, **dict.fromkeys(names, p)):
        torch.manual_seed(2)
        states(model.train())
        drawn.append(torch.rand(()))
    assert (drawn[0] == drawn[1]) == (p == 0)
