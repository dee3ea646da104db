"""Trains fastbert's own model on a packed batch: the sentences end to end, without padding."""

import dataclasses

import torch

import fastbert

model = fastbert.BertForPreTraining(fastbert.BertConfig(hidden_size=96, num_hidden_layers=2))
sentences = [torch.randint(1000, 30000, (length,)).tolist() for length in (12, 30, 7, 21)]
batch = fastbert.PackedBatch.from_sequences(sentences)
is_masked = torch.arange(batch.num_tokens) % 7 == 1
batch = dataclasses.replace(
    batch,
    input_ids=batch.input_ids.masked_fill(is_masked, 103),  # [MASK]
    labels=batch.input_ids.where(is_masked, fastbert.IGNORE_INDEX),
    next_sentence_label=torch.tensor([0, 1, 1, 0]),
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
losses = []
for _ in range(10):
    losses.append(model(batch).loss)
    losses[-1].backward()
    optimizer.step()
    optimizer.zero_grad()
assert losses[-1] < losses[0]
