"""A small model's shape, its ids, and a checkpoint whose weights change."""

import torch
from safetensors.torch import load_file, save_file

from fastbert import checkpoint

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}
IDS = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(0))


def rewrite(directory, change):
    weights = load_file(directory / checkpoint.WEIGHTS)
    change(weights)
    save_file(weights, directory / checkpoint.WEIGHTS)


QUERY = "bert.encoder.layer.1.attention.self.query.weight"
