"""What is too much, too late or not allowed is refused clearly; who leaves costs nothing."""

import re
import runpy
import socket
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pydantic
import pytest

from fastbert.check import InputError
from fastbert.config.serve import KEY_VARIABLE, ServeConfig
from fastbert.serve import requests, run
from fastbert.serve.abilities import MaskFilling
from fastbert.serve.server import bind
from tests.serve.running import Held, running


def test_a_request_of_ten_megabytes_is_refused(server):
    said = server.refusal("/embed", 413, inputs=["a" * 10_000_000])
    assert said == "the request has more than 2,000,000 bytes; send fewer texts in each"

    def pieces():  # without a length in the headers
        yield b'{"inputs": "'
        for _ in range(100):
            yield b"a" * 100_000
        yield b'"}'

    headers = {"content-type": "application/json"}
    response = httpx.post(f"{server.url}/embed", content=pieces(), headers=headers)
    assert response.status_code == 413
    # urllib asks for the connection to be closed, which resets it if the body was not read
    with pytest.raises(urllib.error.HTTPError, match="413"):
        urllib.request.urlopen(f"{server.url}/embed", b"a" * 10_000_000)
    error = server.post("/v1/embeddings", input="a" * 10_000_000).json()["error"]
    assert error["message"] == said
    assert len(server.answer("/embed", inputs="a")) == 1


def test_a_request_of_a_hundred_thousand_texts_is_refused(server):
    for route, body in (
        ("/embed", {"inputs": ["a"] * 100_000}),
        ("/tokenize", {"inputs": ["a"] * 100_000}),
        ("/v1/embeddings", {"input": ["a"] * 100_000}),
    ):
        response = server.post(route, **body)
        assert response.status_code == 413
        assert "100000 texts, more than the 2048 of a request" in response.text


def test_deep_and_odd_json_is_refused(server):
    odd = ["[" * 100_000, '{"inputs": ' * 50_000, "nul", '{"inputs": "\\ud83d', "1e999", "NaN"]
    odd += ['{"inputs": ' + "9" * 10_000 + "}", '{"inputs": [' + "1," * 400_000 + "1]}"]
    for text in odd:
        began = time.perf_counter()
        headers = {"content-type": "application/json"}
        response = server.client.post("/embed", content=text, headers=headers)
        assert response.status_code == 422, text[:20]
        assert re.match(r"inputs|the body(, character \d+)?: ", response.json()["error"])
        assert len(response.content) < 1000
        assert time.perf_counter() - began < 5
    response = server.client.post("/embed", content=b'{"inputs": "a"}')  # of no type
    assert response.status_code == 422
    assert "the header content-type: application/json" in response.json()["error"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            b'{"inputs": "caf\xe9"}',
            "the body: not JSON in UTF-8, nested too deep, or with a number",
        ),
        (b"[" * 100_000, "the body: not JSON in UTF-8, nested too deep, or with a number"),
        (b'{"inputs": "a",}', "the body, character 15: not JSON (Expecting property name"),
        (b'{"inputs": "a', "the body, character 11: not JSON (Unterminated string starting)"),
        (b'{"inputs": "\n"}', "the body, character 12: not JSON (Invalid control character)"),
        (b"", "the body: Field required"),
    ],
)
def test_where_a_body_is_no_json_is_said(server, content, said):
    headers = {"content-type": "application/json"}
    response = server.client.post("/embed", content=content, headers=headers)
    assert response.status_code == 422
    assert response.json()["error"].startswith(said)


@pytest.fixture
def held(model, monkeypatch):
    """A server whose model waits, with room for three sequences and four requests."""
    with running(model, max_queue=3, max_requests=4, batch_tokens=1, timeout=20) as server:
        hold = Held(monkeypatch, server.server.served.embedding)
        with ThreadPoolExecutor(8) as threads:
            server.later = lambda **body: threads.submit(
                httpx.post, f"{server.url}/embed", json=body, timeout=30
            )
            try:
                yield server, hold
            finally:
                hold.free.set()


def test_a_full_queue_is_told_with_a_time_to_wait(held):
    server, hold = held
    first = server.later(inputs="a")
    assert hold.is_reached.wait(10)
    waits = server.later(inputs=["a", "b", "c"])
    server.wait_for("queue_sequences", 3)
    response = server.post("/embed", inputs="d")
    assert response.status_code == 429
    assert "3 sequences wait for the model" in response.json()["error"]
    assert 1 <= int(response.headers["retry-after"]) <= 60
    assert "5 sequences" in server.refusal("/embed", 413, inputs=["a"] * 5)
    assert server.client.get("/health").status_code == 200
    hold.free.set()
    assert [len(done.result().json()) for done in (first, waits)] == [1, 3]
    assert server.answer("/embed", inputs="d")


def test_too_many_requests_at_a_time_are_refused(held):
    server, hold = held
    waiting = [server.later(inputs="a")]
    assert hold.is_reached.wait(10)  # so that the queue has room for the others
    waiting += [server.later(inputs="a") for _ in range(3)]
    server.wait_for("open_requests", 4)
    response = server.post("/tokenize", inputs="d")
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"
    assert "4 requests are in progress" in response.json()["error"]
    assert server.client.get("/metrics").status_code == 200
    hold.free.set()
    assert all(done.result().status_code == 200 for done in waiting)


def test_who_leaves_costs_nothing(held):
    server, hold = held
    first = server.later(inputs="a")
    assert hold.is_reached.wait(10)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/embed", json={"inputs": ["b", "c", "d"]}, timeout=0.5)
    server.wait_for("left_total", 1)
    server.wait_for("queue_sequences", 0)
    assert server.metric("dropped_sequences_total") == 3
    last = server.later(inputs=["e", "f"])
    server.wait_for("queue_sequences", 2)
    hold.free.set()
    assert first.result().status_code == last.result().status_code == 200
    assert hold.num_computed == 3
    server.wait_for("open_requests", 0)


def test_a_request_is_given_up_in_time(model, monkeypatch):
    with running(model, timeout=0.3) as server:
        hold = Held(monkeypatch, server.server.served.embedding)
        began = time.perf_counter()
        response = server.post("/embed", inputs="a")
        assert 0.2 < time.perf_counter() - began < 5
        assert response.status_code == 504
        assert "no answer within 0.3 seconds" in response.json()["error"]
        hold.free.set()
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as slow:  # a body that does not come
            slow.sendall(b"POST /embed HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n"
                         b"Content-Type: application/json\r\n\r\n{")  # fmt: skip
            assert b"504" in slow.recv(100)
        assert server.answer("/embed", inputs="a")


def test_a_request_that_the_model_fails_on_is_told(model, monkeypatch):
    with running(model) as server:
        monkeypatch.setattr(server.server.served.embedding, "scores", None)
        assert "the model failed on the batch" in server.refusal("/embed", 500, inputs="a")
        monkeypatch.undo()
        assert server.answer("/embed", inputs="a")


@pytest.mark.parametrize("of", ["file", "variable"])
def test_a_key_is_asked_for(model, tmp_path, monkeypatch, of):
    options = {}
    if of == "file":
        options["api_key_file"] = tmp_path / "key"
        options["api_key_file"].write_text("s3cret\n")
    else:
        monkeypatch.setenv(KEY_VARIABLE, "s3cret")
    with running(model, **options) as server:
        for headers in ({}, {"authorization": "Bearer s3cre"}, {"authorization": "s3cret"},
                        {"authorization": "Basic s3cret"}, {"authorization": "bearer S3cret"},
                        {"authorization": "Bearer s3cret\xe9".encode("latin-1")}):  # fmt: skip
            response = server.client.post("/embed", json={"inputs": "a"}, headers=headers)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            assert "key" in response.json()["error"]
            assert server.client.get("/metrics", headers=headers).status_code == 401
        assert server.client.get("/health").status_code == 200
        for scheme in ("Bearer", "bearer", "BEARER "):  # whose case is free
            server.client.headers["authorization"] = f"{scheme} s3cret"
            assert server.answer("/embed", inputs="a")
        assert server.client.get("/metrics").status_code == 200


@pytest.mark.parametrize("key", ["", " \n", "two words", "ключ"])
def test_a_key_that_cannot_be_one_is_an_error(model, tmp_path, key):
    file = tmp_path / "key"
    file.write_text(key)
    with pytest.raises(InputError, match=f"--api-key-file {file}: expected a key of ASCII"):
        ServeConfig(model=str(model), api_key_file=file).api_key()
    with pytest.raises(InputError, match="none: cannot be read: No such file"):
        ServeConfig(model=str(model), api_key_file=tmp_path / "none").api_key()


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("port", 65536, "--port: expected between 0 and 65535, got 65536"),
        ("max_queue", 0, "--max-queue: expected at least 1, got 0"),
        ("timeout", 0.0, "--timeout: expected above 0"),
        ("timeout", float("nan"), "--timeout: expected above 0"),
        ("pooling", "max", "--pooling: expected one of mean, cls, got 'max'"),
        ("max_seq_len", 2, "--max-seq-len: expected at least 3"),
        ("tokenize_threads", 1000, "--tokenize-threads"),
    ],
)
def test_options_have_bounds(option, value, said):
    with pytest.raises(InputError, match=said):
        ServeConfig(model="m", **{option: value})


def test_as_many_words_may_be_asked_for_as_are_computed(monkeypatch):
    monkeypatch.setattr(MaskFilling, "MOST", 7)
    body = runpy.run_path(requests.__file__)["FillMaskBody"]
    assert body(inputs="[MASK]", top_k=7).top_k == 7
    with pytest.raises(pydantic.ValidationError, match="less than or equal to 7"):
        body(inputs="[MASK]", top_k=8)


def test_a_port_that_is_taken_is_an_error():
    with bind("127.0.0.1", 0) as other:
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"--port {port}: Address already in use"):
            bind("127.0.0.1", port)


def test_what_is_counted(model):
    with running(model) as server:
        server.answer("/embed", inputs=["the film", "a"])
        server.refusal("/embed", 422, inputs=[])
        server.client.get("/nothing")
        text = server.client.get("/metrics").text
    for line in (
        'fastbert_requests_total{route="/embed",status="200"} 1.0',
        'fastbert_requests_total{route="/embed",status="422"} 1.0',
        'fastbert_requests_total{route="other",status="404"} 1.0',
        'fastbert_request_seconds_count{route="/embed"} 2.0',
        "fastbert_batch_tokens_sum 7.0",
        "fastbert_batch_sequences_sum 2.0",
        "fastbert_queue_seconds_count 1.0",
        "fastbert_queue_sequences 0.0",
    ):
        assert line in text.splitlines()


def test_another_method_is_told_which_there_are(server):
    response = server.client.get("/embed")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")


def test_who_leaves_in_the_middle_of_a_body_has_left(model):
    with running(model) as server:
        address = server.url.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1]))) as client:
            client.sendall(b"POST /embed HTTP/1.1\r\nhost: a\r\ncontent-length: 99\r\n\r\n{")
            server.wait_for("open_requests", 1)
        server.wait_for("left_total", 1)
        server.wait_for("open_requests", 0)
        assert "requests_total{" not in server.client.get("/metrics").text


def test_the_page_names_metrics_that_there_are(server):
    page = (Path(__file__).parents[2] / "docs" / "deployment.md").read_text("utf-8")
    named = set(re.findall(r"\b(?:fastbert|process)_\w+", page))
    text = server.client.get("/metrics").text
    assert len(named) > 8
    for name in named:
        assert re.search(rf"^# TYPE {re.sub('_(bucket|sum|count)$', '', name)} ", text, re.M), name
    routes = re.findall(r"`POST (/[\w/-]+)`", page)
    assert set(routes) <= server.client.get("/openapi.json").json()["paths"].keys()


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    said = r"fastbert serve needs prometheus-client: pip install 'fastbert\[serve\]'"
    with pytest.raises(InputError, match=said):
        run(ServeConfig(model="m"))
