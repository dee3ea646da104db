"""Shared by all launchers: launches, their registration with torch, the device and its properties.

Triton binds and classifies the arguments of every launch in Python, which takes the host longer
than a small batch takes the GPU. A `Kernel` looks a compiled kernel up by what Triton compiles for,
and hands the arguments to its launcher, whose interface has been the same from Triton 3.6 to 3.9.
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

# Programmatic dependent launch: a GPU from Hopper on launches a kernel while those before it in the
# stream are running, and the kernel waits in `begin`. Not measured yet, so not the default.
_PDL = os.environ.get("FASTBERT_PDL", "")
if _PDL not in ("", "0", "1"):
    raise ValueError(f'FASTBERT_PDL: expected "0" or "1", got {_PDL!r}')
STARTS_EARLY = tl.constexpr(_PDL == "1" and not IS_INTERPRETED)

# Fixed for all launches, so that a new default of Triton changes nothing.
OPTIONS = {"enable_fp_fusion": True}

# By kernel, device, dtypes of tensors, whether their addresses are multiples of 16, numbers that
# Triton specializes on, the width of the others, constants and options.
HANDLES: dict[Any, "Handle"] = {}
MAX_HANDLES = 4096  # a program has dozens, unless strides vary without end
_KNOBS = triton.knobs.runtime
_IS_KNOWN = (3, 6) <= TRITON_VERSION <= (3, 9)


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
        options = _options(arguments[0].get_device())
        kernel = self.jit.warmup(*arguments, grid=grid, **constants, **options)
        values = tuple(constants[name] for name in self.constants)
        return Handle(kernel.run, kernel.function, kernel.packed_metadata, values, kernel)


def kernel(*, do_not_specialize: Iterable[str] = ()) -> Callable[[Callable[..., Any]], Kernel]:
    """Decorates the function of a kernel that the host launches, in place of `triton.jit`.

    do_not_specialize: integers for which Triton does not compile anew where they are 1 or a
    multiple of 16, and floats, for which it never does.
    """
    return lambda function: Kernel(function, do_not_specialize)


@triton.jit
def begin():
    """What each kernel does first: it waits until those before it in the stream have ended.

    Then the next one may be launched, to wait in turn. A kernel launched early that read or wrote
    memory before its wait would race with the others.
    """
    if STARTS_EARLY and cuda_capability_geq(9, 0):
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def _nothing():
    begin()


@functools.cache
def fault() -> str:
    """Why Triton cannot compile a kernel here, "" if it can; it tries once."""
    try:
        _nothing.warmup(grid=(1,), **OPTIONS)
    except Exception as error:  # of Triton, its tools, the driver, or a full disk
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
    """Whether a profiler listens to launches, of which Triton's own path tells it."""
    enter, leave = _KNOBS.launch_enter_hook, _KNOBS.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _widths(numbers: tuple[Any, ...]) -> Any:
    """True where all integers have 32 bits, else what of each is beyond."""
    if not numbers or (min(numbers) >= -(2**31) and max(numbers) < 2**31):
        return True
    return tuple([n >> 31 if type(n) is int else None for n in numbers])


# An argument of any other type, such as a fake or functional tensor, means a call being traced.
_EAGER = frozenset((Tensor, torch.nn.Parameter, torch.dtype, type(None), bool, int, float, str))


def launcher(outputs: Callable, mutates: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    """Decorates a function that launches kernels, so that torch.compile can trace its calls.

    `outputs` takes the arguments of a call and allocates the results. The function gets these first
    and fills them, then the arguments; a trace runs `outputs` alone. A call returns the results.

    The function is registered as `torch.ops.fastbert_triton.<its name>`, which traced calls run. An
    eager call runs the function itself: torch's dispatcher would take longer than a small kernel.
    The schema is read from the annotations; `mutates` names the arguments that are overwritten, of
    which torch.compile passes copies. The operator has checked the arguments, and wraps the
    launcher in an autograd Function.
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
            results = outputs(*arguments)  # as in `filled`, without the time of one more call
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
    """Contiguous memory of x's shape and device; `torch.empty` of a shape takes twice as long."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; Triton's `cdiv` takes microseconds on the host."""
    return -(-a // b)


@functools.cache
def _gpu(device: torch.device) -> tuple[int, int]:
    """Compute capability and number of multiprocessors; what the interpreter reports on a CPU."""
    if device.type != "cuda":
        return 90, 4  # few multiprocessors, for short loops
    found = torch.cuda.get_device_properties(device)
    return 10 * found.major + found.minor, found.multi_processor_count


def capability(x: Tensor) -> int:
    """Compute capability 80, 90, 100, ..., which sets block shapes; the interpreter reports 90."""
    return _gpu(x.device)[0]


def num_sms(x: Tensor) -> int:
    """Streaming multiprocessors of the device; the interpreter reports 4."""
    return _gpu(x.device)[1]


def stride_unit(*strides: int) -> int:
    """The largest power of two, up to 8, that divides all row strides; see `layer_norm`."""
    return math.gcd(8, *strides)
