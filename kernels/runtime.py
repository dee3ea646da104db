"""What all launchers share: kernel launches, their registration with torch, properties of the GPU.

Triton binds and classifies the arguments of every launch in Python. For a small batch that takes
the host longer than the kernel takes the GPU. So a `Kernel` looks up the compiled kernel itself and
calls Triton's compiled launcher, whose interface is the same from Triton 3.6 to 3.9.
"""

import functools
import inspect
import math
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.language.target_info import cuda_capability_geq
from triton.runtime import driver

_LIBRARY = torch.library.Library("fastbert_triton", "DEF")

TRITON_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))

IS_INTERPRETED = triton.knobs.runtime.interpret

# Programmatic dependent launch: GPUs from Hopper on launch a kernel while earlier kernels of the
# stream still run, and the kernel waits for them in `begin`. Off by default, as not measured yet.
_PDL = os.environ.get("FASTBERT_PDL", "")
if _PDL not in ("", "0", "1"):
    raise ValueError(f'FASTBERT_PDL: expected "0" or "1", got {_PDL!r}')
STARTS_EARLY = tl.constexpr(_PDL == "1" and not IS_INTERPRETED)

# Set for all launches, so that a new default of Triton changes no results.
OPTIONS = {"enable_fp_fusion": True}

# Keys have all that Triton compiles for: kernel, device, dtypes of tensors, whether their addresses
# are multiples of 16, numbers that it specializes on, types and widths of all, constants, options.
HANDLES: dict[Any, "Handle"] = {}
MAX_HANDLES = 4096  # a program needs dozens, unless its strides keep changing
_KNOBS = triton.knobs.runtime
_IS_KNOWN = (3, 6) <= TRITON_VERSION <= (3, 9)


class Handle(NamedTuple):
    """A compiled kernel: Triton's launcher, its first arguments, and the compile-time arguments.

    kernel: Triton's own object, kept because Triton unloads a kernel that nothing refers to.
    """

    run: Callable[..., None]
    function: Any
    metadata: Any
    constants: tuple[Any, ...]
    kernel: Any = None


class Kernel:
    """A kernel, called with its grid, its arguments, and compile-time arguments by keyword.

    The function's parameters must come in this order: pointers, whose names end in "_ptr" and which
    take tensors or None (the first always a tensor); numbers, with those of `do_not_specialize`
    last; `tl.constexpr` parameters, for whose values Triton compiles anew. Keywords also set
    Triton's options, such as `num_warps`. The kernel runs on the first tensor's device, in its
    current stream.
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
            self.jit[grid](*arguments, **constants, **_options(device))
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
        """The compiled kernel, and the arguments of its launcher: addresses and numbers."""
        values: list[Any] = []
        tensors: list[Any] = []  # each tensor's part of the key: its dtype and its alignment
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
        options = _options(arguments[0].get_device())
        kernel = self.jit.warmup(*arguments, grid=grid, **constants, **options)
        values = tuple(constants[name] for name in self.constants)
        return Handle(kernel.run, kernel.function, kernel.packed_metadata, values, kernel)


def kernel(*, do_not_specialize: Iterable[str] = ()) -> Callable[[Callable[..., Any]], Kernel]:
    """Decorates the function of a kernel that the host launches, instead of `triton.jit`.

    do_not_specialize: names of all float parameters, and of the integers for which Triton shall not
    compile anew when they are 1 or a multiple of 16.
    """
    return lambda function: Kernel(function, do_not_specialize)


@triton.jit
def begin():
    """Waits for the earlier kernels of the stream, then lets the next one be launched.

    Every kernel calls this first: one that was launched early and read or wrote memory before its
    wait would race with the earlier ones.
    """
    if STARTS_EARLY and cuda_capability_geq(9, 0):
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def _nothing():
    begin()


@functools.cache
def fault() -> str:
    """Why Triton cannot compile a kernel on this machine, "" if it can; tried once."""
    try:
        _nothing.warmup(grid=(1,), **OPTIONS)
    except Exception as error:  # from Triton, its tools, the driver, or a full disk
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return ""


@functools.cache
def _options(device: int) -> dict[str, Any]:
    is_early = STARTS_EARLY.value and torch.cuda.get_device_capability(device) >= (9, 0)
    return {**OPTIONS, "launch_pdl": True} if is_early else OPTIONS


def current_device() -> int:
    return torch.cuda.current_device()


def current_stream(device: int) -> int:
    """The handle of the device's current stream."""
    return driver.active.get_current_stream(device)


def _is_hooked() -> bool:
    """Whether a profiler has hooks on launches, which only Triton's own launch path calls."""
    enter, leave = _KNOBS.launch_enter_hook, _KNOBS.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _widths(numbers: tuple[Any, ...]) -> Any:
    """True if all numbers fit 32 bits, else the bits of each integer above its lowest 31."""
    if not numbers or (min(numbers) >= -(2**31) and max(numbers) < 2**31):
        return True
    return tuple([n >> 31 if type(n) is int else None for n in numbers])


# An argument of any other type, such as a fake or functional tensor, means that a call is traced.
_EAGER = frozenset((Tensor, torch.nn.Parameter, torch.dtype, type(None), bool, int, float, str))


def launcher(outputs: Callable, mutates: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    """Decorates a function that launches kernels, so that torch.compile can trace its calls.

    `outputs` takes the arguments of a call and allocates the results. The decorated function takes
    the results, then the arguments, and fills the results; a trace runs only `outputs`. Callers
    pass the arguments alone and get the results.

    The function is registered as `torch.ops.fastbert_triton.<its name>`, which traced calls run. An
    eager call runs the function directly: torch's dispatcher would take longer than a small kernel.
    The schema is read from the annotations; `mutates` names the arguments that are overwritten, so
    that torch.compile passes copies of them. The operator that calls a launcher checks the
    arguments and provides the autograd Function.
    """

    def register(launch: Callable) -> Callable:
        name = launch.__name__
        results, *arguments = inspect.signature(launch).parameters.values()
        signature = inspect.Signature(arguments, return_annotation=results.annotation)

        def filled(*arguments: Any) -> Any:
            results = outputs(*arguments)
            launch(results, *arguments)
            return results

        @functools.wraps(launch)
        def call(*arguments: Any) -> Any:
            if is_traced(arguments):
                return operator(*arguments)
            results = outputs(*arguments)  # as `filled` does, without the time of one more call
            launch(results, *arguments)
            return results

        filled.__signature__ = call.__signature__ = signature  # type: ignore[attr-defined]
        _LIBRARY.define(name + torch.library.infer_schema(filled, mutates_args=mutates))
        _LIBRARY.impl(name, filled, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastbert_triton::{name}", outputs, lib=_LIBRARY)
        operator = getattr(torch.ops.fastbert_triton, name).default
        return call

    return register


def is_traced(arguments: tuple[Any, ...]) -> bool:
    """Whether a tracer or a dispatch mode must see a call with these arguments."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or not _EAGER.issuperset(map(type, arguments))
    )


def like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialized contiguous tensor like x; `torch.empty` of a shape takes twice as long."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; Triton's `cdiv` takes microseconds on the host."""
    return -(-a // b)


@functools.cache
def _gpu(device: torch.device) -> tuple[int, int]:
    """Compute capability and number of multiprocessors, as if of a small Hopper on a CPU."""
    if device.type != "cuda":
        return 90, 4  # few multiprocessors, for short loops in the interpreter
    found = torch.cuda.get_device_properties(device)
    return 10 * found.major + found.minor, found.multi_processor_count


def capability(x: Tensor) -> int:
    """Compute capability 80, 90, 100, ..., by which blocks are chosen; 90 in the interpreter."""
    return _gpu(x.device)[0]


def num_sms(x: Tensor) -> int:
    """Number of streaming multiprocessors of x's device; 4 in the interpreter."""
    return _gpu(x.device)[1]


def stride_unit(*strides: int) -> int:
    """The largest power of two, up to 8, that divides all row strides; see `layer_norm`."""
    return math.gcd(8, *strides)
