"""A small random model, and a corpus of its words."""

import random
from pathlib import Path

import pytest
import torch

import fastbert
from fastbert.data import load_tokenizer, save_tokenizer
from tests.embedding.shards_case import WORDS


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("model")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "##s", "é", "北", "!"]
    (directory / "vocab.txt").write_text("".join(f"{word}\n" for word in vocabulary), "utf-8")
    save_tokenizer(load_tokenizer(directory), directory)
    torch.manual_seed(0)
    config = fastbert.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
        initializer_range=0.5,
    )
    fastbert.BertModel(config).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """103 texts of 0 to 30 words."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(0, 30))) for _ in range(103)]
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("".join(f"{text}\n" for text in texts))
    return path
