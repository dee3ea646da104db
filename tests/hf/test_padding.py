"""`patch(model, padding="compute")`: padded tokens are computed and scored as unpatched."""

import copy
import pickle

import pytest
import torch
import transformers

import fastbert
from tests.hf.cases import IS_V4

SHAPE = {"vocab_size": 99, "max_position_embeddings": 64, "pad_token_id": 0}
BERT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
DISTIL = {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128}
MASKS = {
    "right": torch.arange(9) < torch.tensor([[9], [6], [3]]),
    "left": torch.arange(9) >= torch.tensor([[0], [3], [6]]),
    "none": torch.ones(3, 9, dtype=torch.bool),
}
WORDS = torch.arange(27).reshape(3, 9) * 7 % 99
LABELS = {
    "Model": {},
    "ForMaskedLM": {"labels": WORDS},
    "ForPreTraining": {
        "labels": WORDS,
        "next_sentence_label": torch.tensor([0, 1, 0]),
    },
    "ForTokenClassification": {"labels": WORDS % 2},
    "ForSequenceClassification": {"labels": torch.tensor([0, 1, 1])},
    "ForQuestionAnswering": {
        "start_positions": torch.tensor([1, 7, 0]),
        "end_positions": torch.tensor([3, 8, 2]),
    },
}


def pair(family="Bert", kind="Model", padding="compute", **options):
    torch.manual_seed(0)
    shape = SHAPE | (DISTIL if family == "DistilBert" else BERT)
    theirs = getattr(transformers, family + kind)(
        getattr(transformers, f"{family}Config")(**shape, **options)
    ).eval()
    return theirs, fastbert.patch(copy.deepcopy(theirs), padding=padding)


def batch(side="right"):
    torch.manual_seed(1)
    # a token of its own stands at the places that none attends to, as in ColBERT's queries
    return {
        "input_ids": torch.randint(5, 99, (3, 9)).masked_fill(~MASKS[side], 4),
        "attention_mask": MASKS[side].long(),
    }


@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("family", ["Bert", "Roberta", "DistilBert"])
def test_every_row_is_as_unpatched(family, kind, side):
    if family != "Bert" and kind == "ForPreTraining":
        pytest.skip("a head of BERT's alone")
    if IS_V4 and family == "DistilBert" and side == "left":
        pytest.skip("transformers 4.57's DistilBERT numbers positions otherwise")
    theirs, ours = pair(family, kind)
    options = batch(side) | LABELS[kind]
    if kind in ("ForMaskedLM", "ForPreTraining"):
        options_of_ours = options | {"return_logits": True}
    else:
        options_of_ours = options
    expected = theirs(**options, output_hidden_states=True)
    found = ours(**options_of_ours, output_hidden_states=True)
    assert found.keys() == expected.keys()
    for name in set(expected) - {"hidden_states"}:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
    for a, e in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["ForMaskedLM", "ForPreTraining", "ForTokenClassification"])
def test_labels_at_padding_count_in_training(kind):
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    theirs, ours = (model.train() for model in pair(kind=kind, **none))
    options = batch() | LABELS[kind]
    expected, found = theirs(**options).loss, ours(**options).loss
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    _, skipping = pair(kind=kind, padding="skip")
    assert (skipping(**options).loss - expected).abs() > 1e-4
    for loss in (expected, found):
        loss.backward()
    for (name, e), a in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        if e.grad is not None:
            torch.testing.assert_close(a.grad, e.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_the_encoder_alone_computes_padding_too():
    theirs, ours = pair()
    x, mask = torch.randn(3, 9, 64), MASKS["right"]
    expected = theirs.encoder(x, attention_mask=mask[:, None, None].float().log())
    found = ours.encoder(x, attention_mask=mask)
    torch.testing.assert_close(
        found.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-5
    )


def has_zeros(model):
    return not model(**batch()).last_hidden_state[~MASKS["right"]].any()


def test_copies_and_pickles_keep_it_and_patching_or_unpatching_takes_it_back():
    _, ours = pair()
    assert not has_zeros(ours)
    assert not has_zeros(copy.deepcopy(ours))
    assert not has_zeros(pickle.loads(pickle.dumps(ours)))
    again = fastbert.patch(copy.deepcopy(ours))
    assert has_zeros(again)
    theirs = fastbert.unpatch(ours)
    assert not any("fastbert" in name for module in theirs.modules() for name in vars(module))
    assert has_zeros(fastbert.patch(theirs))


def test_explain_tells_that_padding_is_computed():
    _, ours = pair()
    assert 'rows of padding are computed (padding="compute")' in str(
        fastbert.explain(ours, **batch())
    )


def test_another_word_is_refused():
    with pytest.raises(ValueError, match='padding: expected "skip" or "compute", got \'zeros\''):
        fastbert.patch(pair()[0], padding="zeros")
