"""Heads of a checkpoint: those that are there, and those that are newly initialized."""

import pytest
import torch
import transformers

import fastbert
from fastbert import checkpoint
from fastbert.check import InputError
from tests.checkpoint.case import IDS, QUERY, SHAPE, rewrite


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertForPreTraining"])
def test_a_decoder_that_is_not_tied_has_its_own_bias(kind, tmp_path):
    """transformers 5 then has two parameters, of which it computes with that of the decoder."""
    config = transformers.BertConfig(**SHAPE, tie_word_embeddings=False)
    theirs = getattr(transformers, kind)(config).eval()
    ids = torch.arange(6)[None]
    with torch.no_grad():
        theirs.cls.predictions.decoder.bias.normal_()
    theirs.save_pretrained(tmp_path)
    ours = getattr(fastbert, kind).from_pretrained(tmp_path)
    torch.testing.assert_close(ours(ids)[0], theirs(ids)[0], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        ours.cls.predictions.bias.normal_()
    ours.save_pretrained(tmp_path)
    theirs = getattr(transformers, kind).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(theirs(ids)[0], ours(ids)[0], rtol=1e-4, atol=1e-4)
    again = getattr(fastbert, kind).from_pretrained(tmp_path)
    assert torch.equal(again(ids)[0], ours(ids)[0])


@pytest.mark.parametrize("cls", ["BertModel", "BertForMaskedLM"])
def test_other_models_take_their_part(saved, cls):
    model, directory = saved
    other = getattr(fastbert, cls).from_pretrained(directory)
    own = model.state_dict()
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, own.get(name, own.get(f"bert.{name}"))), name


def test_a_bare_encoder_gets_new_heads_with_a_warning(tmp_path):
    base = fastbert.BertModel(fastbert.BertConfig(**SHAPE))
    base.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"cls\.seq_relationship\.weight.*newly initialized"):
        model = fastbert.BertForPreTraining.from_pretrained(tmp_path)
    assert torch.equal(model.bert.pooler.dense.weight, base.pooler.dense.weight)


HEADS = {
    "SequenceClassification": "classifier",
    "TokenClassification": "classifier",
    "MultipleChoice": "classifier",
    "QuestionAnswering": "qa_outputs",
    "NextSentencePrediction": "cls.seq_relationship",
}


@pytest.mark.parametrize(
    ("source", "head"),
    [
        *(("BertModel", head) for head in HEADS),
        *(("BertForMaskedLM", head) for head in HEADS),
        ("BertForTokenClassification", "QuestionAnswering"),
        ("BertForTokenClassification", "NextSentencePrediction"),
    ],
)
def test_a_head_is_drawn_anew_over_another_models_encoder(source, head, tmp_path):
    theirs = getattr(transformers, source)(transformers.BertConfig(**SHAPE))
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=rf"{HEADS[head]}\.weight.*newly initialized"):
        model = getattr(fastbert, f"BertFor{head}").from_pretrained(tmp_path)
    name = "encoder.layer.1.output.dense.weight"
    assert torch.equal(model.bert.get_parameter(name), theirs.base_model.get_parameter(name))


def test_classifiers_go_both_ways_with_their_labels(tmp_path):
    labels = {"id2label": {0: "no", 1: "yes", 2: "maybe"}}
    theirs = transformers.BertForSequenceClassification(transformers.BertConfig(**SHAPE, **labels))
    theirs.save_pretrained(tmp_path)
    ours = fastbert.BertForSequenceClassification.from_pretrained(tmp_path)
    assert ours.config.id2label == labels["id2label"]
    torch.testing.assert_close(ours(IDS).logits, theirs.eval()(IDS).logits)
    ours.classifier.weight.data += 1
    ours.save_pretrained(tmp_path)
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path).eval()
    assert again.config.id2label == labels["id2label"]
    torch.testing.assert_close(ours(IDS).logits, again(IDS).logits)


def test_another_number_of_labels_names_the_fix(tmp_path):
    three = fastbert.BertForSequenceClassification(fastbert.BertConfig(**SHAPE, num_labels=3))
    three.save_pretrained(tmp_path)
    load = fastbert.BertForSequenceClassification.from_pretrained
    with pytest.raises(InputError, match=r"classifier\.bias has shape.*num_labels=3, or with"):
        load(tmp_path, num_labels=5)
    with pytest.warns(UserWarning, match=r"no matching classifier\.weight, classifier\.bias,"):
        model = load(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert model(IDS).logits.shape == (2, 5)
    rewrite(tmp_path, lambda w: w.update({QUERY: torch.ones(3, 3)}))
    with pytest.raises(InputError, match=f"{QUERY} has shape"):
        load(tmp_path, ignore_mismatched_sizes=True)


def test_the_fix_for_a_head_that_does_not_follow_num_labels(tmp_path):
    fastbert.BertForTokenClassification(fastbert.BertConfig(**SHAPE)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"asks for \(1,\); load it with ignore_mismatched_sizes"):
        fastbert.BertForMultipleChoice.from_pretrained(tmp_path)


def test_a_bare_models_names_beside_a_head_get_the_prefix(tmp_path):
    config = fastbert.BertConfig(**SHAPE, num_labels=3)
    theirs, ours = (fastbert.BertForSequenceClassification(config) for _ in range(2))
    weights = {n.removeprefix("bert."): t for n, t in theirs.state_dict().items()}
    assert checkpoint.load_weights(ours, weights, tmp_path) == []
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name])
