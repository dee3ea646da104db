"""What a user passes, transforms and draws beside counts as it does without `patch`."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

import fastbert
from tests.hf.promises_case import FAMILIES, MASK, REAL, ids, pair, states
from tests.versions import IS_V4


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


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", ["ForMaskedLM", "ForTokenClassification"])
def test_a_wrong_number_of_labels_or_of_columns_of_a_mask_is_named(kind, training):
    _, ours = pair(kind=kind)
    ours.train(training)
    wrong = {"labels": ids()[:, :8], "attention_mask": MASK[:, :8]}
    for name, tensor in wrong.items():
        batch = {"attention_mask": MASK, "labels": ids() % 2, name: tensor}
        with pytest.raises(ValueError, match=rf"{name}: expected .*, got \(\d+, 8\)"):
            ours(ids(), **batch)


def test_an_error_of_hugging_faces_own_forward_has_no_context_of_ours():
    _, ours = pair()
    with pytest.raises((ValueError, IndexError), match=r"not enough values|too many ind") as caught:
        ours(ids()[0], output_attentions=True)
    with pytest.raises(ValueError, match="too many values to unpack"):
        ours(ids()[None])
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


WORD_KINDS = ["ForMaskedLM", "ForPreTraining", "ForTokenClassification"]


def labelled(kind, labels):
    more = {"next_sentence_label": torch.tensor([0, 1, 1])} if kind == "ForPreTraining" else {}
    return {"input_ids": ids(), "attention_mask": MASK, "labels": labels} | more


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", WORD_KINDS)
@pytest.mark.parametrize("shape", [(-1,), (*MASK.shape, 1), (10, 3)], ids=str)
def test_labels_of_another_shape_are_taken_in_order(kind, shape, training):
    """Hugging Face flattens them; read as rows of packed tokens they overwrote memory."""
    theirs, ours = pair("Bert", kind, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    labels = (ids() % 2).masked_fill(~REAL, -100).view(shape)
    losses = [model.train(training)(**labelled(kind, labels)).loss for model in (ours, theirs)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", WORD_KINDS)
@pytest.mark.parametrize("shape", [(3, 9), (2, 10), (29,)], ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["no mask", "mask"])
def test_labels_of_another_number_than_tokens_are_refused(kind, shape, padded, training):
    """As where peft's prompts make a sequence longer than its labels."""
    _, ours = pair("Bert", kind)
    batch = labelled(kind, torch.ones(shape, dtype=torch.long))
    batch["attention_mask"] = MASK if padded else None
    with pytest.raises(ValueError, match=r"^labels: expected one for each token, shape \(3, 10\)"):
        ours.train(training)(**batch)
