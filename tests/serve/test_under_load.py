"""Many clients at a time, and the end in the middle of their requests."""

import random
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np

from tests.serve.running import process

CLIENTS = 64
WORDS = ("the", "film", "was", "good", "fine", "awful", "book", "of", "a", "is", "john", "paris")


def texts_of(count: int, longest: int, seed: int = 0) -> list[str]:
    """Mixed lengths, mostly short."""
    draw = random.Random(seed)
    sizes = [draw.choice((1, 3, 8, 20, longest)) for _ in range(count)]
    return [" ".join(draw.choices(WORDS, k=size)) for size in sizes]


def ask(url, requests, each=lambda number: None):
    """What became of each request, sent by 64 clients that each keep their connection."""
    answers: dict[int, object] = {}
    waiting = iter(enumerate(requests))
    lock = threading.Lock()

    def client() -> None:
        with httpx.Client(base_url=url, timeout=60, verify=False) as http:
            while True:
                with lock:
                    number, texts = next(waiting, (None, None))
                if number is None:
                    return
                each(number)
                try:
                    response = http.post("/embed", json={"inputs": texts})
                except httpx.TransportError as error:
                    answers[number] = error
                    continue
                good = response.status_code == 200
                answers[number] = response.json() if good else response.status_code

    with ThreadPoolExecutor(CLIENTS) as threads:
        for done in [threads.submit(client) for _ in range(CLIENTS)]:
            done.result()
    return answers


def test_no_answer_is_lost_or_of_another_request(minilm_server):
    texts = texts_of(200, 60)
    draw = random.Random(1)
    numbers = [draw.sample(range(len(texts)), draw.choice((1, 1, 1, 2, 5))) for _ in range(150)]
    answers = ask(minilm_server.url, [[texts[i] for i in some] for some in numbers])
    expected = np.array(minilm_server.answer("/embed", inputs=texts))
    assert answers.keys() == set(range(len(numbers)))
    for number, some in enumerate(numbers):
        np.testing.assert_allclose(answers[number], expected[some], rtol=0, atol=1e-5)
    apart = np.abs(expected[:100, None] - expected[None, :100]).max(-1) + np.eye(100)
    assert apart[apart > 0].min() > 1e-3  # another text's vector would be seen


def test_sigterm_answers_what_was_accepted_and_refuses_the_rest(model):
    """The server's count of 200s is the clients': none that it had begun with was lost."""
    requests = [[text] * 4 for text in texts_of(1000, 40)]
    with process(model) as (server, url):

        def each(number: int) -> None:
            if number == 400:
                server.send_signal(signal.SIGTERM)

        answers = ask(url, requests, each)
        said = server.communicate(timeout=30)[0]
        assert server.returncode == 0
    good = sum(isinstance(outcome, list) for outcome in answers.values())
    assert 300 < good < len(requests)
    # the others were refused, or found no server any more
    others = [outcome for outcome in answers.values() if not isinstance(outcome, list)]
    assert all(outcome == 503 or isinstance(outcome, httpx.TransportError) for outcome in others)
    assert "SIGTERM: answering the accepted requests" in said
    assert f"{good} requests were answered" in said


def test_an_idle_server_ends_at_once_at_ctrl_c(model):
    with process(model) as (server, url):
        assert httpx.get(f"{url}/health").status_code == 200
        server.send_signal(signal.SIGINT)
        server.wait(5)
        assert server.returncode == 0
