"""Launches Triton kernels without Triton's binder, once they are compiled for such arguments.

Triton binds and classifies the arguments of every launch in Python, which takes the host longer
than a small batch takes the GPU. A `Kernel` looks a compiled kernel up by what Triton compiles for,
and hands the arguments to its launcher, whose interface has been the same from Triton 3.6 to 3.9.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime import driver

from fastbert.kernels.runtime import IS_INTERPRETED, TRITON_VERSION

# Fixed for all launches, so that a new default of Triton changes nothing.
OPTIONS = {"enable_fp_fusion": True}

# By kernel, device, dtypes of tensors, whether their addresses are multiples of 16, numbers that
# Triton specializes on, the width of the others, constants and options.
HANDLES: dict[Any, "Handle"] = {}
MAX_HANDLES = 4096  # a program has dozens, unless strides vary without end
_KNOBS = triton.knobs.runtime
# For AMD's GPUs Triton also specializes on the size of tensors.
_IS_KNOWN = (3, 6) <= TRITON_VERSION <= (3, 9) and torch.version.hip is None


class Handle(NamedTuple):
    """A compiled kernel: Triton's launcher, what it takes first, and the compile-time arguments.

    kernel: Triton's own object, kept because Triton unloads a kernel that nothing refers to.
    """

    run: Callable[..., None]
    function: Any
    metadata: Any
    constants: tuple[Any, ...]
    kernel: Any = None


class Kernel:
    """A kernel, called with its grid, its arguments, and compile-time arguments by keyword.

    The function's parameters are pointers, which end in "_ptr" and take tensors or None, the first
    a tensor; then numbers, last those of `do_not_specialize`; then those of type `tl.constexpr`,
    for which Triton compiles anew. The keywords also name Triton's options, such as `num_warps`.
    The kernel runs on the first tensor's device and its current stream.
    """

    def __init__(self, function: Callable[..., Any], do_not_specialize: Iterable[str]) -> None:
        functools.update_wrapper(self, function)
        unspecialized = set(do_not_specialize)
        self.jit: Any = triton.jit(function, do_not_specialize=list(unspecialized))
        parameters = inspect.signature(function).parameters
        self.names = [name for name, p in parameters.items() if p.annotation is p.empty]
        self.constants = list(parameters)[len(self.names) :]
        self.num_tensors = sum(name.endswith("_ptr") for name in self.names)
        self.num_specialized = len(self.names) - self.num_tensors - len(unspecialized)
        first = self.num_tensors + self.num_specialized
        are_last = set(self.names[first:]) == unspecialized
        if not are_last or any(n.endswith("_ptr") for n in self.names[self.num_tensors :]):
            raise TypeError(f"{function.__name__}: expected pointers, then numbers, then constants")

    def __call__(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        device = arguments[0].get_device()
        if IS_INTERPRETED:
            self.jit[grid](*arguments, **constants, **OPTIONS)
        elif device != current_device():
            with torch.cuda.device(device):
                self(grid, *arguments, **constants)
        elif not _IS_KNOWN or _is_hooked():
            self.jit[grid](*arguments, **constants, **OPTIONS)
        else:
            handle, values = self._found(device, grid, arguments, constants)
            x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
            handle.run(
                x, y, z, current_stream(device), handle.function, handle.metadata, None, None, None,
                *values, *handle.constants,
            )  # fmt: skip

    def _found(
        self, device: int, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict
    ) -> tuple[Handle, list[Any]]:
        """The compiled kernel, and what its launcher takes: addresses and numbers."""
        values: list[Any] = []
        tensors: list[Any] = []  # what Triton specializes on: dtypes, and which are aligned
        for x in arguments[: self.num_tensors]:
            if x is None:
                values.append(0)
                tensors.append(None)
            else:
                address = x.data_ptr()
                values.append(address)
                tensors.append((x.dtype,) if address % 16 else x.dtype)
        numbers = arguments[self.num_tensors :]
        values += numbers
        key = (
            self,
            device,
            *tensors,
            *map(type, numbers),
            *numbers[: self.num_specialized],
            _widths(numbers),
            *constants,
            *constants.values(),
        )
        handle = HANDLES.get(key)
        if handle is None:
            if len(HANDLES) >= MAX_HANDLES:
                HANDLES.clear()
            handle = HANDLES[key] = self.compiled(grid, arguments, constants)
        return handle, values

    def compiled(
        self, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]
    ) -> Handle:
        """Compiles the kernel for these arguments, or finds it in Triton's cache, and loads it."""
        kernel = self.jit.warmup(*arguments, grid=grid, **constants, **OPTIONS)
        values = tuple(constants[name] for name in self.constants)
        return Handle(kernel.run, kernel.function, kernel.packed_metadata, values, kernel)


def kernel(*, do_not_specialize: Iterable[str] = ()) -> Callable[[Callable[..., Any]], Kernel]:
    """Decorates the function of a kernel that the host launches, in place of `triton.jit`.

    do_not_specialize: integers for which Triton does not compile anew where they are 1 or a
    multiple of 16, and floats, for which it never does.
    """
    return lambda function: Kernel(function, do_not_specialize)


def current_device() -> int:
    return torch.cuda.current_device()


def current_stream(device: int) -> int:
    """The handle of the device's current stream."""
    return driver.active.get_current_stream(device)


def _is_hooked() -> bool:
    """Whether a profiler listens to launches, of which Triton's own path tells it."""
    enter, leave = _KNOBS.launch_enter_hook, _KNOBS.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _widths(numbers: tuple[Any, ...]) -> Any:
    """True where all integers have 32 bits, else what of each is beyond."""
    if not numbers or (min(numbers) >= -(2**31) and max(numbers) < 2**31):
        return True
    return tuple([n >> 31 if type(n) is int else None for n in numbers])
