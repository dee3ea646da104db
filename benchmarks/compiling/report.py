"""`python -m benchmarks compile`: compiles each Triton kernel for GPUs that are not present.

Compiles every launch of `benchmarks.compiling.cases` ahead of time for sm_80, sm_90 and sm_100 and
reads registers, memory, tensor-core instructions and load widths from the binaries with the tools
that Triton ships. Exits with 1 if a kernel exceeds its limits, `benchmarks.compiling.limits`.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated, NamedTuple

import triton
import triton.backends.nvidia
import typer
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from benchmarks.compiling.cases import CAPABILITIES, UNITS, all_cases
from benchmarks.compiling.limits import Limits, block_of, limits_of
from benchmarks.launches import Launch
from fastbert.kernels.runtime import OPTIONS

TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
TENSOR_CORES = r"\b(?:HMMA|HGMMA|UTCHMMA|UTCQMMA)\b"


class Report(NamedTuple):
    registers: int
    stack: int
    local: int
    spills: int
    shared: int
    wide_loads: int
    matrix_products: int
    instructions: int


class Gpu(NamedTuple):
    """Triton's driver for a GPU that is not present: kernels compile for it, but none can run."""

    capability: int

    def get_current_device(self) -> int:
        return self.capability  # because Triton caches compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def compile_for_its_gpu(launch: Launch) -> CompiledKernel:
    """The kernel as Triton compiles it for this launch's types, alignment and arguments equal to 1.

    After that the process cannot use a GPU of its own.
    """
    triton.runtime.driver.set_active(Gpu(launch.capability))
    return launch.kernel.jit.warmup(grid=(1,), **launch.values, **OPTIONS)


def disassembled(compiled: CompiledKernel) -> Report:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert found is not None, usage
    return Report(
        *map(int, found.groups()),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        shared=compiled.metadata.shared,
        wide_loads=len(re.findall(r"\b(?:LDG\.E|LDGSTS\.E)(?:\.\w+)*\.128\b", code)),
        matrix_products=len(re.findall(TENSOR_CORES, code)),
        instructions=len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+\S", code, re.MULTILINE)),
    )


def faults(limits: Limits, report: Report) -> list[str]:
    """The limits that the code exceeds."""
    found = []
    if report.spills > limits.spills:
        found.append(f"{report.spills} spills, {limits.spills} allowed")
    if (report.stack or report.local) and not limits.spills:
        found.append(f"{report.stack + report.local} bytes of local memory")
    if report.wide_loads < limits.wide_loads:
        found.append(f"{report.wide_loads} loads of 16 bytes, {limits.wide_loads} required")
    if report.shared > limits.shared:
        found.append(f"{report.shared} bytes of shared memory, {limits.shared} allowed")
    if limits.dots and not report.matrix_products:
        found.append("no tensor-core instruction")
    return found


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run(
        [TOOLS / tool, *arguments], capture_output=True, text=True, check=True
    ).stdout


def main(
    quick: Annotated[bool, typer.Option(help="Only a representative part.")] = False,
    only: Annotated[str, typer.Option(help=f"One unit: {', '.join(UNITS)}.")] = "",
) -> None:
    """Compile every kernel for every GPU, and print what its code uses."""
    if only not in ("", *UNITS):
        raise typer.BadParameter(f"--only: one of {', '.join(UNITS)}, got {only}")
    table = Table("kernel", "case", "block", "GPU", *Report._fields, "verdict")
    seen: set[str] = set()
    failed = 0
    for case in all_cases(only):
        for capability in case.quick if quick else CAPABILITIES:
            for launch in case.launches(capability):
                compiled = compile_for_its_gpu(launch)
                if compiled.hash in seen:  # another case launched the same kernel
                    continue
                seen.add(compiled.hash)
                limits, report = limits_of(launch), disassembled(compiled)
                found = faults(limits, report)
                verdict = "; ".join(found) or "ok" + (limits.reason and f" ({limits.reason})")
                name, block = launch.kernel.__name__.strip("_"), block_of(launch)
                gpu = f"sm_{capability}"
                table.add_row(name, case.label, block, gpu, *map(str, report), verdict)
                failed += bool(found)
    console = Console(width=200)
    console.print(table)
    summary = f"{len(seen)} compiled, {failed} beyond their limits"
    console.print(f"Triton {triton.__version__}: {summary}")
    raise typer.Exit(1 if failed else 0)
