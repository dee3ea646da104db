"""Events that say how a forward pass ran, recorded only inside `listen`, for `fastbert.explain`."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class OperatorRun(NamedTuple):
    """One call of an operator: the backend and kernels that ran, and why no faster ones did.

    variant: names of the kernels, for operators with several; call: the operator's checked
    arguments, a named tuple.
    """

    operator: str
    backend: str
    variant: str
    reason: str
    call: Any


class Route(NamedTuple):
    """How a module ran: `layout` says packed or Hugging Face's own forward, `reason` says why."""

    module: str
    layout: str
    reason: str


Event = OperatorRun | Route

_heard: list[Event] | None = None


@contextlib.contextmanager
def listen() -> Iterator[list[Event]]:
    """Yields a list that collects the events of the `with` block."""
    global _heard
    before, _heard = _heard, []
    try:
        yield _heard
    finally:
        _heard = before


def is_listening() -> bool:
    """Whether the code runs inside `listen`."""
    return _heard is not None


def tell(event: Event) -> None:
    """Records an event, if the code runs inside `listen`."""
    if _heard is not None:
        _heard.append(event)


def packed(module: nn.Module, x: Tensor, places: int | None = None, note: str = "") -> None:
    """Records that `module` runs the packed tokens x (T, H) of a batch of `places` = B * S."""
    if not is_listening():
        return
    layout = f"packed, {x.shape[0]} tokens"
    if places is not None:
        layout += f" of {places} places" if x.shape[0] < places else ", no padding"
    if torch.is_autocast_enabled(x.device.type):
        layout += f", residual stream in {str(x.dtype).removeprefix('torch.')}"
    tell(Route(type(module).__name__, layout, note))


def refused(module: nn.Module, reason: object, runs: str = "Hugging Face's own") -> None:
    """Records what `module` runs because the packed path was refused, by default its forward."""
    if is_listening():  # torch.compile of torch 2.11 cannot trace the text of an exception
        tell(Route(type(module).__name__, runs, str(reason)))
