"""A small model and packed batches for tests of whole models."""

import copy

import torch

import fastbert
from fastbert import backend
from fastbert.packing import PackedBatch

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}


def make_model(dropout=0.1, device="cpu", noise=0.1, **changes) -> fastbert.BertForPreTraining:
    """noise: what is added to all weights, so that no bias or LayerNorm could be left out unseen.

    BERT's own weights have a deviation of 0.02. Much more in a deep model makes gradients in the
    thousands, which float32 knows to a few digits only.
    """
    torch.manual_seed(0)
    config = fastbert.BertConfig(
        **SHAPE | changes, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
    )
    model = fastbert.BertForPreTraining(config)
    for parameter in model.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    return model.to(device).train()


def make_batch(lengths, *, seed=1, vocab_size=61, state=(5, 9), ids=None) -> PackedBatch:
    """Sequences whose tokens depend on their ids alone, in the given order."""
    ids = list(range(len(lengths))) if ids is None else ids
    rows = []
    for number, length in zip(ids, lengths, strict=True):
        generator = torch.Generator().manual_seed(seed * 1000 + number)
        tokens, types = torch.randint(0, vocab_size, (2, length), generator=generator)
        labels = tokens.where(torch.rand(length, generator=generator) < 0.4, -100)
        labels[:1] = tokens[:1]
        rows.append((tokens, types % 2, labels, torch.arange(length)))
    tokens, types, labels, positions = map(torch.cat, zip(*rows, strict=True))
    return PackedBatch(
        input_ids=tokens,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        max_seqlen=max(lengths),
        position_ids=positions,
        token_type_ids=types,
        labels=labels,
        num_labels=int((labels >= 0).sum()),
        next_sentence_label=torch.tensor(ids) % 2,
        sequence_ids=torch.tensor(ids),
        dropout_state=torch.tensor(state),
    )


def loss_and_gradients(model, batch) -> list[torch.Tensor]:
    loss = model(batch).loss
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def plain_loss_and_gradients(model, batch) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """By the plain bodies: in float64, the truth, and in float32."""
    with backend.use("reference"):
        truth = loss_and_gradients(copy.deepcopy(model).double(), batch)
        return truth, loss_and_gradients(model, batch)


def errors_by_limit(model, actual, expected, truth) -> dict[str, float]:
    """By name, how many times eight of the plain bodies' errors in float32 each result is wrong.

    At most 1 is right: the products of a kernel may be of three tf32.
    """
    found = {}
    names = ["loss", *(name for name, _ in model.named_parameters())]
    for name, a, e, t in zip(names, actual, expected, truth, strict=True):
        assert a.dtype == e.dtype == torch.float32, name
        assert a.isfinite().all(), name
        limit = 8 * (e - t).abs().max() + 1e-6 * t.abs().max() + 1e-9
        found[name] = ((a - t).abs().max() / limit).item()
    return found
