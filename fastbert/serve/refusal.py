"""Errors for clients: an HTTP status, and a reason in one sentence."""

from typing import Any

from pydantic_core import to_json
from starlette.responses import Response

OPENAI = "/v1/"  # prefix of the routes that report errors in OpenAI's form

# text-embeddings-inference's names for the kinds of errors, by status.
_KINDS = {
    413: "Validation",
    422: "Validation",
    424: "Backend",
    429: "Overloaded",
    500: "Backend",
    503: "Unhealthy",
    504: "Overloaded",
}
_LONGEST = 500  # the most characters of a reason, which may quote the request
_OPENAI_KINDS = {401: "authentication_error", 429: "rate_limit_error"}


class Refusal(Exception):
    """Ends a request with an HTTP status; retry_after: seconds for the header Retry-After."""

    def __init__(self, status: int, reason: str, retry_after: int | None = None) -> None:
        super().__init__(reason)
        self.status, self.retry_after = status, retry_after
        self.reason = reason if len(reason) <= _LONGEST else f"{reason[:_LONGEST]}..."

    def response(self, path: str) -> Response:
        """The HTTP response, in OpenAI's form for its routes, else text-embeddings-inference's."""
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if path.startswith(OPENAI):
            kind = "server_error" if self.status >= 500 else "invalid_request_error"
            kind = _OPENAI_KINDS.get(self.status, kind)
            error = {"message": self.reason, "type": kind, "param": None, "code": None}
            return json_response({"error": error}, self.status, headers)
        error_type = _KINDS.get(self.status, "Validation")
        return json_response({"error": self.reason, "error_type": error_type}, self.status, headers)


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A response with the value as JSON."""
    return Response(to_json(value), status, headers, "application/json")


def too_large(max_body: int) -> Refusal:
    """The 413 for a body of more than `max_body` bytes."""
    return Refusal(413, f"the request has more than {max_body:,} bytes; send fewer texts in each")
