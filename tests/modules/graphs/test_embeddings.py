"""In inference a graph begins with the embeddings of a patched model, if it can compute them."""

import pytest
import torch
from torch import nn

from fastbert.modules.graphs import buckets
from fastbert.ops.embedding import embedding_layer_norm
from tests.modules.graphs.case import SHAPE, batch, logits, models, step

KINDS = ("Bert", "Roberta", "DistilBert", "Electra")
INPUTS = batch([7, 3, 5])


@pytest.fixture
def embedded(monkeypatch):
    """Counts the calls of the operator, which a replay leaves out."""
    calls, run = [], embedding_layer_norm.run
    monkeypatch.setattr(embedding_layer_norm, "run", lambda call: (calls.append(1), run(call))[1])
    return calls


def pair(kind="Bert", **options):
    plain, recorded = (model.eval() for model in models(kind, **options))
    logits(recorded, INPUTS)
    return plain, recorded


@pytest.mark.parametrize("kind", KINDS)
def test_a_replay_embeds_without_python(kind, recorder, embedded):
    # ELECTRA's small models project narrower embeddings, before the graph
    options = {"embedding_size": SHAPE["hidden_size"]} if kind == "Electra" else {}
    plain, recorded = pair(kind, **options)
    embedded.clear()
    for seed in (1, 2):
        inputs = batch([6, 4, 5], seed)
        actual = logits(recorded, inputs)
        assert not embedded
        torch.testing.assert_close(actual, logits(plain, inputs))
        embedded.clear()
    assert recorder.recorded == 1


@pytest.mark.parametrize("name", ["token_type_ids", "position_ids"])
def test_ids_that_are_given_are_copied_in(name, recorder, embedded):
    plain, recorded = pair()
    ids = torch.randint(2, INPUTS["input_ids"].shape)
    given = {**INPUTS, name: ids}
    for _ in range(2):
        torch.testing.assert_close(logits(recorded, given), logits(plain, given))
    # types of the default zeros have no tensor to copy, so they have another graph
    assert recorder.recorded == (2 if name == "token_type_ids" else 1)


def test_tables_that_change_in_place_are_read_anew(recorder):
    plain, recorded = pair()
    for model in (plain, recorded):
        with torch.no_grad():
            model.bert.embeddings.word_embeddings.weight.mul_(1.5)
            model.bert.embeddings.LayerNorm.bias.add_(0.5)
    torch.testing.assert_close(logits(recorded, INPUTS), logits(plain, INPUTS))
    assert recorder.recorded == 1


def test_a_graph_of_another_table_is_dropped_as_it_would_keep_the_table(recorder):
    plain, recorded = pair()
    torch.manual_seed(1)
    plain.resize_token_embeddings(70, mean_resizing=False)
    recorded.resize_token_embeddings(70, mean_resizing=False)
    recorded.load_state_dict(plain.state_dict())
    torch.testing.assert_close(logits(recorded, INPUTS), logits(plain, INPUTS))
    assert recorder.recorded == 2
    assert len(buckets.pool_of(None).used) == 1


@pytest.mark.parametrize("name", ["word_embeddings", "position_embeddings", "LayerNorm"])
def test_a_table_in_other_memory_is_recorded_anew(name, recorder):
    plain, recorded = pair()
    for model in (plain, recorded):
        weight = getattr(model.bert.embeddings, name).weight
        weight.data = weight.data * 1.5
    torch.testing.assert_close(logits(recorded, INPUTS), logits(plain, INPUTS))
    assert recorder.recorded == 2


@pytest.mark.parametrize("change", ["hook", "scale", "eps", "dtype"])
def test_other_embeddings_are_computed_before_the_graph_or_recorded_anew(change, recorder):
    plain, recorded = pair()
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


def test_states_and_training_have_the_embeddings_outside(recorder, embedded):
    plain, recorded = pair()
    for _ in range(2):
        embedded.clear()
        with torch.no_grad():
            states = recorded(**INPUTS, output_hidden_states=True).hidden_states
        assert embedded
    with torch.no_grad():
        expected = plain(**INPUTS, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states, expected)
    plain.train()
    recorded.train()
    for a, e in zip(step(recorded, INPUTS), step(plain, INPUTS), strict=True):
        torch.testing.assert_close(a, e)


def test_dropout_that_alone_is_in_training_mode_is_drawn_in_each_call(recorder, embedded):
    """As for Monte Carlo dropout. A graph would replay the mask of the call that was recorded."""
    _, recorded = pair()
    recorded.bert.embeddings.dropout.train().p = 0.5
    embedded.clear()
    torch.manual_seed(1)
    with torch.no_grad():
        first, second = (recorded(**INPUTS).logits for _ in range(2))
    assert not torch.equal(first, second)
    assert len(embedded) == 2


def test_embeddings_that_are_given_have_a_graph_of_their_own(recorder):
    plain, recorded = pair()
    embeds = {"inputs_embeds": torch.randn(3, 7, SHAPE["hidden_size"])}
    given = {**embeds, "attention_mask": INPUTS["attention_mask"]}
    for inputs in (given, INPUTS, given):
        torch.testing.assert_close(logits(recorded, inputs), logits(plain, inputs))
    assert recorder.recorded == 2
