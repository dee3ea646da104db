"""How texts are tokenised, grouped and batched."""

import random
import shutil

import numpy as np
import pytest
import torch
from tokenizers import normalizers, pre_tokenizers

from fastbert.data import load_tokenizer
from fastbert.data.formats.texts import Mark, Text
from fastbert.embedding import model as embedder_module
from fastbert.embedding import shards
from fastbert.embedding.model import Embedder
from fastbert.modules.products import PRODUCTS
from fastbert.modules.products.weight_copies import WeightCopies
from tests.embedding.shards_case import OPTIONS, WORDS


def embedder_of(model, **options) -> Embedder:
    return Embedder(model, torch.device("cpu"), **OPTIONS | options)


def test_of_a_long_text_only_the_beginning_is_tokenised(model, monkeypatch):
    """With the tokens that the whole text gives."""
    monkeypatch.setattr(embedder_module, "_CHARACTERS", 1)
    cut = embedder_of(model, truncate=True, max_seq_len=12)
    whole = embedder_of(model, truncate=True, max_seq_len=12)
    whole.divides_at_blanks = False
    draw = random.Random(1)
    pieces = [
        *WORDS[:20],
        "é",
        "e\u0301",
        "北",
        "!",
        "\t",
        "[MASK]",
        "xyz",
        "\u0301",
        "\u00a0",
        "İ",
    ]
    lengths = set()
    for _ in range(300):
        texts = [
            draw.choice([" ", "", "  "]).join(draw.choices(pieces, k=draw.randint(0, 40)))
            for _ in range(3)
        ]
        found = cut._ids(texts)
        assert found == whole._ids(texts)
        lengths.update(map(len, found))
    assert {0, 10} < lengths
    assert cut._end("bal " * 10) is not None
    word = ["北" * 9 + "bal"]  # without a blank, where the beginning would end inside a word
    assert cut._ids(word) == whole._ids(word)


@pytest.mark.parametrize(
    "part",
    [{"normalizer": normalizers.Lowercase()}, {"pre_tokenizer": pre_tokenizers.Punctuation()}],
)
def test_a_tokenizer_that_may_not_divide_at_blanks_reads_whole_texts(model, part, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    assert embedder_of(tmp_path / "model", truncate=True).divides_at_blanks
    tokenizer = load_tokenizer(model)
    for name, value in part.items():
        setattr(tokenizer, name, value)
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.unlink()
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    assert not embedder_of(tmp_path / "model", truncate=True).divides_at_blanks


def test_vectors_are_pooled_in_float32(model):
    texts = [Text("", "bal dap bal", Mark())]
    vectors = torch.from_numpy(embedder_of(model, precision="bf16")(texts))
    assert (vectors.bfloat16().float() != vectors).any()


def test_all_that_decides_a_vector_is_in_its_identity(model):
    embedder = embedder_of(model)
    before = embedder.made_from()
    embedder.prompt = "query: "
    assert {k: v for k, v in embedder.made_from().items() if v != before[k]} == {
        "prompt": "query: "
    }


def test_a_window_is_bounded_by_rows_and_by_characters(monkeypatch):
    monkeypatch.setattr(shards, "_WINDOW_ROWS", 4)
    monkeypatch.setattr(shards, "_WINDOW_CHARACTERS", 10)
    texts = [Text("", "x" * n, Mark()) for n in (1, 1, 1, 1, 1, 9, 20, 3)]
    found = [[len(text.text) for text in window] for window in shards.windows(iter(texts))]
    assert found == [[1, 1, 1, 1], [1, 9], [20], [3]]


def test_batches_hold_at_most_the_budget_and_texts_of_a_length(model, monkeypatch):
    embedder = embedder_of(model)
    sizes = []
    collate = embedder_module.collate

    def spied(features):
        sizes.append([feature.num_tokens for feature in features])
        return collate(features)

    monkeypatch.setattr(embedder_module, "collate", spied)
    texts = [Text("", "bal " * n, Mark()) for n in (30, 1, 20, 2, 19, 3, 38, 0) * 3]
    embedder([Text("", "xyz", Mark())])
    assert sizes.pop() == [3]
    embedder(texts)
    assert (embedder.unknown, embedder.tokens) == (1, 3 + 113 * 3 + 2 * 24)
    assert all(sum(size) <= 100 for size in sizes)
    flat = [n for size in sizes for n in size]
    assert flat == sorted(flat)
    assert len(flat) == len(texts)


def test_in_low_precision_weights_are_cast_once_and_vectors_stay_the_same(model, monkeypatch):
    assert not any(PRODUCTS in vars(one) for one in embedder_of(model).bert.modules())
    embedder, plain = (embedder_of(model, precision="bf16") for _ in range(2))
    linears = [one for one in embedder.bert.encoder.modules() if type(one) is torch.nn.Linear]
    assert all(PRODUCTS in vars(one) for one in linears)
    for one in plain.bert.modules():
        vars(one).pop(PRODUCTS, None)
    monkeypatch.setattr(WeightCopies, "renew", None)  # a batch that made copies would fail
    texts = [Text("", "bal " * n, Mark()) for n in (30, 1, 20, 2, 19, 3, 38, 0) * 3]
    assert np.array_equal(embedder(texts), plain(texts))
