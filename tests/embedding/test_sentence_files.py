"""What the files of sentence-transformers say is what `fastbert embed` computes."""

import json

import numpy as np
import pytest

from fastbert.check import InputError
from fastbert.embedding.array import embed
from fastbert.embedding.sentence_files import SentenceFiles
from tests.small_model import write_model, write_pipeline

TEXTS = ["the film was good", "a", "john lives in paris , the cat does not"]
PROMPTS = {"prompts": {"query": "good : "}, "default_prompt_name": "query"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def texts(write):
    return write("texts.txt", "".join(f"{text}\n" for text in TEXTS))


def test_a_real_models_vectors_are_those_of_sentence_transformers(minilm, write):
    library = pytest.importorskip("sentence_transformers")
    texts = [*TEXTS, "word " * 400, "深度学习 is no replacement"]  # the model's files cut at 256
    theirs = library.SentenceTransformer(str(minilm), device="cpu").encode(texts)
    file = write("texts.txt", "".join(f"{text}\n" for text in texts))
    ours = embed(minilm, file, truncate=True, precision="fp32")
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_the_files_say_what_the_user_does_not(model, texts, write, tmp_path):
    modules = ("Transformer", "Pooling", "Normalize")
    directory = write_pipeline(model, tmp_path / "p", modules, prompts=PROMPTS, max_seq_length=16)
    prompted = write("prompted.txt", "".join(f"good : {text}\n" for text in TEXTS))
    plain = embed(model, prompted, pooling="cls", precision="fp32")
    scaled = plain / np.linalg.norm(plain, axis=1, keepdims=True)
    np.testing.assert_allclose(embed(directory, texts, precision="fp32"), scaled, atol=1e-6)
    given = {"pooling": "mean", "normalize": False, "precision": "fp32"}
    mean = embed(model, prompted, **given)
    np.testing.assert_allclose(embed(directory, texts, **given), mean, atol=1e-6)
    assert np.abs(mean - plain).max() > 0.01
    with pytest.raises(InputError, match="more than the 16"):
        embed(directory, write("long.txt", "a " * 20), precision="fp32")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"modules": ("Transformer", "Pooling", "Dense")}, "a Dense module"),
        ({"pooling": {"pooling_mode_max_tokens": True}}, "uses the pooling max_tokens"),
        ({"pooling": {"pooling_mode": ["mean", "cls"]}}, "uses the pooling mean and cls"),
        ({"pooling": {"pooling_mode": "lasttoken"}}, "uses the pooling lasttoken"),
        ({"pooling": {"pooling_mode": "mean", "include_prompt": False}}, "include_prompt"),
        ({"prompts": {"default_prompt_name": "query"}}, "has no prompt 'query'"),
        ({"do_lower_case": True}, "do_lower_case"),
    ],
)
def test_a_pipeline_that_is_not_computed_here_is_an_error(model, texts, tmp_path, options, said):
    directory = write_pipeline(model, tmp_path / "pipeline", **options)
    with pytest.raises(InputError, match=said):
        SentenceFiles.read(directory)
    with pytest.raises(InputError, match=said):
        embed(directory, texts)


@pytest.mark.parametrize("kinds", [("Transformer", "Pooling"), ("Transformer",)], ids=len)
@pytest.mark.parametrize(
    ("ours", "tokenizers", "limit"),
    [
        ({"max_seq_length": 16}, {"model_max_length": 32}, 16),
        ({"max_seq_length": None}, {"model_max_length": 16}, 16),
        ({}, {"model_max_length": 16.0}, 16),
        ({}, {"model_max_length": int(1e30)}, None),
        ({"max_seq_length": float("inf")}, {}, None),
        ({}, {}, None),
    ],
)
def test_the_limit_may_be_the_tokenizers(model, tmp_path, kinds, ours, tokenizers, limit):
    directory = write_pipeline(model, tmp_path / "pipeline", kinds, **ours)
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizers))
    assert SentenceFiles.read(directory).max_seq_len == limit


@pytest.mark.parametrize("limit", ["16", True, [16], 2, -1, float("nan")])
def test_a_limit_that_is_none_is_an_error(model, tmp_path, limit):
    directory = write_pipeline(model, tmp_path / "pipeline", max_seq_length=limit)
    with pytest.raises(InputError, match=r"bert_config.json: max_seq_length: .* at least 3, got"):
        SentenceFiles.read(directory)
    (directory / "sentence_bert_config.json").unlink()
    (directory / "tokenizer_config.json").write_text(json.dumps({"model_max_length": limit}))
    with pytest.raises(InputError, match=r"tokenizer_config.json: model_max_length: .* 3, got"):
        SentenceFiles.read(directory)


def test_a_model_that_sentence_transformers_saved_is_cut_alike(model, write, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    theirs = library.SentenceTransformer(str(model), device="cpu")
    theirs.max_seq_length = 16
    theirs.save(str(tmp_path / "saved"))
    vectors = theirs.encode(["good film " * 20, "a"])
    file = write("texts.txt", "good film " * 20 + "\na\n")
    ours = embed(tmp_path / "saved", file, truncate=True, precision="fp32")
    np.testing.assert_allclose(ours, vectors, rtol=0, atol=1e-5)


def test_a_model_without_such_files_pools_its_tokens(model):
    assert SentenceFiles.read(model) == SentenceFiles(None, False, None, {}, None)
