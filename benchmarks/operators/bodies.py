"""An operator at one size, and the alternatives that compute the same result."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from fastbert import backend

EAGER = "PyTorch eager"


class Body(NamedTuple):
    """One way to compute a workload; `run` may raise if it cannot run on this machine.

    make: draws its inputs; None if it takes the workload's; waits: whether the host waits for the
    GPU, so that no CUDA graph can be recorded
    """

    run: Callable[..., Tensor]
    make: Callable[[], tuple[Tensor, ...]] | None = None
    waits: bool = False


class Workload(NamedTuple):
    """An operator with inputs of one size.

    make: draws the inputs; floating-point inputs get gradients; fused: calls fastbert's operator;
    alternatives: EAGER, which takes the same inputs, and others; forward, backward: the bytes that
    must be moved, or the floating-point operations if `is_product`; backward 0: no gradient
    """

    operator: backend.Op
    label: str
    make: Callable[[], tuple[Tensor, ...]]
    fused: Callable[..., Tensor]
    alternatives: dict[str, Body]
    forward: float
    backward: float
    is_product: bool = False

    @property
    def plain(self) -> Callable[..., Tensor]:
        return self.alternatives[EAGER].run
