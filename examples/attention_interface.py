"""The attention alone, in any Hugging Face encoder whose attention can be chosen."""

import torch
from transformers import ViTConfig, ViTModel

import fastbert

fastbert.register_attention()
config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32)
model = ViTModel(config).eval()
pixels = torch.randn(2, 3, 32, 32)
expected = model(pixels).last_hidden_state
model.set_attn_implementation("fastbert")
torch.testing.assert_close(model(pixels).last_hidden_state, expected)
