"""Checks around every route: the key, the limits, the time, and whether the client has left."""

import asyncio
import contextlib
import hmac
import time
from collections.abc import Collection
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastbert.config.serve import ServeConfig
from fastbert.serve.metrics import Metrics
from fastbert.serve.refusal import Refusal, too_large

OPEN = ("/health",)  # answered without a key
ALWAYS = (*OPEN, "/metrics")  # answered even while the server is full or draining

_DISCARDED = 16_000_000  # the largest refused body, in bytes, that is read so that its 413 arrives


class Gate:
    """ASGI middleware that admits requests, limits their time and counts them.

    While it drains, it answers the admitted requests and refuses further ones (503). A client that
    disconnects cancels its request. paths: the routes that metrics name; all others are counted
    together
    """

    def __init__(self, config: ServeConfig, paths: Collection[str], metrics: Metrics) -> None:
        key = config.api_key()
        self.key = None if key is None else key.encode()
        self.config, self.paths, self.metrics = config, paths, metrics
        self.is_draining = False
        self.num_open = 0  # requests being answered
        self.num_answered = 0

    def around(self, app: ASGIApp) -> ASGIApp:
        """Wraps an ASGI application in this gate."""

        async def gated(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                await self._pass(app, scope, receive, send)
            elif scope["type"] == "lifespan":
                await app(scope, receive, send)

        return gated

    async def _pass(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        path, began, status = scope["path"], time.perf_counter(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self.is_draining:  # makes the client's next request go to another server
                    message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        is_counted = path not in ALWAYS
        self.num_open += is_counted
        self.metrics.open_requests.set(self.num_open)
        try:
            self._admit(scope, path)
            await self._answer(app, scope, receive, watched)
        except Refusal as refusal:
            if not status:
                if refusal.status == 413:
                    await self._discard(scope, receive)
                await refusal.response(path)(scope, receive, watched)
        finally:
            self.num_open -= is_counted
            self.metrics.open_requests.set(self.num_open)
            route = path if path in self.paths else "other"
            if status:
                self.num_answered += is_counted and status == 200
                self.metrics.requests.labels(route, status).inc()
                self.metrics.request_seconds.labels(route).observe(time.perf_counter() - began)
            else:
                self.metrics.left.inc()

    def _admit(self, scope: Scope, path: str) -> None:
        headers = Headers(scope=scope)
        if self.key is not None and path not in OPEN:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            is_right = hmac.compare_digest(given.strip().encode("latin-1"), self.key)
            if scheme.lower() != "bearer" or not is_right:
                raise Refusal(401, "expected the header Authorization: Bearer and the server's key")
        if path in ALWAYS:
            return
        if self.is_draining:
            raise Refusal(503, "the server is shutting down", 1)
        if self.num_open > self.config.max_requests:
            raise Refusal(
                429, f"{self.config.max_requests} requests are in progress; try again later", 1
            )
        if _length(headers) > self.config.max_body:  # before the body is read
            raise too_large(self.config.max_body)

    async def _discard(self, scope: Scope, receive: Receive) -> None:
        """Reads a body that `_admit` refused, unless it is huge or "Expect" held the body back.

        A connection that closes before its body is read is reset, and the answer is lost.
        """
        headers = Headers(scope=scope)
        if "expect" in headers or _length(headers) > _DISCARDED:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.timeout):
                while (await receive()).get("more_body"):
                    pass

    async def _answer(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the app until it has answered, the client has left, or the time is over (504)."""
        task: Any = asyncio.current_task()
        watcher: asyncio.Task[None] | None = None
        has_left = False

        async def watch() -> None:
            nonlocal has_left
            while (await receive())["type"] != "http.disconnect":
                pass
            has_left = True
            task.cancel()

        async def received() -> Message:
            nonlocal watcher, has_left
            message = await receive()
            if message["type"] == "http.disconnect":  # in the middle of the body
                has_left = True
                raise asyncio.CancelledError
            if message["type"] == "http.request" and not message.get("more_body"):
                watcher = asyncio.create_task(watch())
            return message

        try:
            async with asyncio.timeout(self.config.timeout):
                await app(scope, received, send)
        except asyncio.CancelledError:
            if not has_left:  # the server itself is being stopped
                raise
            task.uncancel()
        except TimeoutError:
            raise Refusal(
                504,
                f"no answer within {self.config.timeout:g} seconds; send fewer texts, or try later",
                1,
            ) from None
        finally:
            if watcher is not None:
                watcher.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await watcher


def _length(headers: Headers) -> int:
    """The body's size in bytes from the headers, 0 if they do not have it."""
    size = headers.get("content-length", "")
    return int(size[:19]) if size.isdecimal() else 0  # int() refuses thousands of digits
