"""A small model's sizes, batches with padding for it, and an export onto a full disk."""

import resource
from pathlib import Path

import torch

from fastbert.check import InputError
from fastbert.export import command

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,  # so that scores differ by far more than the tolerance
}


def padded(side: str, *lead: int, length: int = 13, types: int = 2) -> dict[str, torch.Tensor]:
    """Batches of which no row is whole, of a size that is neither traced nor checked."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, length, lead, generator=generator)
    column = torch.arange(length)
    column = column if side == "right" else column.flip(0)
    shape = (*lead, length)
    return {
        "input_ids": torch.randint(60, shape, generator=generator),
        "attention_mask": (column < lengths[..., None]).long(),
        "token_type_ids": torch.randint(types, shape, generator=generator),
    }


def export_to_a_full_disk(directory: Path, out: Path) -> None:
    """In a process of its own, which the limit and a failing destructor of torch's may end."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    try:
        command.export(directory, out, to="torch")
    except InputError as error:
        print(error)
