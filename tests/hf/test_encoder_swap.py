"""`model.bert.encoder = fastbert.BertEncoder(config)` inside an unpatched Hugging Face model."""

import copy

import pytest
import torch
import transformers

import fastbert
from tests.hf.cases import IS_V4, Case, build, inputs


@pytest.fixture
def models():
    model, _ = build(Case("Bert", "ForSequenceClassification"))
    swapped = copy.deepcopy(model)
    encoder = fastbert.BertEncoder(swapped.config).to(torch.float64)
    encoder.load_state_dict(model.bert.encoder.state_dict(), strict=True)
    swapped.bert.encoder = encoder
    return model, swapped


def call(case, model, **options):
    torch.manual_seed(0)
    arguments, real = inputs(case, model)
    return model(**arguments, **options), real


@pytest.mark.parametrize("mask", ["none", "int", "bool"])
@pytest.mark.parametrize("wanted", [False, True] if IS_V4 else [False, True, [1], [0, 2]])
def test_outputs_hidden_states_and_gradients_are_hugging_faces(models, mask, wanted):
    case = Case("Bert", "ForSequenceClassification", mask=mask)
    found = []
    for model in models:
        output, real = call(case, model, output_hidden_states=wanted)
        output.loss.backward()
        found.append((output, [p.grad for p in model.parameters()]))
    (expected, their_gradients), (output, our_gradients) = found
    torch.testing.assert_close(output.logits, expected.logits)
    if wanted:
        assert len(output.hidden_states) == len(expected.hidden_states)
        for a, b in zip(output.hidden_states, expected.hidden_states, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a[real], b[real])
    for a, b in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_hidden_states_asked_for_by_the_configuration_are_there(models):
    _, swapped = models
    swapped.config.output_hidden_states = True
    output, _ = call(Case("Bert", "ForSequenceClassification"), swapped)
    assert len(output.hidden_states) == swapped.config.num_hidden_layers + 1


def test_gradient_checkpointing_runs_each_layer_again(models):
    _, swapped = models
    calls = []
    for layer in swapped.bert.encoder.layer:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            swapped.gradient_checkpointing_enable()
        calls.clear()
        swapped.zero_grad()
        call(Case("Bert", "ForSequenceClassification"), swapped)[0].loss.backward()
        found.append((len(calls), [p.grad for p in swapped.parameters()]))
    layers = swapped.config.num_hidden_layers
    assert [count for count, _ in found] == [layers, 2 * layers]
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b)


def test_attentions_are_refused_and_patch_is_named(models):
    _, swapped = models
    with pytest.raises(ValueError, match=r"output_attentions: .*fastbert\.patch"):
        call(Case("Bert", "ForSequenceClassification"), swapped, output_attentions=True)


def test_a_decoder_is_refused():
    config = transformers.BertConfig(is_decoder=True, hidden_size=8, num_attention_heads=2)
    with pytest.raises(ValueError, match="is_decoder"):
        fastbert.BertEncoder(config)
