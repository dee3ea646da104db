"""Backward graphs of some layers each, so that processes exchange their gradients meanwhile."""

import pytest
import torch
from torch import nn

from fastbert.modules.graphs import pool, replays
from fastbert.modules.products import fp8
from tests.modules.graphs.case import (
    KINDS,
    Repeats,
    assert_near,
    assert_same,
    batch,
    gradients,
    layers_of,
    logits,
    models,
    step,
    use,
)

LAYERS = {"num_hidden_layers": 3}
LENGTHS = [7, 3, 5, 6]


@pytest.fixture(params=[2, 4], ids=["two", "more than layers"])
def count(request, monkeypatch):
    monkeypatch.setattr(replays, "num_segments", lambda: request.param)
    monkeypatch.setattr(pool, "num_segments", lambda: request.param)
    return min(request.param, LAYERS["num_hidden_layers"])


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForMaskedLM"])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_have_the_same_losses_and_gradients(kind, head, count, recorder):
    plain, recorded = (model.train() for model in models(kind, head, **LAYERS))
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (plain, recorded)]
    for number, lengths in enumerate([LENGTHS, [9, 8, 2, 1], LENGTHS]):
        inputs = batch(lengths, number)
        labels = None
        if head == "ForMaskedLM":
            labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        assert_same(step(recorded, inputs, labels), step(plain, inputs, labels))
        for optimizer in optimizers:
            optimizer.step()
    assert recorder.recorded == 1 + count
    assert recorder.replayed == 3 * (1 + count)


@pytest.mark.parametrize("kind", ["own", "Bert"])
def test_hidden_states_of_all_segments(kind, count, recorder):
    plain, recorded = (model.train() for model in models(kind, "Model", **LAYERS))
    for number, used in enumerate([range(4), [0, 3], [1, 3], [2], [1]]):
        found = []
        for model in (recorded, plain):
            torch.manual_seed(3)
            model.zero_grad()
            output = model(**batch(LENGTHS, number), output_hidden_states=True)
            sum(output.hidden_states[one].sin().sum() for one in used).backward()
            found.append([*output.hidden_states, *gradients(model)])
        assert_near(*found)
    assert recorder.recorded == 1 + 3  # a segment ends with each state


def test_gradients_of_later_layers_come_first(count, recorder):
    _, model = models("Bert", **LAYERS)
    replayed = {}

    def hook(number):
        def note(parameter):
            replayed.setdefault(number, recorder.replayed)

        return note

    for number, layer in enumerate(layers_of(model)):
        for parameter in layer.parameters():
            parameter.register_post_accumulate_grad_hook(hook(number))
    step(model.train(), batch(LENGTHS))
    # the forward was replayed once; the layers of a segment come together
    assert [replayed[2], replayed[1], replayed[0]] == ([2, 3, 4] if count == 3 else [2, 2, 3])


def frozen_below(model):
    model.get_input_embeddings().requires_grad_(False)
    model.base_model.embeddings.requires_grad_(False)
    layers_of(model)[0].requires_grad_(False)


def frozen_layers(model):
    layers_of(model).requires_grad_(False)


def frozen_above(model):
    layers_of(model)[1].requires_grad_(False)
    layers_of(model)[2].requires_grad_(False)


def shared(model):
    layers = layers_of(model)
    layers[2].output.dense.weight = layers[0].output.dense.weight


def without_bias(model):
    layers_of(model)[1].intermediate.dense.bias = None


def without_a_norms_bias(model):
    layers_of(model)[1].attention.output.LayerNorm.bias = None


@pytest.mark.parametrize(
    "change",
    [frozen_below, frozen_layers, frozen_above, shared, without_bias, without_a_norms_bias],
)
@pytest.mark.parametrize("kind", ["own", "Bert"])
def test_parameters_that_are_frozen_shared_or_missing(kind, change, count, recorder):
    plain, recorded = (model.train() for model in models(kind, **LAYERS))
    for model in (plain, recorded):
        change(model)
    for number in range(2):
        inputs = batch(LENGTHS, number)
        assert_same(step(recorded, inputs), step(plain, inputs))
    assert recorder.replayed >= 4
    logits(recorded, inputs)
    # the forward is no longer waiting, though a segment of frozen layers has no backward
    assert len(recorder.lanes) == 1


def test_several_forwards_before_a_backward(count, recorder):
    found = []
    for model in models("Bert", **LAYERS):
        torch.manual_seed(3)
        outputs = [model.train()(**batch(LENGTHS, number)).logits for number in range(3)]
        torch.stack(outputs).softmax(-1).prod(0).sum().backward()
        found.append(gradients(model))
    assert_same(*found)
    assert recorder.replayed == 3 * (1 + count)


@pytest.mark.parametrize("again", [False, True], ids=["whole", "twice in part"])
def test_a_backward_of_some_layers_alone(again, count, recorder):
    """Its segment's graph has used up what the forward had saved for it."""
    found = []
    for model in models("Bert", **LAYERS):
        torch.manual_seed(3)
        loss = model.train()(**batch(LENGTHS)).logits.square().sum()
        weight = layers_of(model)[2].output.dense.weight
        parts = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for _ in range(1 + again)]
        loss.backward()
        found.append([*parts, *gradients(model)])
    assert_same(*found)


def test_a_second_backward_and_the_gradient_of_a_gradient(count, recorder):
    found = []
    for model in models("Bert", hidden_act="tanh", **LAYERS):
        model.eval()
        embedding = model.get_input_embeddings()(batch([6, 6])["input_ids"]).detach()
        embedding.requires_grad_()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            loss = model(inputs_embeds=embedding).logits.square().mean()
            loss.backward(retain_graph=True)
            (slope,) = torch.autograd.grad(loss, embedding, create_graph=True)
            slope.square().sum().backward()
        found.append([embedding.grad, *gradients(model)])
    assert_near(*found)


def test_layers_in_fp8(count, recorder, monkeypatch):
    monkeypatch.setattr(fp8, "multiplies_fp8", lambda device: True)  # which is then emulated
    plain, recorded = (model.train() for model in models("Bert", **LAYERS))
    for model in (plain, recorded):
        fp8.enable(model)
    for number in range(3):
        inputs = batch(LENGTHS, number)
        assert_same(step(recorded, inputs), step(plain, inputs))
    assert recorder.replayed == 3 * (1 + count)


def test_a_weight_that_changed_before_the_backward_is_refused_as_ever(count, monkeypatch):
    use(Repeats(again=False), monkeypatch)
    _, recorded = models("Bert", **LAYERS)
    loss = recorded.train()(**batch([7, 3])).logits.sum()
    with torch.no_grad():
        layers_of(recorded)[0].output.dense.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_process_alone_has_one_backward_graph(recorder):
    assert replays.num_segments() == 1
    step(models("Bert", **LAYERS)[1].train(), batch(LENGTHS))
    assert recorder.recorded == 2


def test_an_encoder_without_layers(count, recorder):
    found = []
    for model in models("own", num_hidden_layers=0):
        assert isinstance(layers_of(model), nn.ModuleList)
        found.append(step(model.train(), batch(LENGTHS)))
    assert_same(*found)
