"""Launches that do not reach a GPU: operators on CPU tensors run as on a GPU, up to the launch.

Results are uninitialised memory.
"""

import contextlib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

from fastbert import backend, kernels
from fastbert.kernels import runtime
from fastbert.kernels.runtime import Handle, Kernel

for _unit in pkgutil.iter_modules(kernels.__path__):  # before `given_to` changes IS_INTERPRETED,
    importlib.import_module(f"fastbert.kernels.{_unit.name}")  # from which they make constants

# The multiprocessors of an A100, an H100 and a B200, by compute capability.
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}


class Launch(NamedTuple):
    """A launch of a kernel.

    capability: of the GPU, 80 for sm_80; values: of the kernel's arguments and of Triton's options,
    by name
    """

    capability: int
    kernel: Kernel
    values: dict[str, Any]


@contextlib.contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """In the block, operators on CPU tensors use the backends that a GPU has."""
    with (
        mock.patch.dict(backend.PREFERENCE, cpu=backend.PREFERENCE["cuda"]),
        mock.patch.object(backend, "INTERPRETED", True),  # so that Triton gets CPU tensors
        backend.use(None),  # forgets the choices made before and, at its end, those made here
    ):
        yield


@contextlib.contextmanager
def given_to(run: Callable[..., None]) -> Iterator[None]:
    """In the block, kernels are not compiled, and `run` is called instead of Triton's launcher.

    run: takes the grid's three sizes, the stream, five arguments that are None here, then the
    kernel's addresses and numbers.
    """
    handle = Handle(run, None, None, ())
    with (
        _as_on_a_gpu(),
        mock.patch.object(runtime, "IS_INTERPRETED", False),
        mock.patch.object(runtime, "_IS_KNOWN", True),
        mock.patch.object(runtime, "current_device", new=_cpu),
        mock.patch.object(runtime, "current_stream", new=_stream),
        mock.patch.dict(runtime.HANDLES, clear=True),
        mock.patch.object(Kernel, "compiled", return_value=handle),
    ):
        yield


# Functions, because a `Mock` counts its calls, which takes longer than a launch.
def _cpu() -> int:
    return -1  # the device of a CPU tensor


def _stream(device: int) -> int:
    return 0


@contextlib.contextmanager
def recorded(capability: int) -> Iterator[list[Launch]]:
    """Records the launches of the block, as a GPU of this compute capability would make them."""
    launches: list[Launch] = []

    def record(kernel: Kernel, grid: Any, *arguments: Any, **constants: Any) -> None:
        values = dict(zip(kernel.names, arguments, strict=True), **constants)
        launches.append(Launch(capability, kernel, values))

    with (
        _as_on_a_gpu(),
        mock.patch.object(Kernel, "__call__", record),
        mock.patch.object(runtime, "_gpu", return_value=(capability, MULTIPROCESSORS[capability])),
    ):
        yield launches
