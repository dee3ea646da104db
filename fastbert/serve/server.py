"""Runs the application under uvicorn, from a free port to the last answer."""

import signal
import socket
import warnings
from types import FrameType
from typing import Any

import torch
import uvicorn

from fastbert.check import InputError
from fastbert.console import console
from fastbert.serve.app import make_app
from fastbert.serve.batcher import Batcher
from fastbert.serve.gate import Gate
from fastbert.serve.loading import Served, load
from fastbert.serve.metrics import Metrics
from fastbert.serve_config import ServeConfig

_LOOPBACK = ("127.", "::1", "localhost")
_KEEP_ALIVE_S = 75  # longer than the proxies before a server keep a connection
_LAST_S = 5  # for answers on their way when all requests are computed


def serve(config: ServeConfig) -> None:
    """Serves until SIGTERM or Ctrl-C, and answers what was accepted until then."""
    key = config.api_key()
    listener = _bind(config.host, config.port)
    if key is None and not config.host.startswith(_LOOPBACK):
        warnings.warn(
            f"--host {config.host}: whoever reaches this machine can use the server; give it a key "
            "by --api-key-file",
            stacklevel=2,
        )
    served = load(config)
    metrics = Metrics()
    batcher = Batcher(served.model, served.autocast, served.batch_tokens, config.max_queue, metrics)
    app, gate = make_app(served, batcher, config, metrics, key)
    _warm_up(served)
    batcher.start()
    options = uvicorn.Config(
        app,
        ws="none",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_LAST_S,
    )
    host, port = listener.getsockname()[:2]
    where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    server = _Server(options, gate, f"{config.model} is served at {where}")
    try:
        server.run(sockets=[listener])
    finally:
        batcher.close()
    console.print(f"{gate.num_answered} requests were answered")


def _bind(host: str, port: int) -> socket.socket:
    """A socket that nobody can connect to yet; InputError before there is a model to load."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: {error.strerror or error}") from None
    return listener


@torch.inference_mode()
def _warm_up(served: Served) -> None:
    """Computes the largest batch and a small one, so that what a device compiles is there, and
    memory that does not suffice is told before there are clients."""
    with served.autocast:
        for num_tokens in (served.batch_tokens, 16):
            served.embedding.scores(served.model, served.embedding.full(num_tokens))


class _Server(uvicorn.Server):
    """Drains at the first signal, and ends at once at the second.

    uvicorn's own end would close connections on which a request may just be coming in. Here they
    stay, and further requests are told that the server is shutting down.
    """

    def __init__(self, config: uvicorn.Config, gate: Gate, ready: str) -> None:
        super().__init__(config)
        self.gate, self.ready = gate, ready

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        console.print(self.ready)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.should_exit = self.force_exit = self.gate.is_draining
        self.gate.is_draining = True
        if not self.force_exit:
            console.print(f"{signal.Signals(sig).name}: answering what was accepted")

    async def on_tick(self, counter: int) -> bool:
        if self.gate.is_draining and not self.gate.num_open:
            self.should_exit = True
        return await super().on_tick(counter)
