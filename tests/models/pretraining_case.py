"""A small model and packed batches for tests of whole models."""

import torch

import fastbert
from fastbert.packing import PackedBatch

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}


def make_model(dropout=0.1, device="cpu", **changes) -> fastbert.BertForPreTraining:
    torch.manual_seed(0)
    config = fastbert.BertConfig(
        **SHAPE | changes, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
    )
    model = fastbert.BertForPreTraining(config)
    for parameter in model.parameters():  # biases and LayerNorm too, so that none can be dropped
        parameter.data += 0.1 * torch.randn_like(parameter)
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
