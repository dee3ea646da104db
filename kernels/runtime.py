"""Shared by all launchers: registration as a torch operator, the device, and its properties."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

_LIBRARY = torch.library.Library("fastbert_triton", "DEF")

TRITON_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))

IS_INTERPRETED = triton.knobs.runtime.interpret


# An argument of any other type, such as a fake or functional tensor, means a call being traced.
_EAGER = frozenset((Tensor, torch.nn.Parameter, torch.dtype, type(None), bool, int, float, str))


def launcher(outputs: Callable, mutates: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    """Decorates a function that launches kernels, so that torch.compile can trace its calls.

    The function is registered as `torch.ops.fastbert_triton.<its name>`, which traced calls run. An
    eager call runs the function itself: torch's dispatcher would take longer than a small kernel.

    `outputs` takes the same arguments and allocates the results; the launcher calls it, and a trace
    runs nothing else. The schema is read from the annotations; `mutates` names the arguments that
    the launcher overwrites, of which torch.compile passes copies. The operator has checked the
    arguments, and wraps the launcher in an autograd Function.
    """

    def register(launch: Callable) -> Callable:
        name = launch.__name__
        _LIBRARY.define(name + torch.library.infer_schema(launch, mutates_args=mutates))
        _LIBRARY.impl(name, launch, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastbert_triton::{name}", outputs, lib=_LIBRARY)
        operator = getattr(torch.ops.fastbert_triton, name).default

        @functools.wraps(launch)
        def call(*arguments: Any) -> Any:
            return (operator if is_traced(arguments) else launch)(*arguments)

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
def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def capability(x: Tensor) -> int:
    """Compute capability 80, 90, 100, ..., which sets block shapes; the interpreter reports 90."""
    return _capability(x.device)


@functools.cache
def _num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def num_sms(x: Tensor) -> int:
    """Streaming multiprocessors of the device; the interpreter reports 4, for short loops."""
    return _num_sms(x.device)


def stride_unit(*strides: int) -> int:
    """The largest power of two, up to 8, that divides all row strides; see `layer_norm_fwd`."""
    return math.gcd(8, *strides)
