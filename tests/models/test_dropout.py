"""Dropout of whole models: one mask a sequence, however the batch is laid out or recomputed."""

import dataclasses

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastbert import rng
from tests.models.pretraining_case import loss_and_gradients, make_batch, make_model

LENGTHS = [9, 1, 30, 4]


def hidden_states(model, batch):
    return model.bert(batch).last_hidden_state


def test_every_dropout_of_the_model_has_numbers_of_its_own(monkeypatch):
    model, batch = make_model(), make_batch(LENGTHS)
    seen = []
    original = rng.DropoutState.at

    def at(self, site):
        seen.append(site)
        return original(self, site)

    monkeypatch.setattr(rng.DropoutState, "at", at)
    model(batch)
    assert sorted(set(seen)) == list(range(1, 7))  # the embeddings have 0, each layer three


def test_a_reordered_batch_keeps_each_sequences_masks():
    model = make_model()
    ids = [40, 3, 17, 8]
    there = hidden_states(model, make_batch(LENGTHS, ids=ids)).split(LENGTHS)
    order = [2, 0, 3, 1]
    lengths = [LENGTHS[i] for i in order]
    again = hidden_states(model, make_batch(lengths, ids=[ids[i] for i in order])).split(lengths)
    for place, i in enumerate(order):
        torch.testing.assert_close(again[place], there[i])


def test_padded_packed_and_left_padded_batches_have_the_same_masks():
    model, batch = make_model(), make_batch(LENGTHS)
    sequences = batch.input_ids.split(LENGTHS)
    outputs = []
    for side in ("right", "left"):
        ids, mask = torch.zeros(2, 4, 30, dtype=torch.long)
        positions = torch.zeros(4, 30, dtype=torch.long)
        for row, tokens in enumerate(sequences):
            place = slice(len(tokens)) if side == "right" else slice(30 - len(tokens), 30)
            ids[row, place], mask[row, place] = tokens, 1
            positions[row, place] = torch.arange(len(tokens))
        torch.manual_seed(3)
        padded = model.bert(ids, mask, position_ids=positions).last_hidden_state
        outputs.append(padded[mask.bool()])
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.manual_seed(3)
    state = torch.randint(2**62, (2,))  # what the model drew
    packed = make_batch(LENGTHS, state=state.tolist())
    packed = hidden_states(model, dataclasses.replace(packed, token_type_ids=None))
    torch.testing.assert_close(outputs[0], packed)


def test_parts_of_a_batch_have_the_masks_of_the_whole():
    model = make_model()
    ids = [4, 9, 2, 7]
    whole = hidden_states(model, make_batch(LENGTHS, ids=ids)).split(LENGTHS)
    for i, length in enumerate(LENGTHS):
        part = hidden_states(model, make_batch([length], ids=[ids[i]]))
        torch.testing.assert_close(part, whole[i])


def test_steps_and_forwards_draw_anew_and_evaluation_drops_nothing():
    model = make_model()
    first = hidden_states(model, make_batch(LENGTHS))
    assert torch.equal(first, hidden_states(model, make_batch(LENGTHS)))
    assert not torch.allclose(first, hidden_states(model, make_batch(LENGTHS, state=(5, 10))))
    ids = torch.ones(2, 5, dtype=torch.long)
    torch.manual_seed(0)
    one, two = (model.bert(ids).last_hidden_state for _ in range(2))
    assert not torch.allclose(one, two)
    assert not torch.allclose(one[0], one[1])  # two sequences of the same tokens
    torch.manual_seed(0)
    assert torch.equal(model.bert(ids).last_hidden_state, one)
    model.eval()
    torch.testing.assert_close(*(model.bert(ids).last_hidden_state for _ in range(2)))


def test_activation_checkpointing_replays_the_masks():
    model, batch = make_model(), make_batch(LENGTHS)
    expected = loss_and_gradients(model, batch)
    for layer in model.bert.encoder.layer:
        inner = layer.forward
        layer.forward = lambda *args, inner=inner: checkpoint(inner, *args, use_reentrant=False)
    torch.manual_seed(99)  # the masks do not come from the generator's state
    for a, b in zip(loss_and_gradients(model, batch), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("where", [None, "embeddings.dropout", "encoder.layer.1.output.dropout"])
def test_without_a_dropout_nothing_is_drawn_from_torchs_generator(where):
    """Whose next numbers are then those that a user gets in Hugging Face's model."""
    model = make_model(dropout=0.0).train()
    if where is not None:
        model.bert.get_submodule(where).p = 0.5
    before = torch.get_rng_state()
    model(torch.tensor([[3, 4, 5]]))
    assert torch.equal(torch.get_rng_state(), before) == (where is None)


def test_layers_alone_that_drop_do_so_by_the_state_of_the_batch():
    model = make_model()
    model.bert.embeddings.dropout.p = 0.0
    before = torch.get_rng_state()
    first, second = (hidden_states(model, make_batch(LENGTHS)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.allclose(first, hidden_states(model.eval(), make_batch(LENGTHS)), atol=1e-3)


PLACES = "embeddings", "encoder.layer.0.attention.output", "encoder.layer.1.output"


@pytest.mark.parametrize("where", PLACES)
def test_the_mode_of_a_dropout_itself_counts(where):
    """As for Monte Carlo dropout, and for training without it."""
    model, batch = make_model(dropout=0.5).eval(), make_batch(LENGTHS)
    batch = dataclasses.replace(batch, dropout_state=None)
    expected = hidden_states(model, batch)
    model.bert.get_submodule(where).dropout.train()
    first, second = (hidden_states(model, batch) for _ in range(2))
    assert not torch.allclose(first, second, atol=1e-3)
    assert not torch.allclose(first, expected, atol=1e-3)
    model.train()
    for module in model.modules():
        module.train(not isinstance(module, torch.nn.Dropout))
    for layer in model.bert.encoder.layer:  # which reads a probability alone, as Hugging Face's
        layer.attention.self.eval()
    assert torch.equal(hidden_states(model, batch), expected)


@pytest.mark.parametrize("modes", [(True, False), (False, True)], ids=["attention", "dropout"])
def test_attention_drops_in_its_own_mode(modes):
    model, batch = make_model(dropout=0.5).eval(), make_batch(LENGTHS)
    expected = hidden_states(model, batch)
    attention = model.bert.encoder.layer[0].attention.self
    attention.training, attention.dropout.training = modes
    drops = not torch.allclose(hidden_states(model, batch), expected, atol=1e-3)
    assert drops == attention.training


@pytest.mark.parametrize("where", [*PLACES, "encoder.layer.0.attention.self"])
def test_what_users_put_in_the_place_of_a_dropout_counts(where):
    model, batch = make_model(dropout=0.0), make_batch(LENGTHS)
    expected, owner = hidden_states(model, batch), model.bert.get_submodule(where)
    owner.dropout = torch.nn.Identity()
    assert torch.equal(hidden_states(model, batch), expected)
    owner.dropout = torch.nn.AlphaDropout(0.5)
    assert not torch.allclose(hidden_states(model, batch), expected, atol=1e-3)
