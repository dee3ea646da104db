"""Embedding servers side by side: requests per second, and latency under load.

Each request has one passage of Python's documentation, of mixed lengths, for all-MiniLM-L6-v2 in
float32, over HTTP on loopback. fastbert is compared with infinity-emb, which runs from its own
environment (INFINITY_EMB names its program), and with a route around sentence-transformers'
`encode`.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.results import FASTBERT, Options, Results
from benchmarks.serving.http_load import Load, Request, closed, opened
from benchmarks.serving.sentence_encode import minilm_directory, passages
from benchmarks.timing import summarize
from fastbert.data import load_tokenizer

INFINITY, ENCODE = "infinity-emb", "a route around `encode`"
PROGRAM = "INFINITY_EMB"
CLIENTS = 64
SHARES = (0.25, 0.5, 0.75)  # of a server's throughput
START_S = 120


class Candidate(NamedTuple):
    """A server to measure.

    command: the command that starts it for a model and a port; ready: a path that answers once it
    has started; request: makes the request for a text; vector: takes the embedding from an answer
    """

    command: Callable[[Path, int], list[str]]
    ready: str
    request: Callable[[str], Request]
    vector: Callable[[Any], list[float]]


def _fastbert(model: Path, port: int) -> list[str]:
    options = ["--model", model, "--port", port, "--precision", "fp32", "--truncate"]
    return [sys.executable, "-m", "fastbert.cli", "serve", *map(str, options)]


def _infinity(model: Path, port: int) -> list[str]:
    options = ["--model-id", model, "--served-model-name", "minilm", "--engine", "torch"]
    options += ["--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", port]
    return [os.environ.get(PROGRAM, "infinity_emb"), "v2", *map(str, options)]


def _encode(model: Path, port: int) -> list[str]:
    return [sys.executable, "-m", "benchmarks.serving.encode_server", str(model), str(port)]


CANDIDATES = {
    FASTBERT: Candidate(
        _fastbert, "/health", lambda text: Request.of("/embed", inputs=text), lambda a: a[0]
    ),
    INFINITY: Candidate(
        _infinity,
        "/health",
        lambda text: Request.of("/embeddings", input=[text], model="minilm"),
        lambda answer: answer["data"][0]["embedding"],
    ),
    ENCODE: Candidate(
        _encode,
        "/openapi.json",
        lambda text: Request.of("/embed", inputs=[text]),
        lambda answer: answer[0],
    ),
}


def run(options: Options, results: Results) -> None:
    """Measures the parts "serve" and "serve_latency", on the CPU."""
    measure(results, *((128, 2, 96) if options.quick else (1024, 5, 1024)))


def measure(results: Results, number: int, rounds: int, open_number: int) -> None:
    """Starts all servers, and measures their throughput and then their latency.

    number: requests to each server in a round, in which all servers take turns; open_number:
    requests at each rate
    """
    texts = passages(number)
    model = minilm_directory()
    with contextlib.ExitStack() as stack:
        ports, refused = {}, {}
        for name, candidate in CANDIDATES.items():
            try:
                ports[name] = stack.enter_context(_started(candidate, model))
            except (OSError, RuntimeError) as error:  # not installed: still time the others
                refused[name] = str(error)
        requests = {name: [CANDIDATES[name].request(text) for text in texts] for name in ports}
        loads: dict[str, list[Load]] = {name: [] for name in ports}
        for turn in range(rounds + 1):  # the first one warms up
            for name, port in ports.items():
                loads[name].append(closed(port, requests[name], CLIENTS, keep=not turn))
        vectors = {name: _vectors(name, some.pop(0)) for name, some in loads.items()}
        apart = {name: float(np.abs(v - vectors[FASTBERT]).max()) for name, v in vectors.items()}
        timings: dict[str, Any] = {}
        for name, some in loads.items():
            timings[name] = summarize([load.seconds for load in some])
            timings[name]["requests_per_second"] = number / timings[name]["median_s"]
        tokens = _count_tokens(model, texts)
        case = {"model": "all-MiniLM-L6-v2", "requests": number, "clients": CLIENTS}
        results.add(
            "serve", case, timings, tokens=tokens, largest_difference=apart, refused=refused
        )
        for share in SHARES:
            timings = {}
            for name, port in ports.items():
                rate = share * results.of("serve")[-1]["timings"][name]["requests_per_second"]
                some = (requests[name] * (open_number // number + 1))[:open_number]
                load = opened(port, some, rate, 2 * CLIENTS)
                timings[name] = summarize(load.latencies)
                timings[name] |= {
                    "rate": rate,
                    "p99_s": float(np.quantile(load.latencies, 0.99)),
                }
            results.add("serve_latency", {"share": share, "requests": open_number}, timings)


@contextlib.contextmanager
def _started(candidate: Candidate, model: Path) -> Iterator[int]:
    """Runs a server and yields its port once it is ready; RuntimeError if it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = candidate.command(model, port)
    if shutil.which(command[0]) is None:
        raise RuntimeError(f"no program {command[0]}; the variable {PROGRAM} names it")
    offline = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"}
    silent = subprocess.DEVNULL
    with subprocess.Popen(
        command, env=os.environ | offline, stdout=silent, stderr=silent
    ) as process:
        try:
            _wait(process, f"http://127.0.0.1:{port}{candidate.ready}")
            yield port
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait(process: subprocess.Popen, url: str) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.2)
    raise RuntimeError(f"{Path(process.args[0]).name} did not start")  # type: ignore[index]


def _vectors(name: str, load: Load) -> np.ndarray:
    vector = CANDIDATES[name].vector
    return np.array([vector(json.loads(answer)) for answer in load.answers])


def _count_tokens(model: Path, texts: list[str]) -> int:
    """Tokens that the servers compute, without padding; texts are cut at the model's 256 tokens."""
    encodings = load_tokenizer(model).encode_batch_fast(texts)
    return sum(min(len(encoding), 256) for encoding in encodings)
