"""A server in a thread of the test's process, or in one of its own."""

import contextlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from fastbert.config.serve import ServeConfig

pytest.importorskip("fastapi", reason="the extra [serve] is needed")  # before the server's import

from fastbert.serve.server import Server, bind


class Running:
    """A server that answers at `url`; `client` is for one thread."""

    def __init__(self, server: Server, url: str) -> None:
        self.server, self.url = server, url
        self.client = httpx.Client(base_url=url, timeout=60)

    def post(self, route: str, **body) -> httpx.Response:
        return self.client.post(route, json=body)

    def answer(self, route: str, **body):
        response = self.post(route, **body)
        assert response.status_code == 200, response.text
        return response.json()

    def refusal(self, route: str, status: int, **body) -> str:
        """Why the request was refused, with that status."""
        response = self.post(route, **body)
        assert response.status_code == status, response.text
        return response.json()["error"]

    def metric(self, name: str, **labels: str) -> float:
        found = self.server.batcher.metrics.registry.get_sample_value(f"fastbert_{name}", labels)
        assert found is not None, name
        return found

    def wait_for(self, name: str, value: float) -> None:
        """Until a metric is so much; fails after ten seconds."""
        for _ in range(1000):
            if self.metric(name) == value:
                return
            time.sleep(0.01)
        raise AssertionError(f"{name} is {self.metric(name)}, not {value}")


@contextlib.contextmanager
def running(model, **options) -> Iterator[Running]:
    options = {"precision": "fp32", **options}
    server = Server(ServeConfig(model=str(model), port=0, **options))
    listener = bind("127.0.0.1", 0)
    ready = threading.Event()
    thread = threading.Thread(target=server.run_at, args=(listener, ready.set))
    thread.start()
    try:
        assert ready.wait(30)
        yield Running(server, f"http://127.0.0.1:{listener.getsockname()[1]}")
    finally:
        server.gate.is_draining = True
        thread.join(30)
    assert not thread.is_alive()


@contextlib.contextmanager
def process(model, *options: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """`fastbert serve` as users run it, and its address."""
    command = ["-m", "fastbert.cli", "serve", "--model", model, "--port", "0", *options]
    with subprocess.Popen(
        [sys.executable, *map(str, command)], stdout=subprocess.PIPE, text=True
    ) as started:
        try:
            assert started.stdout is not None
            found = re.search(r"http://\S+", started.stdout.readline())
            assert found
            yield started, found[0]
        finally:
            started.kill()


class Held:
    """Keeps the model from its next batches until it is free; `num_computed` sequences went on."""

    def __init__(self, monkeypatch, ability) -> None:
        self.free, self.num_computed = threading.Event(), 0
        self.is_reached = threading.Event()
        compute = ability.scores

        def scores(model, features):
            self.is_reached.set()
            assert self.free.wait(30)
            self.num_computed += len(features)
            return compute(model, features)

        monkeypatch.setattr(ability, "scores", scores)


def is_alike(ours, theirs) -> bool:
    """But for rounding, which depends on the batch that a text is in."""
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and is_alike([*ours.values()], [*theirs.values()])
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(is_alike, ours, theirs))
    return ours == (pytest.approx(theirs, abs=1e-6) if isinstance(ours, float) else theirs)
