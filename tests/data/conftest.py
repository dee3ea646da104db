"""A small corpus of made-up words, tokenised once, and corpora whose tokens are their places."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from fastbert.data import TokenizedCorpus, tokenize_corpus, train_tokenizer

FIRST_TEXT_ID = 5  # after the special tokens


@pytest.fixture(scope="session")
def documents() -> list[list[str]]:
    """80 documents of 3 to 40 sentences of 2 to 20 words."""
    rng = np.random.default_rng(0)
    syllables = ["ba", "ke", "li", "mo", "nu", "pra", "sto", "ty"]
    words = ["".join(rng.choice(syllables, rng.integers(1, 4))) for _ in range(150)]
    return [
        [" ".join(rng.choice(words, rng.integers(2, 21))) for _ in range(rng.integers(3, 41))]
        for _ in range(80)
    ]


@pytest.fixture(scope="session")
def tokenizer(documents: list[list[str]]) -> Tokenizer:
    return train_tokenizer((s for document in documents for s in document), 120)


@pytest.fixture(scope="session")
def corpus(
    documents: list[list[str]], tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> TokenizedCorpus:
    directory = tmp_path_factory.mktemp("corpus")
    return tokenize_corpus(documents, tokenizer, directory, fingerprint="made up")


@pytest.fixture(scope="session")
def numbered() -> Callable[[list[list[int]]], TokenizedCorpus]:
    """Makes a corpus from the sentence lengths of its documents, in which every token is unique.

    Token t of the corpus has the id FIRST_TEXT_ID + t.
    """

    def make(documents: list[list[int]]) -> TokenizedCorpus:
        lengths = np.array([length for document in documents for length in document])
        total = int(lengths.sum())
        return TokenizedCorpus(
            directory=Path("nowhere"),
            vocab_size=total + FIRST_TEXT_ID,
            tokens=np.arange(FIRST_TEXT_ID, total + FIRST_TEXT_ID, dtype=np.uint32),
            word_starts=np.ones(total, bool),
            sentence_offsets=np.append(0, np.cumsum(lengths)),
            document_offsets=np.append(0, np.cumsum([len(document) for document in documents])),
        )

    return make
