"""The calls of operators that the compile report compiles, in a module for each kernel unit."""

from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.launches import MULTIPROCESSORS, Launch, recorded
from fastbert.rng import DropoutState

UNITS = sorted(file.stem for file in Path(__file__).parent.glob("[a-z]*.py"))

CAPABILITIES = tuple(MULTIPROCESSORS)
SM80, SM90, SM100 = CAPABILITIES

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROWS = 16  # any number: no kernel is compiled for it


class Case(NamedTuple):
    """A call of an operator, whose kernels are compiled as they are launched.

    label: its name in the report; call: the operator; tensors: its arguments, which get gradients;
    trains: whether the forward keeps what the backward reads, and the backward follows; quick: the
    GPUs for which `make test` compiles the case; since: the first GPU that can run it
    """

    label: str
    call: Callable[..., Tensor | tuple[Tensor, ...]]
    tensors: tuple[Tensor, ...]
    trains: bool = True
    quick: tuple[int, ...] = ()
    since: int = CAPABILITIES[0]

    def launches(self, capability: int) -> list[Launch]:
        if capability < self.since:
            return []
        leaves = [x.detach().requires_grad_(self.trains) for x in self.tensors]
        with recorded(capability) as launches:
            y = self.call(*leaves)
            if self.trains:
                outputs = (y,) if isinstance(y, Tensor) else y
                torch.autograd.grad(outputs, leaves, [torch.empty_like(one) for one in outputs])
        return launches


def floats(*shape: int, dtype: str = "fp32") -> Tensor:
    return torch.empty(shape, dtype=DTYPES[dtype])


def ids(rows: int = ROWS) -> Tensor:
    return torch.zeros(rows, dtype=torch.int64)


def dropout_of(p: float) -> dict:
    """Arguments for dropout with this probability."""
    return {"dropout_p": p, "rng": DropoutState(ids(2), ids(), site=1)}


def all_cases(only: str = "") -> Iterator[Case]:
    """The cases of every kernel unit, or of the unit `only`."""
    for unit in (only,) if only else UNITS:
        yield from import_module(f"benchmarks.compiling.cases.{unit}").cases()
