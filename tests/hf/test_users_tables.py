"""Positions, segments and options of embeddings that a user sets count as without `patch`."""

import pytest
import torch

import fastbert
from tests.hf.changes import OPTIONS
from tests.hf.promises_case import FAMILIES, MASK, REAL, assert_alike, ids, pair, states


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


def pair_of(kind, family):
    theirs, ours = pair(family)
    if kind == "own":
        ours = fastbert.BertModel(theirs.config).eval()
        ours.load_state_dict(theirs.state_dict())
    return theirs, ours


KINDS = pytest.mark.parametrize(
    ("kind", "family"), [*(("patched", family) for family in FAMILIES), ("own", "Bert")]
)
TABLES = pytest.mark.parametrize("table", ["word_embeddings", "position_embeddings"])


@TABLES
@pytest.mark.parametrize("option", OPTIONS)
@KINDS
def test_options_of_an_embedding_count(kind, family, option, table):
    found = []
    for model in pair_of(kind, family):
        for name, value in option.items():
            setattr(getattr(model.embeddings, table), name, value)
        model.embeddings.word_embeddings.weight.data[3] += 9
        padded = ids().where(REAL, torch.tensor(3))  # by what the user likes
        out = model(padded, attention_mask=MASK).last_hidden_state[REAL]
        out.square().sum().backward()
        weight = getattr(model.embeddings, table).weight
        assert weight.grad.is_sparse == ("sparse" in option)
        found.append((out, weight.detach(), weight.grad.to_dense()))
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("part", ["word_embeddings", "position_embeddings", "LayerNorm"])
@KINDS
def test_a_hook_of_a_part_sees_the_padded_batch(kind, family, part):
    found = []
    for model in pair_of(kind, family):
        seen = []
        module = getattr(model.embeddings, part)
        module.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
        with torch.no_grad():
            states(model)
        (output,) = seen
        found.append(output if len(output) == 1 else output[REAL])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


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
