"""Own heads that read every token get padded hidden states from a graph of the whole batch."""

import pytest
import torch
from torch import nn

from fastbert.modules import sequences
from tests.modules.graphs.case import MASKS, batch, models

# with what of the output has a number for each token
HEADS = {
    "ForTokenClassification": ("logits",),
    "ForMaskedLM": ("logits",),
    "ForPreTraining": ("prediction_logits", "seq_relationship_logits"),
    "ForQuestionAnswering": ("start_logits", "end_logits"),
}
EVERY = pytest.mark.parametrize("head", HEADS)


def pair(head):
    options = {"num_labels": 2} if head == "ForQuestionAnswering" else {}
    plain, recorded = (model.eval() for model in models("own", head, **options))
    for model in (plain, recorded):  # a head's bias would show at padding
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)
    recorded.load_state_dict(plain.state_dict())
    return plain, recorded


def outputs(model, inputs, **options):
    with torch.no_grad():
        return model(**inputs, **options)


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor)


@EVERY
@pytest.mark.parametrize("mask", MASKS)
def test_logits_are_those_of_packed_tokens(head, mask, recorder, embedded):
    plain, recorded = pair(head)
    given = {"input_ids": torch.randint(3, 61, (3, 7))}
    if MASKS[mask] is not None:
        given["attention_mask"] = torch.tensor(MASKS[mask])
    outputs(recorded, given)
    for seed in range(2):
        torch.manual_seed(seed)
        given["input_ids"] = torch.randint(3, 61, (3, 7))
        embedded.clear()
        actual = outputs(recorded, given)
        assert not embedded
        expected = outputs(plain, given)
        assert_equal(actual, expected)
    assert tuple(expected) == HEADS[head]
    assert recorder.recorded == 1


@EVERY
def test_labels_are_scored_as_without_a_graph(head, recorder):
    plain, recorded = pair(head)
    inputs = batch([7, 3, 5])
    labels = {"labels": torch.where(inputs["input_ids"] > 30, 1, -100)}
    if head == "ForPreTraining":
        labels["next_sentence_label"] = torch.tensor([0, 1, 0])
    if head == "ForQuestionAnswering":
        places = torch.tensor([6, 5, -1])  # the second one is at padding
        labels = {"start_positions": torch.tensor([1, 2, 9]), "end_positions": places}
    for _ in range(2):
        assert_equal(outputs(recorded, inputs, **labels), outputs(plain, inputs, **labels))
    assert recorder.recorded == 1


@pytest.fixture
def read(monkeypatch):
    """What linear layers read: the number of dimensions, by weight."""
    found, linear = {}, nn.functional.linear

    def watched(x, weight, bias=None):
        found.setdefault(id(weight), []).append(tuple(x.shape[:-1]))
        return linear(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", watched)
    return found


def last_weight(model):
    """Of the layer that gives each token's numbers."""
    layers = dict(model.named_modules())
    for name in ("classifier", "qa_outputs", "cls.predictions.decoder"):
        if name in layers:
            return layers[name].weight
    raise AssertionError


@EVERY
def test_a_head_of_plain_modules_reads_all_places(head, recorder, read):
    _, recorded = pair(head)
    for _ in range(2):
        outputs(recorded, batch([7, 3, 5]))
    assert read[id(last_weight(recorded))] == [(3, 7)] * 2


@EVERY
@pytest.mark.parametrize("by", ["hook", "class"])
def test_a_head_of_a_users_own_reads_all_places_with_a_graph_and_without(head, by, recorder, read):
    both = pair(head)
    for model in both:
        _, reader = list(model.named_children())[-1]
        if by == "hook":
            inner = list(reader.modules())[-1]
            inner.register_forward_pre_hook(lambda *_: None)
        else:
            reader.__class__ = type("Another", (type(reader),), {})
    for _ in range(2):
        plain, recorded = (outputs(model, batch([7, 3, 5])) for model in both)
        assert_equal(recorded, plain)
    for model in both:
        assert read[id(last_weight(model))] == [(3, 7)] * 2
    assert recorder.recorded == 1


@EVERY
def test_a_head_computes_no_padding_of_a_large_batch(head, recorder, read, monkeypatch):
    monkeypatch.setattr(sequences, "LEAST_COUNTED", 0)
    _, recorded = pair(head)
    for _ in range(2):
        outputs(recorded, batch([60, 3, 1]))
    assert read[id(last_weight(recorded))] == [(64,)] * 2
