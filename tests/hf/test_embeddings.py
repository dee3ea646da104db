"""Positions of patched models: how many there are, and which tokens take one."""

import copy

import pytest
import torch
import transformers

import fastbert
from tests.hf.cases import FAMILIES

POSITIONS = 64


def pair(family, **options):
    torch.manual_seed(0)
    shape = {"vocab_size": 99, "max_position_embeddings": POSITIONS, "pad_token_id": 0}
    if family == "DistilBert":
        shape |= {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}
    else:
        shape |= {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        shape |= {"intermediate_size": 32}
    config = getattr(transformers, f"{family}Config")(**shape | options)
    model = getattr(transformers, f"{family}Model")(config).eval()
    return model, fastbert.patch(copy.deepcopy(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_more_tokens_than_positions_are_one_clear_error(family):
    theirs, ours = pair(family)
    rows = POSITIONS
    if hasattr(theirs.embeddings, "padding_idx"):  # RoBERTa's count from behind it
        rows -= 1 + theirs.embeddings.padding_idx
    tokens = torch.randint(5, 99, (2, rows + 1))
    with pytest.raises((IndexError, RuntimeError)):
        theirs(tokens)
    with pytest.raises(ValueError, match=f"at most {rows} tokens a sequence.*truncate them"):
        ours(tokens)


def test_padding_takes_no_position_of_roberta():
    theirs, ours = pair("Roberta")
    tokens = torch.randint(5, 99, (2, 80))
    tokens[:, 60:] = theirs.config.pad_token_id
    batch = {"attention_mask": (tokens != theirs.config.pad_token_id).long()}
    batch["token_type_ids"] = torch.zeros_like(tokens)
    with torch.no_grad():
        expected, actual = (model(tokens, **batch).last_hidden_state for model in (theirs, ours))
    torch.testing.assert_close(actual[:, :60], expected[:, :60], rtol=1e-4, atol=1e-5)


def test_padding_without_a_mask_has_robertas_position_of_padding():
    theirs, ours = pair("Roberta")
    tokens = torch.randint(5, 99, (2, 9))
    tokens[:, 4] = tokens[1, 7:] = theirs.config.pad_token_id
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens)[0], theirs(tokens)[0], rtol=1e-4, atol=1e-5)


def test_another_buffer_of_types_counts():
    theirs, ours = pair("Bert")
    tokens = torch.randint(5, 99, (2, 9))
    with torch.no_grad():
        ours(tokens)
        ones = torch.ones(1, POSITIONS, dtype=torch.long)
        while ones._version < ours.embeddings.token_type_ids._version:
            ones.add_(0)  # as often changed in place as the first
        theirs.embeddings.token_type_ids = ours.embeddings.token_type_ids = ones
        torch.testing.assert_close(ours(tokens)[0], theirs(tokens)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["Model", "ForMaskedLM", "ForSequenceClassification"])
def test_a_model_without_types_takes_them_as_hugging_faces_does(kind):
    """transformers 5 ignores them, which BERT's tokenizer returns; 4.57 refuses them."""
    torch.manual_seed(0)
    shape = {"vocab_size": 99, "dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}
    theirs = getattr(transformers, f"DistilBert{kind}")(transformers.DistilBertConfig(**shape))
    ours, ids, found = fastbert.patch(copy.deepcopy(theirs)), torch.randint(5, 99, (2, 8)), []
    for model in (theirs.eval(), ours.eval()):
        try:
            found.append(model(input_ids=ids, token_type_ids=torch.ones_like(ids))[0])
        except TypeError as error:
            found.append(str(error).partition(") ")[2])
    if isinstance(found[0], str):
        assert found[1] == found[0]
    else:
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dropout_of_embeddings_alone_is_one_mask_a_sequence(family):
    """However long those before it in the batch are."""
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if family == "DistilBert":
        options = {"dropout": 0.0, "attention_dropout": 0.0}
    _, model = pair(family, **options)
    model.train().embeddings.dropout.p = 0.5
    ids, found = torch.randint(5, 99, (2, 7)), []
    for first in (4, 7):
        mask = torch.arange(7) < torch.tensor([[first], [7]])
        torch.manual_seed(1)
        found.append(model(ids, attention_mask=mask).last_hidden_state[1])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_ensemble_by_vmap(family):
    """Whose buffers nobody can look at."""
    ids, found = torch.randint(5, 99, (2, 7)), []
    for model in pair(family, attn_implementation="eager"):
        other = copy.deepcopy(model)
        other.embeddings.word_embeddings.weight.data *= 2
        every = torch.func.stack_module_state([model, other])

        def call(parameters, buffers, model=model):
            states = (parameters, buffers)
            return torch.func.functional_call(model, states, (ids,)).last_hidden_state

        with torch.no_grad():
            found.append(torch.vmap(call)(*every))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
