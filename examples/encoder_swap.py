"""Puts fastbert's encoder, with the same weights, into a Hugging Face model."""

import torch
import transformers

import fastbert

config = transformers.BertConfig(hidden_size=96, num_hidden_layers=2)
model = transformers.BertForMaskedLM(config).eval()
input_ids = torch.randint(1000, 30000, (2, 16))
before = model(input_ids).logits

weights = model.bert.encoder.state_dict()
model.bert.encoder = fastbert.BertEncoder(model.config).eval()
model.bert.encoder.load_state_dict(weights, strict=True)
torch.testing.assert_close(model(input_ids).logits, before, rtol=1e-4, atol=1e-5)
