"""One operator at one size, and what else computes the same."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from fastbert import backend

EAGER = "PyTorch eager"


class Body(NamedTuple):
    """What else computes a workload; it may raise where it cannot run here.

    make: draws its inputs, None for the workload's own; waits: makes the host wait for a GPU, so
    that no CUDA graph of it can be recorded.
    """

    run: Callable[..., Tensor]
    make: Callable[[], tuple[Tensor, ...]] | None = None
    waits: bool = False


class Workload(NamedTuple):
    """make: draws the inputs; those of a floating-point dtype get gradients; fused: ours;
    alternatives: EAGER with the same inputs, and others; forward, backward: the bytes that must be
    moved, or with `is_product` the floating-point operations; a backward of 0 is none.
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
