"""A small model, patched and not, and whether a change of it counts the same in both."""

import copy

import torch
import transformers

import fastbert

FAMILIES = ("Bert", "Roberta", "DistilBert")
MASK = (torch.arange(10) < torch.tensor([[10], [7], [4]])).long()
REAL = MASK.bool()


def pair(family="Bert", kind="Model", **options):
    torch.manual_seed(0)
    shape = {"vocab_size": 99, "max_position_embeddings": 64, "pad_token_id": 0}
    if family == "DistilBert":
        shape |= {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128}
    else:
        shape |= {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
        }
    config = getattr(transformers, f"{family}Config")(**shape | options)
    model = getattr(transformers, f"{family}{kind}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model, fastbert.patch(copy.deepcopy(model))


def ids():
    torch.manual_seed(1)
    return torch.randint(5, 99, MASK.shape).masked_fill(~REAL, 0)


def states(model, **options):
    return model(ids(), attention_mask=MASK, **options).last_hidden_state[REAL]


def assert_alike(change, family, **options):
    """The change counts, and counts the same patched and unpatched; returns the patched model."""
    theirs, ours = pair(family, **options)
    with torch.no_grad():
        before = states(theirs)
        change(theirs)
        change(ours)
        expected = states(theirs)
        assert not torch.allclose(before, expected, atol=1e-4)
        torch.testing.assert_close(states(ours), expected, rtol=1e-4, atol=1e-5)
    return ours
