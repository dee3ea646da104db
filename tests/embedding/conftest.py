"""A small random model, and a corpus of its words."""

import random
from pathlib import Path

import pytest

from tests.embedding.shards_case import WORDS
from tests.small_model import write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    words = (*WORDS, "##s", "é", "北", "!")
    shape = {"hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 40}
    directory = tmp_path_factory.mktemp("model")
    return str(write_model(directory, words, initializer_range=0.5, **shape))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """103 texts of 0 to 30 words."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(0, 30))) for _ in range(103)]
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("".join(f"{text}\n" for text in texts))
    return path
