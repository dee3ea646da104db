"""What changes between two replays of a padded batch is seen, and what no graph computes runs."""

import functools
import gc

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrize

from fastbert.hf import encode
from fastbert.modules.graphs import buckets
from tests.hf.changes import ByLength
from tests.modules.graphs.case import SHAPE, Repeats, layers_of, logits, models, use
from tests.modules.graphs.padded_case import INPUTS, NARROW, pair

BOTH = pytest.mark.parametrize("kind", ["own", "Bert"])


@BOTH
def test_tables_that_change_in_place_are_read_anew(kind, recorder):
    plain, recorded = pair(kind)
    for model in (plain, recorded):
        with torch.no_grad():
            model.bert.embeddings.word_embeddings.weight.mul_(1.5)
            model.bert.embeddings.LayerNorm.bias.add_(0.5)
    torch.testing.assert_close(logits(recorded, INPUTS), logits(plain, INPUTS))
    assert recorder.recorded == 1


@BOTH
def test_a_graph_keeps_no_table_that_the_model_has_no_more(kind, monkeypatch):
    recorder = use(Repeats(again=False), monkeypatch)
    _, recorded = pair(kind)
    memory = StorageWeakRef(recorded.get_input_embeddings().weight.untyped_storage())
    recorded.resize_token_embeddings(70, mean_resizing=False)
    logits(recorded, INPUTS)
    gc.collect()
    assert recorder.recorded == 2
    assert memory.expired()


@BOTH
@pytest.mark.parametrize("name", ["word_embeddings", "position_embeddings", "LayerNorm"])
def test_a_table_in_other_memory_is_recorded_anew(kind, name, recorder):
    plain, recorded = pair(kind)
    for model in (plain, recorded):
        weight = getattr(model.bert.embeddings, name).weight
        weight.data = weight.data * 1.5
    torch.testing.assert_close(logits(recorded, INPUTS), logits(plain, INPUTS))
    assert recorder.recorded == 2


@BOTH
@pytest.mark.parametrize("change", ["hook", "scale", "eps", "dtype"])
def test_other_embeddings_are_computed_before_the_graph_or_recorded_anew(kind, change, recorder):
    plain, recorded = pair(kind)
    for model in (plain, recorded):
        embeddings = model.bert.embeddings
        if change == "hook":
            embeddings.LayerNorm.register_forward_hook(lambda module, args, output: output * 2)
        elif change == "scale":
            embeddings.word_embeddings = nn.Embedding(61, SHAPE["hidden_size"], max_norm=0.01)
            nn.init.ones_(embeddings.word_embeddings.weight)
        elif change == "eps":
            embeddings.LayerNorm.eps = 0.5
        else:
            model.double()
    for _ in range(2):
        torch.testing.assert_close(logits(recorded, INPUTS), logits(plain, INPUTS))
    assert recorder.recorded == 2


@pytest.mark.parametrize("change", ["moved weight", "moved bias", "other weight", "hook", "class"])
def test_a_projection_of_embeddings_is_that_of_now(change, recorder):
    both = pair("Electra", **NARROW)
    before = logits(both[0], INPUTS)
    for model in both:
        projection = model.electra.embeddings_project
        torch.manual_seed(3)
        nn.init.normal_(projection.bias)
        logits(model, INPUTS)
        torch.manual_seed(4)
        if change.startswith("moved"):
            parameter = getattr(projection, change.removeprefix("moved "))
            parameter.data = parameter.data * 1.5
        elif change == "other weight":
            projection.weight = nn.Parameter(torch.randn_like(projection.weight))
        elif change == "hook":
            projection.register_forward_hook(lambda module, args, output: output * 2)
        else:
            model.electra.embeddings_project = nn.Sequential(nn.Linear(16, 32), nn.Tanh())
    plain, recorded = both
    for _ in range(2):
        actual = logits(recorded, INPUTS)
        torch.testing.assert_close(actual, logits(plain, INPUTS))
    assert not torch.allclose(actual, before)
    assert recorder.recorded == 2


@BOTH
def test_dropout_that_alone_is_in_training_mode_is_drawn_in_each_call(kind, recorder, embedded):
    """As for Monte Carlo dropout. A graph would replay the mask of the call that was recorded."""
    _, recorded = pair(kind)
    recorded.bert.embeddings.dropout.train().p = 0.5
    embedded.clear()
    torch.manual_seed(1)
    with torch.no_grad():
        first, second = (recorded(**INPUTS).logits for _ in range(2))
    assert not torch.equal(first, second)
    assert len(embedded) == 2


@BOTH
@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification"])
def test_dropouts_of_layers_in_training_mode_draw_alike_with_a_graph_and_without(
    kind, head, recorder
):
    """The first call still assumes the layers of before; a recording must draw nothing either."""
    both = [model.eval() for model in models(kind, head)]
    logits(both[1], INPUTS)
    for model in both:
        for one in layers_of(model).modules():
            one.training = isinstance(one, nn.Dropout)
    found = [[logits(model, INPUTS) for _ in range(3)] for model in both]
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected)
    with torch.no_grad():
        assert not torch.equal(both[1](**INPUTS).logits, both[1](**INPUTS).logits)


@BOTH
@pytest.mark.parametrize("changes", ["hook on a layer", "hook on the encoder", "mode", "forward"])
def test_what_no_graph_computes_is_seen_by_the_next_call(kind, changes, recorder):
    plain, recorded = pair(kind)
    for model in (plain, recorded):
        layer = model.bert.encoder.layer[1]
        if changes == "hook on a layer":
            layer.register_forward_hook(lambda module, args, output: output * 2)
        elif changes == "hook on the encoder":
            model.bert.encoder.register_forward_hook(lambda module, args, output: output)
        elif changes == "mode":
            layer.attention.self.dropout.p = 0.0
            layer.train()
        else:
            layer.forward = functools.partial(type(layer).forward, layer)
    for _ in range(2):
        torch.testing.assert_close(logits(recorded, INPUTS), logits(plain, INPUTS))


@BOTH
def test_a_forward_that_a_layer_was_given_runs(kind, recorder):
    """Nothing tells before the replay; the layers are then read anew, and called."""
    plain, recorded = pair(kind)
    before = logits(recorded, INPUTS)
    for model in (plain, recorded):
        layer = model.bert.encoder.layer[1]
        own = layer.forward
        layer.forward = lambda x, *args, own=own, **kwargs: own(x * 2, *args, **kwargs)
    for _ in range(2):  # the second is told by the plan
        found = logits(recorded, INPUTS)
        torch.testing.assert_close(found, logits(plain, INPUTS))
        assert not torch.allclose(found, before)


def test_a_users_own_defaults_of_types_and_positions_are_read(recorder):
    plain, recorded = pair()
    for number in range(2):
        for model in (plain, recorded):
            model.bert.embeddings.position_ids.copy_(torch.arange(160).flip(0)[None] - number)
            if number:
                model.bert.embeddings.token_type_ids.fill_(1)
        torch.testing.assert_close(logits(recorded, INPUTS), logits(plain, INPUTS))


def test_another_buffer_of_positions_is_recorded_anew(recorder):
    plain, recorded = pair()
    for model in (plain, recorded):
        model.bert.embeddings.position_ids = torch.arange(160).flip(0)[None]
    torch.testing.assert_close(logits(recorded, INPUTS), logits(plain, INPUTS))
    assert recorder.recorded == 2


def test_a_pooler_of_the_users_own_reads_all_tokens(recorder):
    inputs = {**INPUTS, "attention_mask": INPUTS["attention_mask"].flip(1)}
    found = []
    for model in models("Bert", "Model"):
        model.eval().pooler = ByLength()
        with torch.no_grad():
            found.append(model(**inputs).pooler_output)
    torch.testing.assert_close(*found)
    assert recorder.replayed == 1


@pytest.mark.parametrize("reason", ["graphs=False", "FASTBERT_GRAPHS", "hook", "leaf", "training"])
def test_layers_that_no_graph_computes_cost_no_second_look_at_the_batch(
    reason, recorder, monkeypatch
):
    plain, recorded = pair()
    layer = recorded.bert.encoder.layer[1]
    if reason == "graphs=False":
        buckets.allow(recorded, False)
    elif reason == "FASTBERT_GRAPHS":
        monkeypatch.setenv("FASTBERT_GRAPHS", "0")
    elif reason == "hook":
        layer.register_forward_hook(lambda *_: None)
    elif reason == "leaf":
        parametrize.register_parametrization(layer.output.dense, "weight", nn.Identity())
    else:
        recorded.train()
        plain.train()

    logits(recorded, INPUTS)  # which sees what has changed behind a replay; later calls before it

    def fail(*_):
        raise AssertionError("a batch for no graph")

    monkeypatch.setattr(encode, "padded_batch", fail)
    torch.testing.assert_close(logits(recorded, INPUTS), logits(plain, INPUTS))
