"""Load for a server from many clients: as fast as it answers, or at a fixed rate.

The clients run in a separate process, so that they take equal CPU time from every server.
"""

import http.client
import json
import multiprocessing
import queue
import random
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

IDLE_S = 1  # an idle client reconnects after this, before the server closes the connection
ANSWER_S = 120  # a request that takes longer fails the measurement


class Request(NamedTuple):
    """A POST request: its path, and its body as JSON bytes."""

    path: str
    body: bytes

    @classmethod
    def of(cls, path: str, **fields: Any) -> "Request":
        """A request whose body has these fields."""
        return cls(path, json.dumps(fields).encode())


class Load(NamedTuple):
    """The result. seconds: from the first request to the last answer; latencies: seconds of each
    request since it was due; answers: the responses' bodies, if they were to be kept."""

    seconds: float
    latencies: list[float]
    answers: list[bytes]


def closed(port: int, requests: Sequence[Request], clients: int, keep: bool = False) -> Load:
    """A closed loop: each client sends its next request once it has an answer."""
    return _elsewhere(port, requests, [0.0] * len(requests), clients, keep)


def opened(port: int, requests: Sequence[Request], rate: float, clients: int) -> Load:
    """An open loop: requests arrive as a Poisson process, even if earlier ones are not answered.

    rate: requests per second; clients: the most requests in flight
    """
    draw, due, moments = random.Random(0), 0.0, []
    for _ in requests:
        due += draw.expovariate(rate)
        moments.append(due)
    return _elsewhere(port, requests, moments, clients, False)


def _elsewhere(port: int, *arguments: Any) -> Load:
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_send, (port, *arguments))


def _send(
    port: int, requests: Sequence[Request], moments: Sequence[float], clients: int, keep: bool
) -> Load:
    """Runs the clients; moments: the seconds after which each request is due, 0 for at once."""
    waiting: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    latencies, answers = [0.0] * len(requests), [b""] * len(requests)
    failures: list[Exception] = []

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_S)
        try:
            connection.connect()
            used = time.perf_counter()
            while (number := waiting.get()) is not None and not failures:
                sent = time.perf_counter()
                if sent - used > IDLE_S:  # request() then opens it again
                    connection.close()
                path, body = requests[number]
                connection.request("POST", path, body, {"content-type": "application/json"})
                response = connection.getresponse()
                answer = response.read()
                if response.status != 200:
                    raise RuntimeError(f"{path}: {response.status} {answer[:200]!r}")
                due = begin + moments[number] if moments[number] else sent
                used = time.perf_counter()
                latencies[number] = used - due
                if keep:
                    answers[number] = answer
        except Exception as error:
            failures.append(error)
        finally:
            connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)  # until all are connected
    begin = time.perf_counter()
    for number, moment in enumerate(moments):
        if moment:
            time.sleep(max(begin + moment - time.perf_counter(), 0))
        waiting.put(number)
    for _ in threads:
        waiting.put(None)
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return Load(time.perf_counter() - begin, latencies, answers)
