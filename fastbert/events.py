"""What a forward pass chose to run, told while somebody listens; `fastbert.explain` does."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class OperatorRun(NamedTuple):
    """One call of an operator: by which backend and kernels, and why not by a better one."""

    operator: str
    backend: str
    variant: str
    reason: str
    call: Any

    @property
    def first(self) -> Tensor | None:
        return next((x for x in self.call if isinstance(x, Tensor)), None)


class Route(NamedTuple):
    """A module ran packed tokens, as `layout` says, or its own forward for a reason."""

    module: str
    layout: str
    reason: str


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


def packed(module: nn.Module, x: Tensor, places: int | None = None, note: str = "") -> None:
    """The module computes the packed tokens x (T, H) of a batch with so many places."""
    if not is_listening():
        return
    layout = f"packed, {len(x)} tokens"
    if places is not None:
        layout += f" of {places} places" if len(x) < places else ", no padding"
    if torch.is_autocast_enabled(x.device.type):
        layout += f", residual stream in {str(x.dtype).removeprefix('torch.')}"
    tell(Route(type(module).__name__, layout, note))


def refused(module: nn.Module, reason: object) -> None:
    """The module runs Hugging Face's own forward."""
    tell(Route(type(module).__name__, "Hugging Face's own", str(reason)))
