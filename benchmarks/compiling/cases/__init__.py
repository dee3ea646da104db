"""How each kernel is launched, for the compile report: one module a kernel unit, with `cases()`."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

UNITS = sorted(file.stem for file in Path(__file__).parent.glob("[a-z]*.py"))

CAPABILITIES = SM80, SM90, SM100 = 80, 90, 100


class Case(NamedTuple):
    """One way a kernel is launched, and what its code must keep to.

    kernel: the `@triton.jit` function; label: what distinguishes this case in the report; types:
    Triton's types of arguments, by default `*bf16` for names that end in `_ptr` and i32 for others;
    constants: values of constexpr arguments; wide_loads: 16-byte global loads that the code must
    have at least; dots: whether it must use the tensor cores; spills: {capability: spilled loads
    and stores allowed}, none where a capability is not named; reason: why any are allowed;
    divisible: arguments, other than pointers and strides, that are known multiples of 16;
    capabilities: the GPUs on which it is launched; quick: in the part that `make test` compiles.
    """

    kernel: Any
    label: str
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 2
    types: dict[str, str] = {}  # noqa: RUF012
    wide_loads: int = 0
    dots: bool = False
    spills: dict[int, int] = {}  # noqa: RUF012
    reason: str = ""
    divisible: tuple[str, ...] = ()
    capabilities: tuple[int, ...] = CAPABILITIES
    quick: bool = False


def all_cases(only: str = "") -> Iterator[Case]:
    """Of every kernel unit, or of one."""
    for unit in (only,) if only else UNITS:
        yield from import_module(f"benchmarks.compiling.cases.{unit}").cases()
