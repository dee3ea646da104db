"""Runs the application with uvicorn, from binding the port to the last answer."""

import signal
import socket
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import uvicorn

from fastbert.check import InputError
from fastbert.config.serve import ServeConfig
from fastbert.serve.app import make_app
from fastbert.serve.batcher import Batcher
from fastbert.serve.loading import Served, load
from fastbert.serve.metrics import Metrics
from fastbert.system.console import console

_LOOPBACK = ("127.", "::1", "localhost")
_OPTIONS: dict[str, Any] = {
    "ws": "none",
    "log_config": None,
    "log_level": "warning",
    "access_log": False,
    "server_header": False,
    "timeout_keep_alive": 75,  # seconds, longer than proxies keep connections open
    "timeout_graceful_shutdown": 5,  # seconds to send answers that are computed
}


def serve(config: ServeConfig) -> None:
    """Serves until SIGTERM or Ctrl-C, and then answers the accepted requests.

    Raises InputError for an address that cannot be bound and a model that cannot be served.
    """
    listener = bind(config.host, config.port)
    if config.api_key() is None and not config.host.startswith(_LOOPBACK):
        warnings.warn(
            f"--host {config.host}: anybody who reaches this machine can use the server; set a key "
            "with --api-key-file",
            stacklevel=2,
        )
    server = Server(config)
    host, port = listener.getsockname()[:2]
    where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    server.run_at(listener, lambda: console.print(f"{config.model} is served at {where}"))
    console.print(f"{server.gate.num_answered} requests were answered")


class Server(uvicorn.Server):
    """A model served by uvicorn.

    The first signal drains the server, a second one ends it at once. uvicorn's own shutdown would
    close connections on which a request may be arriving; here they stay open until all requests
    are answered, and further requests get 503.
    """

    def __init__(self, config: ServeConfig) -> None:
        self.served = load(config)
        metrics = Metrics()
        self.batcher = Batcher(
            self.served.model,
            self.served.autocast,
            self.served.batch_tokens,
            config.max_queue,
            metrics,
        )
        app, self.gate = make_app(self.served, self.batcher, config, metrics)
        super().__init__(uvicorn.Config(app, **_OPTIONS))

    def run_at(self, listener: socket.socket, when_ready: Callable[[], None]) -> None:
        """Serves on the listener until a signal stops it; calls `when_ready` once it accepts."""
        self.when_ready = when_ready
        _warm_up(self.served)
        self.batcher.start()
        try:
            self.run(sockets=[listener])
        finally:
            self.batcher.close()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.when_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.should_exit = self.force_exit = self.gate.is_draining
        self.gate.is_draining = True
        if not self.force_exit:
            console.print(f"{signal.Signals(sig).name}: answering the accepted requests")

    async def on_tick(self, counter: int) -> bool:
        if self.gate.is_draining and not self.gate.num_open:
            self.should_exit = True
        return await super().on_tick(counter)


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet; an unusable address fails before the model loads."""
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
    """Computes the largest batch and a small one before clients connect.

    This compiles kernels, and a lack of memory is noticed early.
    """
    with served.autocast:
        for num_tokens in (served.batch_tokens, 16):
            served.embedding.scores(served.model, served.embedding.full(num_tokens))
