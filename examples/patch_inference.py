"""Embeds padded sentences with a Hugging Face model, unpatched and patched."""

import torch
import transformers

import fastbert

model = transformers.BertModel(transformers.BertConfig(hidden_size=96, num_hidden_layers=2)).eval()
lengths = torch.tensor([[5], [32], [11]])
mask = torch.arange(32) < lengths  # True at real tokens; a patched model computes no others
input_ids = torch.randint(1000, 30000, (3, 32)) * mask

with torch.no_grad():
    before = model(input_ids, attention_mask=mask).last_hidden_state
    after = fastbert.patch(model)(input_ids, attention_mask=mask).last_hidden_state
torch.testing.assert_close(after[mask], before[mask], rtol=1e-4, atol=1e-5)
print((after.sum(1) / lengths).shape)  # padded positions hold zeros, so this is the mean
fastbert.explain(model, input_ids=input_ids, attention_mask=mask)  # what ran, and why
