"""What a forward pass chose to run, told while somebody listens; `fastbert.explain` does."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn


class OperatorRun(NamedTuple):
    """One call of an operator: by which backend, and why not by a better one."""

    operator: str
    backend: str
    reason: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def first(self) -> Tensor | None:
        return next((x for x in self.arguments if isinstance(x, Tensor)), None)


class Route(NamedTuple):
    """A module took the packed path, or its own with the reason why."""

    module: str
    reason: str | None


Event = OperatorRun | Route

_heard: list[Event] | None = None


@contextlib.contextmanager
def listen() -> Iterator[list[Event]]:
    """A list that fills with the events of the block."""
    global _heard
    before, _heard = _heard, []
    try:
        yield _heard
    finally:
        _heard = before


def is_listening() -> bool:
    return _heard is not None


def tell(event: Event) -> None:
    if _heard is not None:
        _heard.append(event)


def route(module: nn.Module, reason: str | None = None) -> None:
    tell(Route(type(module).__name__, reason))
