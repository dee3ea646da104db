"""The FastAPI application: the routes, and one form for all errors."""

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from fastbert._version import __version__
from fastbert.config.serve import ServeConfig
from fastbert.data.formats.tables import encodable
from fastbert.serve import openai, routes
from fastbert.serve.batcher import Batcher
from fastbert.serve.gate import Gate
from fastbert.serve.loading import Served
from fastbert.serve.metrics import Metrics
from fastbert.serve.refusal import Refusal, json_response, too_large
from fastbert.serve.service import Service

_SHOWN = 3  # the most reasons in a refusal


def make_app(
    served: Served, batcher: Batcher, config: ServeConfig, metrics: Metrics
) -> tuple[ASGIApp, Gate]:
    """The ASGI application behind its gate, and the gate, with which the server drains."""
    app = FastAPI(
        title="fastbert",
        version=__version__,
        docs_url=None,  # the pages would load scripts from another host
        redoc_url=None,
        max_body_size=config.max_body,
    )
    service = Service(served, batcher, config)
    app.include_router(routes.routes(service, metrics))
    app.include_router(openai.routes(service))

    @app.get("/health")
    async def health() -> Response:
        """Answers 200 while the server takes requests, else 503."""
        if gate.is_draining:
            raise Refusal(503, "the server is shutting down")
        if not batcher.is_alive:
            raise Refusal(503, "the model's thread has ended; restart the server")
        return json_response({})

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> Response:
        return error.response(request.url.path)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return Refusal(422, _reasons(error.errors())).response(request.url.path)

    @app.exception_handler(HTTPException)
    async def of_the_library(request: Request, error: HTTPException) -> Response:
        status = error.status_code
        reasons = {
            400: "the body: not JSON in UTF-8, nested too deep, or with a number too long to read",
            404: f"no such route: {request.url.path}",
            405: f"this route does not accept {request.method}",
            413: too_large(config.max_body).reason,
        }
        reason = reasons.get(status, str(error.detail))
        response = Refusal(422 if status == 400 else status, reason).response(request.url.path)
        response.headers.update(error.headers or {})  # a 405 lists the allowed methods
        return response

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        reason = f"the server failed: {type(error).__name__}; see its log"
        return Refusal(500, reason).response(request.url.path)

    gate = Gate(config, app.openapi()["paths"], metrics)
    return gate.around(app), gate


def _reasons(errors: Any) -> str:
    """Which fields are wrong and why, without quoting the request."""
    found = []
    for error in errors[:_SHOWN]:
        where, said = ".".join(map(str, error["loc"][1:])) or "the body", error["msg"]
        if error["type"] == "json_invalid":
            problem = error["ctx"]["error"].removesuffix(" at")
            where, said = f"the body, character {where}", f"not JSON ({problem})"
        if error["type"] == "model_attributes_type":
            said = "expected a JSON object, and the header content-type: application/json"
        found.append(f"{where}: {said}")
    return encodable("; ".join(found)) + ("; ..." if len(errors) > _SHOWN else "")
