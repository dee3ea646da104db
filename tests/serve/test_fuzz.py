"""Whatever JSON comes to whatever route of whatever model, the answer is one, and never a 500."""

import json
import shutil
import time

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import fastbert
from tests.serve.running import running

ROUTES = {
    "/embed": ("inputs", "normalize", "truncate", "truncation_direction", "prompt_name"),
    "/rerank": ("query", "texts", "raw_scores", "return_text", "truncate"),
    "/predict": ("inputs", "raw_scores", "truncate"),
    "/fill-mask": ("inputs", "top_k", "truncate"),
    "/tokenize": ("inputs", "add_special_tokens", "prompt_name"),
    "/v1/embeddings": ("input", "model", "encoding_format", "dimensions", "user", "truncate"),
}
KINDS = {
    "BertModel": {},
    "BertForMaskedLM": {},
    "BertForSequenceClassification": {"num_labels": 1},
    "BertForTokenClassification": {"id2label": {0: "O", 1: "B-PER", 2: "I-PER"}},
    "BertForQuestionAnswering": {},
}
SECONDS = 10

texts = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        ["", "[MASK]", "the [MASK] film", "[CLS]", "\ud83d", "\x00", "a " * 60, "北京"]
    ),
)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), texts, st.integers(10**20, 10**30)
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=3),
        st.fixed_dictionaries({"question": inner, "context": inner}),
    ),
    max_leaves=8,
)  # fmt: skip


def bodies(route):
    """Most of the route's fields, with sound values or any."""
    questions = st.fixed_dictionaries({"question": texts, "context": texts})
    sound = st.one_of(
        texts, st.lists(texts, min_size=1, max_size=4), questions,
        st.lists(st.lists(texts, min_size=1, max_size=2), min_size=1, max_size=3),
        st.lists(questions, min_size=1, max_size=3),
    )  # fmt: skip
    first, *others = ROUTES[route]
    optional = {name: st.one_of(st.booleans(), scalars) for name in others}
    if route == "/rerank":
        first, optional["texts"] = "query", st.one_of(st.lists(texts, max_size=4), values)
    if route == "/v1/embeddings":
        optional["encoding_format"] = st.sampled_from(["float", "base64", "odd"])
    some = st.fixed_dictionaries({first: st.one_of(sound, values)}, optional=optional)
    return st.one_of(some, some, values)


@pytest.fixture(scope="module", params=KINDS)
def any_server(request, model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("kind") / request.param
    shutil.copytree(model, directory)
    config = fastbert.BertConfig.from_pretrained(model, **KINDS[request.param])
    torch.manual_seed(0)
    getattr(fastbert, request.param)(config).save_pretrained(directory)
    with running(directory, timeout=SECONDS) as server:
        yield server


@pytest.mark.parametrize("route", ROUTES)
@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_json_is_answered(any_server, route, data):
    check(any_server, route, json.dumps(data.draw(bodies(route))))


@settings(max_examples=60)
@given(route=st.sampled_from(list(ROUTES)), text=st.one_of(st.text(), st.binary()))
@example(route="/embed", text=b'\xff\xfe{"inputs": "a"}')
@example(route="/embed", text='{"inputs": "a", "inputs": 1}')
def test_what_is_no_json_is_answered(server, route, text):
    check(server, route, text)


def check(server, route, content):
    began = time.perf_counter()
    headers = {"content-type": "application/json"}
    response = server.client.post(route, content=content, headers=headers)
    assert response.status_code < 500, (content, response.text)
    assert time.perf_counter() - began < SECONDS / 2
    answer = response.json()
    if response.status_code != 200:
        error = answer["error"]["message"] if route.startswith("/v1") else answer["error"]
        assert isinstance(error, str)
        assert 0 < len(error) < 1000
