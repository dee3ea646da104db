"""The clients of the benchmark measure what they say, and its tables and its plot show it."""

import json

import pytest

from benchmarks.reporting import plots, report
from benchmarks.reporting.serve_tables import serve, serve_latency
from benchmarks.results import FASTBERT
from benchmarks.serving.http_load import Request, closed, opened
from tests.benchmarks.results_case import ENVIRONMENT, timing
from tests.serve.running import running
from tests.small_model import write_model

ENCODE = "a route around `encode`"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(write_model(tmp_path_factory.mktemp("model"))) as server:
        yield server


def test_clients_get_each_answer_and_come_at_their_rate(server):
    port = int(server.url.rpartition(":")[2])
    texts = ["the film", "a", "good book"] * 10
    requests = [Request.of("/embed", inputs=text) for text in texts]
    load = closed(port, requests, 4, keep=True)
    assert len(load.latencies) == 30
    assert 0 < max(load.latencies) <= load.seconds
    for text, answer in zip(texts[:3], load.answers, strict=False):
        assert json.loads(answer)[0] == pytest.approx(
            server.answer("/embed", inputs=text)[0], abs=1e-6
        )
    load = opened(port, requests, 20, 4)
    assert 0.8 < load.seconds < 6
    assert max(load.latencies) < load.seconds
    with pytest.raises(RuntimeError, match="404"):
        closed(port, [Request.of("/nothing")], 1)


def rows():
    both = {
        FASTBERT: {**timing(2.0), "requests_per_second": 64.0},
        ENCODE: {**timing(5.0), "requests_per_second": 25.6},
    }
    case = {"requests": 128, "clients": 64}
    apart = {FASTBERT: 0.0, ENCODE: 3e-7}
    refused = {"infinity-emb": "no infinity_emb"}
    yield {"part": "serve", "case": case, "timings": both, "tokens": 1280,
           "largest_difference": apart, "refused": refused}  # fmt: skip
    for share in (0.25, 0.5):
        slow = {name: {**one, "p99_s": 3 * one["median_s"], "rate": share * 60}
                for name, one in both.items()}  # fmt: skip
        yield {"part": "serve_latency", "case": {"share": share}, "timings": slow}


def test_tables_and_the_plot(tmp_path):
    first, *others = rows()
    assert serve([first]).lines[1] == ("", ENCODE, "25.6 ±2%", "256", "2.50x", "3e-07")
    first["timings"][ENCODE] |= {"spread": None, "rounds": 1}
    assert serve([first]).lines[1][2] == "25.6"
    assert serve_latency(others).lines[0] == ("25%", FASTBERT, "15.0", "2 s", "6 s")
    assert "no infinity_emb" in report.markdown([ENVIRONMENT, first])
    (plot,) = plots.write([first, *others], tmp_path / "serve.jsonl")
    assert plot.name == "serve-serve_latency.png"
    assert plot.read_bytes().startswith(b"\x89PNG")
