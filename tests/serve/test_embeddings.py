"""Vectors over HTTP are those of sentence-transformers, of transformers and of `fastbert embed`."""

import functools
import json

import numpy as np
import openai
import pytest
import torch
import transformers

from fastbert.check import InputError
from fastbert.config.serve import ServeConfig
from fastbert.embedding.array import embed
from fastbert.modules.products import PRODUCTS
from fastbert.modules.products.weight_copies import WeightCopies
from fastbert.serve.loading import load
from tests.serve.running import running
from tests.small_model import write_pipeline

TEXTS = [
    "BERT.",
    "",
    "A man is eating food while his dog looks on.",
    "The quick brown fox jumps over the lazy dog, " * 9,
    "深度学习 is no replacement for the world's 1,024 other methods — café?",
    "a [MASK] and a half of a surrogate pair \ud83d",
]
LONG = "word " * 400


@pytest.fixture(scope="module")
def sentences(minilm):
    return pytest.importorskip("sentence_transformers").SentenceTransformer(
        str(minilm), device="cpu"
    )


@pytest.fixture(scope="module")
def client(minilm_server):
    return openai.OpenAI(base_url=f"{minilm_server.url}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("normalize", [True, False])
def test_vectors_are_those_of_sentence_transformers(minilm_server, sentences, normalize):
    texts = [text.encode("utf-8", "replace").decode() for text in [*TEXTS, LONG]]
    body = json.dumps({"inputs": [*TEXTS, LONG], "normalize": normalize, "truncate": True})
    response = minilm_server.client.post(
        "/embed", content=body, headers={"content-type": "application/json"}
    )
    assert response.status_code == 200
    ours = np.array(response.json())
    theirs = sentences.encode(texts)
    assert np.linalg.norm(theirs, axis=1) == pytest.approx(1, abs=1e-5)  # it always normalises
    if not normalize:
        assert abs(np.linalg.norm(ours, axis=1) - 1).min() > 0.1
        ours /= np.linalg.norm(ours, axis=1, keepdims=True)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_one_text_is_a_list_of_one_vector(minilm_server):
    (vector,) = minilm_server.answer("/embed", inputs="BERT.")
    assert vector == minilm_server.answer("/embed", inputs=["BERT."])[0]


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_openais_client(client, sentences, encoding):
    texts = TEXTS[:-1]
    answer = client.embeddings.create(model="any", input=texts, encoding_format=encoding, user="me")
    vectors = [one.embedding for one in answer.data]
    if encoding == "base64" and isinstance(vectors[0], str):  # the client leaves what was asked for
        import base64

        vectors = [np.frombuffer(base64.b64decode(one), "<f4") for one in vectors]
    np.testing.assert_allclose(vectors, sentences.encode(texts), rtol=0, atol=1e-5)
    assert [one.index for one in answer.data] == list(range(len(texts)))
    tokens = sum(len(sentences.tokenizer(text).input_ids) for text in texts)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == tokens


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"input": "a", "dimensions": 64}, "dimensions"),
        ({"input": [1, 2, 3]}, "not tokens"),
        ({"input": []}, "a list of texts"),
        ({"input": LONG}, "402 tokens, more than the 256"),
        ({"input": "a", "extra_body": {"odd": 1}}, "odd"),
    ],
)
def test_what_openais_client_is_told(client, options, said):
    with pytest.raises(openai.APIStatusError, match=said) as error:
        client.embeddings.create(model="any", **options)
    assert error.value.status_code == (413 if "402" in said else 422)
    assert error.value.body["type"] == "invalid_request_error"


def test_a_long_text_is_refused_or_cut(minilm_server):
    said = minilm_server.refusal("/embed", 413, inputs=["a", LONG])
    assert said == (
        'input 1: 402 tokens, more than the 256 of a sequence; cut it off with "truncate": true'
    )
    cut = minilm_server.answer("/embed", inputs=LONG, truncate=True)
    assert cut == minilm_server.answer("/embed", inputs="word " * 254)


def test_openais_route_takes_the_advice_that_it_gives(minilm_server):
    error = minilm_server.post("/v1/embeddings", input=LONG).json()["error"]
    assert error["message"].endswith('cut it off with "truncate": true')
    answer = minilm_server.answer("/v1/embeddings", input=LONG, truncate=True)
    assert answer["usage"]["total_tokens"] == 256
    (vector,) = minilm_server.answer("/embed", inputs=LONG, truncate=True)
    assert answer["data"][0]["embedding"] == pytest.approx(vector, abs=1e-6)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "inputs: Field required"),
        ({"inputs": []}, "inputs"),
        ({"inputs": [1, 2]}, "inputs"),
        ({"inputs": "a", "truncate": "yes"}, "truncate: Input should be a valid boolean"),
        ({"inputs": "a", "normalise": True}, "normalise: Extra inputs are not permitted"),
        ({"inputs": "a", "truncation_direction": "Left"}, "truncation_direction"),
        ({"inputs": "a", "prompt_name": "query"}, "no prompt 'query', expected: none, because"),
        ({"inputs": "a", "dimensions": 64}, "dimensions: the model's vectors have a fixed width"),
    ],
)
def test_what_is_wrong_with_a_request_is_said(minilm_server, body, said):
    assert said in minilm_server.refusal("/embed", 422, **body)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_pooling_is_an_option(model, write, pooling):
    texts = ["the film was good", "北京是中国的首都", "a"]
    file = write("texts.txt", "\n".join(texts) + "\n")
    with running(model, pooling=pooling, batch_tokens=20) as server:
        ours = server.answer("/embed", inputs=texts, normalize=False)
    theirs = embed(model, file, pooling=pooling, precision="fp32")
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    tokens = transformers.BertTokenizer.from_pretrained(model)(texts[0], return_tensors="pt")
    with torch.no_grad():
        (hidden,) = transformers.BertModel.from_pretrained(model)(**tokens).last_hidden_state
    expected = hidden[0] if pooling == "cls" else hidden.mean(0)
    np.testing.assert_allclose(ours[0], expected.numpy(), rtol=1e-4, atol=1e-5)


def test_in_low_precision_weights_are_cast_once_and_vectors_stay_the_same(model, monkeypatch):
    plain = load(ServeConfig(model=str(model), precision="fp32")).model
    assert not any(PRODUCTS in vars(one) for one in plain.modules())
    with running(model, precision="bf16") as server:
        bert = server.server.served.model
        linears = [one for one in bert.encoder.modules() if type(one) is torch.nn.Linear]
        assert all(PRODUCTS in vars(one) for one in linears)
        monkeypatch.setattr(WeightCopies, "renew", None)  # a batch that made copies would fail
        cast_once = server.answer("/embed", inputs="the film was good")
        for one in bert.modules():
            vars(one).pop(PRODUCTS, None)
        assert server.answer("/embed", inputs="the film was good") == cast_once


@pytest.fixture
def pipeline(model, tmp_path):
    return functools.partial(write_pipeline, model, tmp_path / "pipeline")


def test_the_checkpoint_says_how_its_texts_are_read(pipeline, server):
    prompts = {"prompts": {"query": "good : ", "none": ""}, "default_prompt_name": "query"}
    with running(pipeline(prompts=prompts, max_seq_length=8)) as own:
        about = own.client.get("/info").json()
        assert about["model_type"] == {"embedding": {"pooling": "cls"}}
        assert about["max_input_length"] == 8
        assert "more than the 8" in own.refusal("/embed", 413, inputs="a " * 7)
        by_default = own.answer("/embed", inputs="film")
        assert by_default == own.answer("/embed", inputs="film", prompt_name="query")
        assert by_default == own.answer("/embed", inputs="good : film", prompt_name="none")
        assert by_default != own.answer("/embed", inputs="film", prompt_name="none")
        said = own.refusal("/embed", 422, inputs="film", prompt_name="odd")
        assert said == "prompt_name: no prompt 'odd', expected: query, none"


def test_a_pipeline_that_is_not_computed_here_is_an_error(pipeline):
    modules = ("Transformer", "Pooling", "Dense")
    with pytest.raises(InputError, match="a Dense module"), running(pipeline(modules)):
        pass


@pytest.mark.parametrize(("said", "limit"), [(24, 24), (1000, 48), (1e30, 48), (None, 48)])
def test_the_limit_of_a_cross_encoder_is_that_of_its_files(elsewhere, tmp_path, said, limit):
    model, *_ = elsewhere("BertForSequenceClassification", num_labels=1)
    directory = write_pipeline(model, tmp_path / "pipeline", ["Transformer"])
    (directory / "tokenizer_config.json").write_text(json.dumps({"model_max_length": said}))
    served = load(ServeConfig(model=str(directory)))
    assert served.max_seq_len == served.prediction.settings.max_seq_len == limit


def test_a_cross_encoder_that_sentence_transformers_saved(elsewhere, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    directory, *_ = elsewhere("BertForSequenceClassification", num_labels=1)
    theirs = library.CrossEncoder(str(directory), max_length=24, device="cpu")
    theirs.save_pretrained(str(tmp_path / "saved"))
    texts = ["good film " * 20, "a"]
    with running(tmp_path / "saved") as server:
        answer = server.answer("/rerank", query="a book", texts=texts, truncate=True)
        assert "24" in server.refusal("/rerank", 413, query="a book", texts=texts, truncate=False)
        assert server.client.get("/info").json()["max_input_length"] == 24
    scores = [one["score"] for one in sorted(answer, key=lambda one: one["index"])]
    expected = theirs.predict([("a book", text) for text in texts])
    np.testing.assert_allclose(scores, expected, atol=1e-5)
