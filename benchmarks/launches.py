"""Launches that do not reach a GPU: operators on CPU tensors run as on one, up to `kernel[grid]`.

What stands in its place is called as a kernel is. Results are memory as it was.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

from triton.runtime.jit import KernelInterface

from fastbert import backend
from fastbert.kernels import runtime

# GPUs by their compute capability, and how many multiprocessors an A100, an H100 and a B200 have.
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}


class Launch(NamedTuple):
    """capability: of the GPU, 80 for sm_80; kernel: the `@triton.jit` function; values: of its
    arguments and of Triton's options, by name.
    """

    capability: int
    kernel: Any
    values: dict[str, Any]


@contextlib.contextmanager
def replaced(launcher: Callable[[KernelInterface, Any], Callable[..., None]]) -> Iterator[None]:
    """In the block operators take the backends that a GPU has, and kernels what `launcher` gives.

    launcher: of a kernel and a grid, what is called with the arguments and options of the launch.
    """
    with (
        mock.patch.dict(backend.PREFERENCE, cpu=backend.PREFERENCE["cuda"]),
        mock.patch.object(backend, "INTERPRETED", True),  # which lets Triton have CPU tensors
        mock.patch.object(KernelInterface, "__getitem__", launcher),
        backend.use(None),  # so that choices of before are forgotten, and then those of here
    ):
        yield


@contextlib.contextmanager
def recorded(capability: int) -> Iterator[list[Launch]]:
    """The launches of the block, as they are on a GPU of this compute capability."""
    launches: list[Launch] = []

    def launcher(kernel: KernelInterface, grid: Any) -> Callable[..., None]:
        def record(*arguments: Any, **options: Any) -> None:
            values = dict(zip(kernel.arg_names, arguments, strict=False), **options)
            launches.append(Launch(capability, kernel, values))

        return record

    with (
        replaced(launcher),
        mock.patch.object(runtime, "_capability", return_value=capability),
        mock.patch.object(runtime, "_num_sms", return_value=MULTIPROCESSORS[capability]),
    ):
        yield launches
